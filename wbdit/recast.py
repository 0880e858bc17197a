"""The same cells under other labels: up the noise under their own labels, down again under the new ones.

A cell is noised to the timestep at which counts are drawn, carried up the probability-flow ODE to pure noise under its
own labels, and down under the new ones (DDIM inversion: Song, Meng & Ermon, ICLR 2021, arXiv 2010.02502; between two
conditions: Su et al., ICLR 2023, arXiv 2203.08382). Its counts are drawn with the uniform numbers that draw its own
counts under its own labels (abduction, action, prediction: Pearl, Causality, 2009, section 7.1). So what the labels do
not change stays: a cell under its own labels is the cell itself.

The ODE up and the sampler down are discretized differently. The error that this makes, a cell after both under its own
labels minus the cell before, is subtracted under the new labels too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from wbdit import ops, samplers
from wbdit._progress import Show
from wbdit.cell_blocks import BLOCK, n_blocks, run_tasks, whole_block
from wbdit.counts.denoiser import CountDenoiser
from wbdit.data.cell_matrix import CellMatrix
from wbdit.data.preprocessor import Preprocessor
from wbdit.errors import InputError
from wbdit.request import GenerationRequest, read_request
from wbdit.samplers.noise import RECAST_NOISE, RECAST_PLACE
from wbdit.schedule import NoiseSchedule

UP_STEPS = 8  # of Heun's method, two calls each but for the last
MARGIN = 1e-3  # of a count's uniform numbers: rounding cannot take one to the next count


class Recasted(NamedTuple):
    """Counts ``(n, G)`` of the first draw; mean and standard deviation over all draws, None for a single one."""

    counts: sp.csr_matrix
    mean: sp.csr_matrix | None
    deviation: sp.csr_matrix | None


@dataclass(frozen=True)
class Recast:
    """Cells and the labels to recast them to.

    Attributes
    ----------
    model, schedule, preprocessor
        Those of the run.
    own, new
        The cells' own labels and covariates, and the new ones.
    cells
        Counts of the run's genes.
    seed
        Seed of the noise and of the places within counts.
    path
        Timesteps of the sampler.
    """

    model: CountDenoiser
    schedule: NoiseSchedule
    preprocessor: Preprocessor
    own: GenerationRequest
    new: GenerationRequest
    cells: CellMatrix
    seed: int
    path: list[float]

    @classmethod
    def of(
        cls,
        model: Any,
        schedule: NoiseSchedule,
        preprocessor: Preprocessor,
        cells: ad.AnnData,
        toward: Mapping[str, str],
        seed: int,
        calls: int,
    ) -> Recast:
        """Check the cells and the new labels; see :meth:`wbdit.CellGenerator.recast`."""
        if not isinstance(model, CountDenoiser):
            raise InputError("recast needs a run that was trained on counts")
        if not toward:
            raise InputError("recast to which labels? give `toward` a label of a column")
        own = read_request(preprocessor, like=cells)
        new = replace(own, codes=preprocessor.labels.replace(own.codes, toward))
        path = samplers.timesteps(schedule, calls, "uniform", stop=model.stop)
        return cls(model, schedule, preprocessor, own, new, preprocessor.cells(cells), seed, path)

    def run(self, draws: int, show: Show) -> Recasted:
        """Recast all cells, in blocks of 64, one per thread."""
        n, lock, done = self.cells.shape[0], threading.Lock(), count(1)
        starts, total = range(0, n, BLOCK), n_blocks(n) * draws * self.n_calls

        def block(start: int, check: Callable[[], None]) -> list[sp.csr_matrix]:
            def update(*step: object) -> None:
                check()
                with lock:
                    show(next(done) / total, "")

            rows = np.arange(start, min(start + BLOCK, n))
            first, sums, squares = None, np.zeros(1), np.zeros(1)
            for draw in range(draws):
                made = self.batch(whole_block(rows), draw, update)[: len(rows)].astype(np.float32)
                first = made if first is None else first
                sums, squares = sums + made, squares + made.astype(np.float64) ** 2
            mean = sums / draws
            deviation = np.sqrt(np.maximum(squares - draws * mean**2, 0) / max(draws - 1, 1))
            parts = [first] if draws == 1 else [first, mean.astype(np.float32), deviation.astype(np.float32)]
            return [sp.csr_matrix(part) for part in parts]

        self.model.eval()  # clears what was computed from the weights on several threads
        blocks = run_tasks(block, starts, min(torch.get_num_threads(), len(starts)))
        found = [sp.vstack(parts, format="csr") for parts in zip(*blocks, strict=True)]
        return Recasted(*found, *[None] * (3 - len(found)))

    @property
    def n_calls(self) -> int:
        """Number of model calls of a batch: once up, twice down."""
        return 2 * UP_STEPS - 1 + 2 * len(self.path)

    @torch.no_grad()
    def batch(self, rows: np.ndarray, draw: int, update: Callable[..., object]) -> np.ndarray:
        """Return the recast counts ``(B, G)`` of the cells with indices `rows`.

        Parameters
        ----------
        rows
            Indices ``(B,)``.
        draw
            Number of the draw, from 0: each has its own noise.
        update
            Called after each of :attr:`n_calls` model calls.
        """
        device = next(self.model.parameters()).device
        counts = self.cells.rows(rows).toarray()
        values = torch.from_numpy(self.preprocessor.scaled(counts)).to(device, torch.float32)[:, None]
        library = torch.from_numpy(np.maximum(counts.sum(axis=1), 1)).to(device, torch.float32)
        noise, place = self._random(rows, draw, device)
        alpha, sigma = self.schedule.levels(self.model.stop)
        start = alpha * values + sigma * noise[:, None]
        own, new = (self._conditioned(request, rows, library, device) for request in (self.own, self.new))
        t = torch.full((len(rows),), self.model.stop, device=device)
        u = self.model.uniform_numbers(
            start, t, own.conditioning, torch.from_numpy(counts).to(device), place * (1 - 2 * MARGIN) + MARGIN, library
        )
        top = self._up(own, start, update)
        error = self._down(own, top, update) - start
        return self.model.draw(self._down(new, top, update) - error, t, new.conditioning, u, library).cpu().numpy()

    def _random(self, rows: np.ndarray, draw: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return Gaussian and uniform numbers, ``(B, G)`` each, by seed, cell and draw."""
        places, genes = torch.from_numpy(rows).to(device), len(self.preprocessor.genes)
        normal, other = (
            ops.normal(self.seed, places, stream - 2 * draw, genes) for stream in (RECAST_NOISE, RECAST_PLACE)
        )
        return normal, torch.special.ndtr(other)

    def _conditioned(self, request: GenerationRequest, rows: np.ndarray, library: Tensor, device: torch.device) -> Any:
        fixed = self.model.fix_library(self.model, library.log())
        return request.model(fixed, rows, device, self.preprocessor.covariates)

    def _up(self, model: Any, x: Tensor, update: Callable[..., object]) -> Tensor:
        """Solve the ODE from the timestep of the counts to pure noise, by Heun's method."""
        times = np.linspace(self.model.stop, self.schedule.noise_steps - 1, UP_STEPS + 1).tolist()
        for t, later in pairwise(times):
            x0 = self._estimate(model, x, t, update)
            y = self._moved(x, x0, t, later)
            if later < times[-1]:  # at pure noise, the noise in y says nothing of x0
                x0 = (x0 + self._estimate(model, y, later, update)) / 2
                y = self._moved(x, x0, t, later)
            x = y
        return x

    def _estimate(self, model: Any, x: Tensor, t: float, update: Callable[..., object]) -> Tensor:
        x0: Tensor = model(x, torch.full((len(x),), t, device=x.device))
        update()
        return x0

    def _moved(self, x: Tensor, x0: Tensor, t: float, later: float) -> Tensor:
        """Return the state at timestep `later` with the same clean values and noise."""
        (alpha, sigma), (next_alpha, next_sigma) = self.schedule.levels(t), self.schedule.levels(later)
        return next_alpha * x0 + next_sigma / sigma * (x - alpha * x0)

    def _down(self, model: Any, x: Tensor, update: Callable[..., object]) -> Tensor:
        return samplers.unipc(
            model, x, self.schedule, self.path, stop=self.model.stop, clamp_min=None, noise=None, callback=update
        )
