"""What a network is given of real cells that are looked at: noise levels, noised values and conditioning."""

from __future__ import annotations

import anndata as ad
import numpy as np
import torch
from torch import Tensor

from wbdit.counts.denoiser import CountDenoiser
from wbdit.data.normalize import log_library_sizes
from wbdit.data.preprocessor import Preprocessor
from wbdit.nn.denoiser import Denoiser
from wbdit.samplers.noise import PhiloxNoise
from wbdit.schedule import NoiseSchedule

LEVELS = 8  # noise levels


def noise_levels(schedule: NoiseSchedule, stop: int) -> list[int]:
    """Return the timesteps to measure at, from high to low.

    They are evenly spaced from the highest noise level to the end of sampling, but not below 5% of the schedule.

    Examples
    --------
    >>> from wbdit.network_inputs import noise_levels
    >>> noise_levels(generator.schedule, generator.model.stop)
    [999, 928, 856, 785, 714, 643, 571, 500]
    """
    last = schedule.noise_steps - 1
    return [round(t) for t in np.linspace(last, max(stop, 0.05 * last), LEVELS)]


@torch.no_grad()
def noised(
    model: Denoiser | CountDenoiser, schedule: NoiseSchedule, preprocessor: Preprocessor, cells: ad.AnnData, seed: int
) -> tuple[Tensor, Tensor]:
    """Return real cells at the lowest noise level ``(n, 1, G)``, and its timestep for each ``(n,)``."""
    x0 = torch.from_numpy(preprocessor.encode(cells))[:, None].to(next(model.parameters()).device)
    rows = torch.arange(len(x0), device=x0.device)
    t = torch.full_like(rows, noise_levels(schedule, model.stop)[-1])
    return schedule.noising(x0, t, PhiloxNoise(seed, rows, tuple(x0.shape[1:]))(0)), t


@torch.no_grad()
def conditioning_of(model: Denoiser | CountDenoiser, preprocessor: Preprocessor, cells: ad.AnnData) -> Tensor | None:
    """Return the network's conditioning vectors ``(n, d)`` of real cells; None if the run is unconditional."""
    embedded = embedding_of(model, preprocessor, cells)
    return None if embedded is None else embedded[:, : model.network.hidden_size]


@torch.no_grad()
def embedding_of(model: Denoiser | CountDenoiser, preprocessor: Preprocessor, cells: ad.AnnData) -> Tensor | None:
    """Return what the model's ``embed`` makes of real cells, n rows; None if the run is unconditional."""
    device = next(model.parameters()).device
    y = torch.from_numpy(preprocessor.labels.codes(cells)).to(device) if preprocessor.labels.columns else None
    known = preprocessor.covariates
    covariates = torch.from_numpy(known.encode(known.read(cells))).to(device) if known.columns else None
    if not isinstance(model, CountDenoiser):
        return None if y is None and covariates is None else model.embed(y, covariates=covariates)
    log_library = torch.from_numpy(log_library_sizes(preprocessor.matrix(cells))).to(device)
    return model.embed(y, log_library, covariates)
