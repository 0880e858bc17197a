"""Minibatches of cells, in an order that can be saved and resumed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wbdit.data.sources import TrainingData


class Batch(NamedTuple):
    """Cells ``(B, 1, G)``, labels ``(B,)`` or ``(B, C)``, log library sizes ``(B,)``, scaled covariates ``(B, K)``."""

    x: Tensor
    y: Tensor | None
    log_library: Tensor | None
    covariates: Tensor | None = None

    def rows(self, rows: slice) -> Batch:
        """Return some of the cells."""
        return Batch(self.x[rows], *(None if part is None else part[rows] for part in self[1:]))


class Batches:
    """Shuffled minibatches of cells in memory. The order comes from torch's global random generator.

    Parameters
    ----------
    x
        Cells ``(n, G)`` on the model's device: fp32 values or uint8 levels of counts.
    y
        Labels ``(n,)`` or ``(n, C)`` int64, or None.
    batch_size
        Cells per batch, at most the number of cells. The last, incomplete batch of an epoch is dropped.
    log_library
        Natural logarithms of library sizes ``(n,)`` fp32, or None.
    covariates
        Scaled covariates ``(n, K)`` fp32, or None.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None,
        batch_size: int,
        log_library: Tensor | None = None,
        covariates: Tensor | None = None,
    ) -> None:
        self.x = x
        self.y = y
        self.log_library = log_library
        self.covariates = covariates
        self.batch_size = min(batch_size, len(x))
        self.epoch = 0
        self.position = len(x)  # end of an epoch: the first draw shuffles
        self.order = torch.arange(len(x))

    @classmethod
    def of_values(cls, data: TrainingData, batch_size: int, device: torch.device) -> Batches:
        """Return batches of model values on a device."""
        x = _stored(data, data.preprocessor.scaled, device)
        return cls(x, _labels(data, device), batch_size, covariates=_covariates(data, device))

    @classmethod
    def of_counts(
        cls, data: TrainingData, bin_of: Callable[[np.ndarray], np.ndarray], batch_size: int, device: torch.device
    ) -> Batches:
        """Return batches of count levels with library sizes, on a device."""
        log_library = torch.from_numpy(data.log_library).to(device)
        x = _stored(data, bin_of, device)
        return cls(x, _labels(data, device), batch_size, log_library, _covariates(data, device))

    @property
    def per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return len(self.x) // self.batch_size

    def draw(self) -> Tensor:
        """Return the rows of the next batch, ``(B,)`` int64 on the CPU; :meth:`take` fetches the cells."""
        if self.position + self.batch_size > len(self.x):
            self.order = torch.randperm(len(self.x))
            self.position = 0
            self.epoch += 1
        rows = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return rows

    def take(self, rows: Tensor) -> Batch:
        """Return the cells at the given rows ``(B,)`` int64, on the cells' device."""
        rows = rows.to(self.x.device)
        taken = (None if of is None else of[rows] for of in (self.y, self.log_library, self.covariates))
        return Batch(self.x[rows][:, None], *taken)


def _stored(data: TrainingData, convert: Callable[[np.ndarray], np.ndarray], device: torch.device) -> Tensor:
    """Return all cells ``(n, G)`` on the device, converted chunk by chunk from their expression."""
    parts = ((part, torch.from_numpy(convert(dense))) for part, dense in data.chunks())
    first, start = next(parts)
    x = torch.empty((len(data), start.shape[1]), dtype=start.dtype, device=device)
    x[first] = start
    for part, converted in parts:
        x[part] = converted
    return x


def _labels(data: TrainingData, device: torch.device) -> Tensor | None:
    return torch.from_numpy(data.codes).to(device) if data.preprocessor.labels.columns else None


def _covariates(data: TrainingData, device: torch.device) -> Tensor | None:
    scaled = data.scaled_covariates
    return None if scaled is None else torch.from_numpy(scaled).to(device)
