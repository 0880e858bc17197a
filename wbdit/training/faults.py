"""Faults of training steps: memory that does not suffice, losses and gradients that are not finite."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from wbdit.errors import InputError

MOST_IN_A_ROW = 3  # skipped steps; after them the training has diverged, and waiting does not help
MOST_SKIPPED = 100  # in all
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")  # in RuntimeErrors

logger = logging.getLogger("wbdit")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory does not suffice, on a GPU or in RAM.

    Examples
    --------
    >>> from wbdit.training.faults import is_out_of_memory
    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes do not match"))
    (True, False)
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


class SkippedSteps:
    r"""The steps that were skipped because their loss or gradient is not finite.

    The optimizer skips such a step by itself, from a flag on the device. The flags are kept there and read now and
    then, since reading one waits for a GPU.

    Parameters
    ----------
    path
        JSON lines file for the batches of skipped steps, one object per step; None for none.
    count
        Skipped steps of earlier sessions.

    Examples
    --------
    >>> from pathlib import Path
    >>> from wbdit.training.faults import SkippedSteps
    >>> skipped = SkippedSteps(Path("bad_batches.jsonl"))
    >>> skipped.note(7, torch.tensor([4, 2]), torch.tensor(torch.nan), torch.tensor(False))
    >>> skipped.read()
    []
    >>> Path("bad_batches.jsonl").read_text()
    '{"step": 7, "loss": "nan", "rows": [4, 2]}\n'
    """

    def __init__(self, path: Path | None = None, count: int = 0) -> None:
        self.path = path
        self.count = count
        self._in_a_row = 0
        self._unread: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def note(self, step: int, rows: Tensor, loss: Tensor, is_finite: Tensor) -> None:
        """Keep a step's number, the rows of its batch, its loss and whether it was taken; the last two unread."""
        self._unread.append((step, rows, loss, is_finite))

    def forget(self) -> None:
        """Drop what was noted: another process reads the same."""
        self._unread = []

    def read(self) -> list[float]:
        """Read what was noted, and return the losses of the steps that were taken.

        Raises
        ------
        InputError
            After :data:`MOST_IN_A_ROW` skipped steps in a row, or :data:`MOST_SKIPPED` in all.
        """
        noted, self._unread = self._unread, []
        if not noted:
            return []
        losses = torch.stack([loss for _, _, loss, _ in noted]).tolist()
        taken = torch.stack([is_finite for *_, is_finite in noted]).tolist()
        for (step, rows, *_), loss, was_taken in zip(noted, losses, taken, strict=True):
            self._in_a_row = 0 if was_taken else self._in_a_row + 1
            if not was_taken:
                self._report(step, rows, loss)
        return [loss for loss, was_taken in zip(losses, taken, strict=True) if was_taken]

    def _report(self, step: int, rows: Tensor, loss: float) -> None:
        self.count += 1
        what = "its gradient is not finite" if math.isfinite(loss) else f"its loss is {loss}"
        kept = ""
        if self.path is not None:
            kept = f"; the rows of its cells are in {self.path}"
            self._write({"step": step, "loss": loss if math.isfinite(loss) else str(loss), "rows": rows.tolist()})
        logger.warning(f"step {step} was skipped, because {what}; {self.count} skipped so far{kept}")
        if self._in_a_row >= MOST_IN_A_ROW or self.count >= MOST_SKIPPED:
            many = f"{self._in_a_row} steps in a row" if self._in_a_row >= MOST_IN_A_ROW else f"{self.count} steps"
            raise InputError(
                f"training diverged: the loss or its gradient was not finite in {many}, the last of them step {step}; "
                f"lower the learning rate{kept}"
            )

    def _write(self, record: dict[str, object]) -> None:
        assert self.path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.path} ({error.strerror})") from error
