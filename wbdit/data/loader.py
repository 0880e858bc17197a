"""Minibatches of cells, in an order that can be saved and resumed."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wbdit.data.capacity import SHARE, fits, in_words
from wbdit.data.sources import TrainingData

logger = logging.getLogger("wbdit")

AHEAD = 4  # batches that are read while the model trains on one

Convert = Callable[[np.ndarray], np.ndarray]


class Batch(NamedTuple):
    """Cells ``(B, 1, G)``, labels ``(B,)`` or ``(B, C)``, log library sizes ``(B,)``, scaled covariates ``(B, K)``."""

    x: Tensor
    y: Tensor | None
    log_library: Tensor | None
    covariates: Tensor | None = None

    def rows(self, rows: slice) -> Batch:
        """Return some of the cells."""
        return Batch(self.x[rows], *(None if part is None else part[rows] for part in self[1:]))


class StreamedRows:
    """The model's input of cells, converted when a batch is drawn; it is indexed like a tensor ``(n, G)``.

    Parameters
    ----------
    data
        The cells.
    convert
        Function from expression ``(B, G)`` fp32 to the model's input of the same shape.
    device
        The model's device.
    """

    def __init__(self, data: TrainingData, convert: Convert, device: torch.device) -> None:
        self.data = data
        self.convert = convert
        self.device = device
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="wbdit-cells")
        self.ahead: deque[tuple[Tensor, Future[Tensor]]] = deque()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: Tensor) -> Tensor:
        rows = rows.cpu()
        while self.ahead:
            expected, found = self.ahead.popleft()
            if torch.equal(expected, rows):
                return found.result().to(self.device, non_blocking=True)
            found.cancel()  # read for another order
        return self._read(rows).to(self.device)

    def prefetch(self, batches: Sequence[Tensor]) -> None:
        """Read batches of rows in the background, in the order in which they will be asked for."""
        for rows in batches[len(self.ahead) :]:
            self.ahead.append((rows, self.reader.submit(self._read, rows)))

    def _read(self, rows: Tensor) -> Tensor:
        x = torch.from_numpy(self.convert(self.data.dense(rows.numpy())))
        return x.pin_memory() if self.device.type == "cuda" else x


class Batches:
    """Shuffled minibatches of cells. The order comes from torch's global random generator.

    Row numbers are drawn first and the cells fetched afterwards, so the batches do not depend on where the cells are.

    Parameters
    ----------
    x
        Cells ``(n, G)`` on the model's device: fp32 values or uint8 levels of counts; or the same read on demand.
    y
        Labels ``(n,)`` or ``(n, C)`` int64, or None.
    batch_size
        Cells per batch, at most the number of cells. The last, incomplete batch of an epoch is dropped.
    log_library
        Natural logarithms of library sizes ``(n,)`` fp32, or None.
    covariates
        Scaled covariates ``(n, K)`` fp32, or None.

    Attributes
    ----------
    own
        Part of each batch that this process takes; only its cells are read ahead.
    """

    def __init__(
        self,
        x: Tensor | StreamedRows,
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
        self.own = slice(None)
        self.epoch = 0
        self.position = len(x)  # end of an epoch: the first draw shuffles
        self.order = torch.arange(len(x))

    @classmethod
    def of_values(cls, data: TrainingData, batch_size: int, device: torch.device) -> Batches:
        """Return batches of model values on a device."""
        x = _inputs(data, data.preprocessor.scaled, device)
        return cls(x, _labels(data, device), batch_size, covariates=_covariates(data, device))

    @classmethod
    def of_counts(cls, data: TrainingData, bin_of: Convert, batch_size: int, device: torch.device) -> Batches:
        """Return batches of count levels with library sizes, on a device."""
        log_library = torch.from_numpy(data.log_library).to(device)
        x = _inputs(data, bin_of, device)
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
        """Return the cells at the given rows ``(B,)`` int64, on the model's device."""
        x = self.x[rows if isinstance(self.x, StreamedRows) else rows.to(self.x.device)]
        if isinstance(self.x, StreamedRows):
            self.x.prefetch(self._upcoming())
        rows = rows.to(self.x.device)
        taken = (None if of is None else of[rows] for of in (self.y, self.log_library, self.covariates))
        return Batch(x[:, None], *taken)

    def _upcoming(self) -> list[Tensor]:
        """Return the rows that will be asked for of the next batches of this epoch."""
        whole = (len(self.x) - self.position) // self.batch_size
        left = self.order[self.position : self.position + min(AHEAD, whole) * self.batch_size]
        return [rows[self.own] for rows in left.split(self.batch_size)] if len(left) else []


def _inputs(data: TrainingData, convert: Convert, device: torch.device) -> Tensor | StreamedRows:
    """Return the model's input of all cells ``(n, G)`` on the device if it fits, else converted batch by batch."""
    one = torch.from_numpy(convert(data.dense(np.zeros(1, np.int64))))
    size = len(data) * one.numel() * one.element_size()
    if not (fits(size) if device.type == "cpu" else size <= SHARE * torch.cuda.mem_get_info(device)[1]):
        logger.info(f"the model's input would take {in_words(size)}: it is made batch by batch")
        return StreamedRows(data, convert, device)
    x = torch.empty((len(data), one.shape[1]), dtype=one.dtype, device=device)
    for part, dense in data.chunks():
        x[part] = torch.from_numpy(convert(dense))
    return x


def _labels(data: TrainingData, device: torch.device) -> Tensor | None:
    return torch.from_numpy(data.codes).to(device) if data.preprocessor.labels.columns else None


def _covariates(data: TrainingData, device: torch.device) -> Tensor | None:
    scaled = data.scaled_covariates
    return None if scaled is None else torch.from_numpy(scaled).to(device)
