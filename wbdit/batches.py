"""Minibatches of cells, in an order that can be stopped and taken up again."""

from __future__ import annotations

import torch
from torch import Tensor


class Batches:
    """Shuffled minibatches from memory, epoch after epoch, drawn with torch's global random numbers.

    Parameters
    ----------
    x
        Cells ``(n, G)`` fp32, on the device that the model is on.
    y
        Labels ``(n,)`` or ``(n, C)`` int64, or None.
    batch_size
        Cells a batch; fewer where there are fewer cells. The remainder of an epoch is left out of it.
    """

    def __init__(self, x: Tensor, y: Tensor | None, batch_size: int) -> None:
        self.x = x
        self.y = y
        self.batch_size = min(batch_size, len(x))
        self.epoch = 0
        self.position = len(x)  # an epoch is over: the first draw shuffles
        self.order = torch.arange(len(x))

    @property
    def per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return len(self.x) // self.batch_size

    def draw(self) -> tuple[Tensor, Tensor | None]:
        """Return the next batch: cells ``(B, 1, G)`` and their labels."""
        if self.position + self.batch_size > len(self.x):
            self.order = torch.randperm(len(self.x))
            self.position = 0
            self.epoch += 1
        rows = self.order[self.position : self.position + self.batch_size].to(self.x.device)
        self.position += self.batch_size
        return self.x[rows][:, None], None if self.y is None else self.y[rows]
