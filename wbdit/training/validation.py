"""Held-out cells in training: their choice, and their loss."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from torch import Tensor

from wbdit._draws import BatchDraws
from wbdit.data.labels import Labels
from wbdit.data.loader import Batches
from wbdit.training.distributed import current
from wbdit.training.losses import LossFunction
from wbdit.training.step import parts

FEWEST = 4  # cells of a label combination; with fewer, none is held out
FEWEST_TERMS = 128  # losses per evaluation; with fewer cells, each is noised several times
LARGEST_SHARE = 0.05  # of the training time spent on evaluations
COST = 1 / 3  # of a batch without gradients, in training steps
SEED = 0x56616C6964617465  # of the choice of cells, their timesteps and noise


def split_rows(labels: Labels, codes: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose held-out cells at random, stratified by label combination.

    Parameters
    ----------
    labels
        The cells' labels.
    codes
        Label of each cell, ``(n, C)`` int64.
    share
        Share of the cells to hold out, from 0 to 0.5.
    seed
        Seed of the choice.

    Returns
    -------
    Rows of the training cells and of the held-out cells, sorted. Each combination gives its share up to rounding, so
    all together do too. A combination with fewer than :data:`FEWEST` cells gives none.
    """
    rng = np.random.default_rng([seed, SEED])
    combination = labels.combination_index(codes)
    order = rng.permutation(len(codes))
    order = order[np.argsort(combination[order], kind="stable")]
    ranks = np.floor(share * np.arange(len(codes) + 1) + rng.random())
    held = np.zeros(len(codes), bool)
    held[order] = np.diff(ranks) > 0  # every 1 / share-th cell of the cells sorted by combination
    held &= labels.sizes[combination] >= FEWEST
    return np.flatnonzero(~held), np.flatnonzero(held)


class Validation:
    """The loss of held-out cells, comparable from one evaluation to the next.

    The loss function is that of training, but without dropout. Each cell has the same timestep and the same noise in
    each evaluation. Timesteps are stratified over all cells. A count above the gene's range in the training cells is
    taken as the upper end of that range, because its likelihood is zero.

    Parameters
    ----------
    loss_fn
        The model and its loss.
    cells
        Held-out cells.
    batch_size
        Cells per batch.
    seed
        Seed of timesteps and noise.

    Attributes
    ----------
    seconds
        Duration of the last evaluation; None before the first.
    micro_batch
        Cells per forward pass; None for all cells of a batch that are this process's.
    ranks
        The processes that share the evaluation, see :func:`wbdit.training.distributed.current`.
    """

    def __init__(self, loss_fn: LossFunction, cells: Batches, batch_size: int, seed: int) -> None:
        self.loss_fn = loss_fn
        self.cells = cells
        self.batch_size = batch_size
        self.seed = seed
        self.seconds: float | None = None
        self.micro_batch: int | None = None
        self.ranks = current()
        self.rows = torch.arange(len(cells.x)).repeat(max(1, math.ceil(FEWEST_TERMS / len(cells.x))))

    @property
    def batches(self) -> int:
        """Number of batches per evaluation."""
        return math.ceil(len(self.rows) / self.batch_size)

    def interval(self, per_epoch: int) -> int:
        """Return the number of steps between evaluations: a pass over the training cells, or more if it is too short.

        Evaluations take at most about :data:`LARGEST_SHARE` of the training time.
        """
        return max(per_epoch, math.ceil(self.batches * COST / LARGEST_SHARE))

    @torch.no_grad()
    def loss(self, low_precision: bool) -> float:
        """Return the mean loss of the held-out cells. The global random state changes: fork it.

        Parameters
        ----------
        low_precision
            Whether matrix products run in bf16, as in training.
        """
        began = time.monotonic()
        torch.manual_seed(self.seed ^ SEED)
        model = self.loss_fn.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.cells.x.device)
        size = self.batch_size
        for rows, t in zip(self.rows.split(size), self._timesteps().split(size), strict=True):
            draws = BatchDraws(len(rows))
            for part in parts(self.ranks.part(len(rows)), self.micro_batch):
                autocast = torch.autocast(self.cells.x.device.type, torch.bfloat16, enabled=low_precision)
                with autocast, draws.part(part):
                    total += len(t[part]) * self.loss_fn(self.cells.take(rows[part]), t[part]).double()
        model.train()
        loss = self.ranks.exchange(number=float(total)).number / len(self.rows)
        self.seconds = time.monotonic() - began
        return loss

    def _timesteps(self) -> Tensor:
        """Return a timestep for each row, one from each of equal parts, in random order."""
        n, lowest, beyond = len(self.rows), self.loss_fn.lowest, self.loss_fn.schedule.noise_steps
        u = (torch.randperm(n) + torch.rand(n)) / n
        return (lowest + u * (beyond - lowest)).long().clamp(max=beyond - 1).to(self.cells.x.device)
