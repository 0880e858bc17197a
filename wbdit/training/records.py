"""Records of the training log: what they hold, and how the progress bar shows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHOWN_LOSSES = {"loss": "loss", "validation_loss": "held out"}  # with their names on the progress bar


@dataclass
class LogWindow:
    """The steps since the last record.

    Attributes
    ----------
    began
        Time of the last record by :func:`time.monotonic`.
    steps
        Number of steps.
    losses
        Losses of the steps that were not skipped.
    """

    began: float
    steps: int = 0
    losses: list[float] = field(default_factory=list)

    def facts(self, batch_size: int, now: float) -> dict[str, float]:
        """Return the mean loss, if any step was taken, and the cells per second."""
        loss = {"loss": round(float(np.mean(self.losses)), 6)} if self.losses else {}
        return loss | {"cells_per_second": round(self.steps * batch_size / max(now - self.began, 1e-9), 1)}


def summary(record: dict[str, Any]) -> str:
    """Return the part of a record that the progress bar shows.

    Examples
    --------
    >>> from wbdit.training.records import summary
    >>> summary({"step": 7, "loss": 1.5, "cells_per_second": 1200.3, "learning_rate": 1e-3})
    'step 7, loss 1.5000, 1200 cells/s'
    """
    losses = [f"{name} {record[key]:.4f}" for key, name in SHOWN_LOSSES.items() if key in record]
    return ", ".join([f"step {record['step']}", *losses, f"{record['cells_per_second']:.0f} cells/s"])
