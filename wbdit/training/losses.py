"""Losses: squared error of a denoiser, and negative log-likelihood of counts."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wbdit._draws import normal_like
from wbdit.counts.denoiser import CountDenoiser
from wbdit.data.loader import Batch
from wbdit.nn.denoiser import Denoiser
from wbdit.schedule import NoiseSchedule

LIBRARY_JITTER = 0.05  # standard deviation of noise on ln(library size), so that it does not identify a cell
LIKELIHOOD_RATE = 10.0  # learning rate multiple of the per-gene tables: each cell updates one entry per gene


class Inputs(NamedTuple):
    """A denoiser and its inputs: noised cells, timesteps, labels and conditioning."""

    denoiser: Denoiser
    x: Tensor
    t: Tensor
    y: Tensor | None
    conditioning: Tensor | None


class LossFunction(Protocol):
    """A model and its loss; `lowest` is the lowest trained timestep."""

    schedule: NoiseSchedule
    lowest: int

    @property
    def model(self) -> nn.Module:
        """The trained model."""

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups; a group's "factor" multiplies the learning rate."""

    def __call__(self, batch: Batch, t: Tensor) -> Tensor:
        """Return the scalar loss of a batch at timesteps ``(B,)`` int64."""

    def inputs(self, batch: Batch, t: Tensor) -> Inputs:
        """Return the denoiser and its inputs for a batch."""


class SquaredError:
    """Mean squared error of a denoiser's prediction (Ho et al. 2020), at noised values.

    Parameters
    ----------
    model
        The denoiser.
    schedule
        Noise schedule.
    """

    lowest = 1

    def __init__(self, model: Denoiser, schedule: NoiseSchedule) -> None:
        self.model = model
        self.schedule = schedule

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return all weights as one parameter group."""
        return [{"params": _trained(self.model), "weight_decay": weight_decay}]

    def __call__(self, batch: Batch, t: Tensor) -> Tensor:
        """Return the scalar loss of a batch of values ``(B, 1, G)`` at timesteps ``(B,)`` int64."""
        noise = normal_like(batch.x)
        x_t = self.schedule.noising(batch.x, t, noise)
        target = self.schedule.target(self.model.prediction, batch.x, t, noise)
        return F.mse_loss(self.model(x_t, t, **self._given(batch)).to(target.dtype), target)

    def inputs(self, batch: Batch, t: Tensor) -> Inputs:
        """Return the denoiser and its inputs for a batch."""
        given = self._given(batch)
        x_t = self.schedule.noising(batch.x, t, normal_like(batch.x))
        return Inputs(self.model, x_t, t, given.get("y"), given.get("conditioning"))

    def _given(self, batch: Batch) -> dict[str, Tensor | None]:
        """Return the labels of a batch, or the conditioning vectors of its labels and covariates."""
        if batch.covariates is None:
            return {"y": batch.y}
        return {"conditioning": self.model.embed(batch.y, covariates=batch.covariates)}


class CountNLL:
    """Mean negative log-likelihood of counts given their noised values, in nats per gene.

    In training mode it has a prior on what the denoiser adds to the log rates of each gene: a normal distribution with
    mean 0. With k the model's `rate_prior` and c the gene's counts in all training cells, the prior is worth
    ``k^2 / (c + k)`` counts. So of the way from the rates of labels and library size to what a gene's own counts ask
    for, genes with far fewer counts than k go c / k, and genes with far more go nearly all. Without the prior, the
    denoiser learns by heart which training cells have the few counts of a rare gene, and misses them in other cells
    (docs/study.md).

    Parameters
    ----------
    model
        The denoiser and its likelihood.
    schedule
        Noise schedule.
    cells
        Number of training cells, which share the prior.
    """

    def __init__(self, model: CountDenoiser, schedule: NoiseSchedule, cells: int) -> None:
        self.model = model
        self.schedule = schedule
        self.cells = cells
        self.lowest = max(1, round(0.9 * model.stop))  # sampling ends at `stop`; a margin below it is trained

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return two groups: per-gene tables, with a higher learning rate and no weight decay, and the rest."""
        learned = [*self.model.likelihood.parameters(), self.model.label_dispersion, self.model.label_rates]
        if (combinations := self.model.combinations) is not None:
            learned.append(combinations.dispersion)
            if combinations.rate_offset is not None:
                learned.append(combinations.rate_offset)
        if self.model.denoiser.n_covariates:
            learned += self.model.trend.parameters()
        of_genes = {id(table) for table in learned}
        weights = _trained(self.model)
        tables = [weight for weight in weights if id(weight) in of_genes]
        rest = [weight for weight in weights if id(weight) not in of_genes]
        return [
            {"params": rest, "weight_decay": weight_decay},
            {"params": tables, "weight_decay": 0.0, "factor": LIKELIHOOD_RATE},
        ]

    def __call__(self, batch: Batch, t: Tensor) -> Tensor:
        """Return the scalar loss of a batch of count levels ``(B, 1, G)`` uint8 with library sizes."""
        x_t, conditioning = self._noised(batch, t)
        nll, added = self.model.nll_and_added(x_t, t, conditioning, batch.x[:, 0])
        loss = nll.mean()
        if self.model.rate_prior and self.model.training:
            loss = loss + (self.prior_per_cell / 2 * added.float().square()).mean()
        return loss

    @cached_property
    def prior_per_cell(self) -> Tensor:
        """What the prior of each gene is worth, in counts per training cell, ``(G,)``."""
        k, counts = self.model.rate_prior, self.model.likelihood.log_mean.exp() * self.cells
        return k**2 / (counts + k) / self.cells

    def inputs(self, batch: Batch, t: Tensor) -> Inputs:
        """Return the denoiser and its inputs for a batch."""
        x_t, conditioning = self._noised(batch, t)
        denoiser = self.model.denoiser
        return Inputs(denoiser, x_t, t, None, conditioning[:, : denoiser.hidden_size])

    def _noised(self, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return noised values ``(B, 1, G)`` and their conditioning ``(B, d + 2 G)``."""
        if batch.log_library is None:
            raise ValueError("the count likelihood needs library sizes: give batches with log_library")
        levels = batch.x[:, 0]
        genes = torch.arange(levels.shape[1], device=levels.device)
        x0 = self.model.likelihood.values[genes, levels.long()][:, None]
        x_t = self.schedule.noising(x0, t, normal_like(x0))
        log_library = batch.log_library + LIBRARY_JITTER * normal_like(batch.log_library)
        return x_t, self.model.embed(batch.y, log_library, batch.covariates)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in module.parameters() if weight.requires_grad]
