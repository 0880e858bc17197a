"""The gradient of a batch, computed in parts: by several processes, and by each in micro-batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wbdit._draws import BatchDraws
from wbdit.data.loader import Batch
from wbdit.errors import InputError
from wbdit.profiling import span
from wbdit.training.distributed import Ranks
from wbdit.training.faults import is_out_of_memory
from wbdit.training.losses import LossFunction

logger = logging.getLogger("wbdit")


class BatchGradient:
    """The mean loss of a batch and its gradient, up to rounding the same for any number of processes and parts.

    The loss of each part is weighted by its cells, and random numbers are drawn for the whole batch
    (:mod:`wbdit._draws`). If memory does not suffice in any process, the micro-batch is halved in all, and the batch is
    computed anew with the same random numbers.

    Parameters
    ----------
    loss_fn
        The model and its loss.
    weights
        Trained weights; their gradients are set.
    ranks
        The processes that train together.
    low_precision
        Whether matrix products run in bf16.
    micro_batch
        Cells per forward and backward pass; None for all cells of the process.

    Attributes
    ----------
    micro_batch
        As given, or smaller after memory did not suffice.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        weights: Sequence[Tensor],
        ranks: Ranks,
        low_precision: bool,
        micro_batch: int | None = None,
    ) -> None:
        self.loss_fn = loss_fn
        self.weights = weights
        self.ranks = ranks
        self.low_precision = low_precision
        self.micro_batch = micro_batch

    def __call__(self, batch: Batch, t: Tensor, size: int, meet: Callable[[bool], bool]) -> Tensor:
        """Compute the gradient of a batch of `size` cells; return its loss, a scalar on the device.

        Parameters
        ----------
        batch, t
            The part of the batch that is this process's, and its timesteps.
        size
            Cells of the whole batch.
        meet
            Function of whether memory did not suffice here; returns whether it did not in any process.

        Raises
        ------
        InputError
            If memory does not suffice for a single cell.
        """
        device = t.device
        before = random_state(device)
        while True:
            loss = self._compute(batch, t, size)
            if not meet(loss is None):
                break
            self._halve(size)
            restore_random_state(before, device)
        assert loss is not None
        self.ranks.add([loss, *(p.grad for p in self.weights if p.grad is not None)])
        return loss

    def _compute(self, batch: Batch, t: Tensor, size: int) -> Tensor | None:
        """Compute the gradient of this process's part; return its share of the loss, None if memory is too small."""
        self._clear()
        try:
            return self._accumulate(batch, t, size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # not before the error and its frames are gone, which hold the activations
        self._clear()
        if t.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _accumulate(self, batch: Batch, t: Tensor, size: int) -> Tensor:
        own = self.ranks.part(size)
        draws, total = BatchDraws(size), t.new_zeros((), dtype=self.weights[0].dtype)
        for part in parts(own, self.micro_batch):
            rows = slice(part.start - own.start, part.stop - own.start)
            autocast = torch.autocast(t.device.type, torch.bfloat16, enabled=self.low_precision)
            with span("forward"), autocast, draws.part(part):
                loss = self.loss_fn(batch.rows(rows), t[rows]) * ((part.stop - part.start) / size)
            with span("backward"):
                loss.backward()
            total += loss.detach()
        return total

    def _halve(self, size: int) -> None:
        largest = -(-size // self.ranks.size)  # cells of a process; the same number in all of them
        now = min(self.micro_batch or largest, largest)
        if now == 1:
            raise InputError(
                "memory does not suffice for a single cell: choose fewer genes (`max_genes`) or a smaller model "
                "(model.hidden_size, model.depth)"
            )
        self.micro_batch = -(-now // 2)
        logger.warning(
            f"memory did not suffice for {now} cells at once: batches are computed {self.micro_batch} cells at a time "
            f"from now on, with equal results (training.micro_batch={self.micro_batch})"
        )

    def _clear(self) -> None:
        for p in self.weights:
            p.grad = None


def parts(rows: slice, size: int | None) -> list[slice]:
    """Divide rows into parts of at most `size`, none of them empty; None for one part.

    Examples
    --------
    >>> from wbdit.training.step import parts
    >>> parts(slice(10, 15), 2)
    [slice(10, 12, None), slice(12, 14, None), slice(14, 15, None)]
    """
    step = size or max(1, rows.stop - rows.start)
    return [slice(at, min(at + step, rows.stop)) for at in range(rows.start, rows.stop, step)]


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the global random generators that training uses, by device type."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore the result of :func:`random_state`, or the part of it that this device has."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
