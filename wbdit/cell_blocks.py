"""Blocks of 64 cells, the unit in which a CPU samples, so that a cell's bits depend on nothing but the request.

A matrix product may sum in another order if it has other rows or runs on other threads. So each product of a sampler
has the rows of one whole block, and runs on one thread. The blocks run side by side, one per thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

BLOCK = 64  # cells; a cell's block is its index in the request, divided by this

Result = TypeVar("Result")


class Stopped(Exception):
    """Ends the threads of :func:`run_tasks` after one of the tasks failed, or on Ctrl-C."""


def n_blocks(cells: int) -> int:
    """Return the number of blocks of `cells` cells; the last one may be incomplete.

    Examples
    --------
    >>> from wbdit.cell_blocks import n_blocks
    >>> n_blocks(64), n_blocks(65)
    (1, 2)
    """
    return -(-cells // BLOCK)


def whole_block(rows: np.ndarray) -> np.ndarray:
    """Return the rows of an incomplete block, with its last row repeated up to :data:`BLOCK`."""
    return np.pad(rows, (0, BLOCK - len(rows)), mode="edge")


def run_tasks(task: Callable[[int, Callable[..., None]], Result], starts: Sequence[int], at_once: int) -> list[Result]:
    """Call ``task(start, check)`` for each start, each call on one thread, and return the results in order.

    Parameters
    ----------
    task
        The work. It calls ``check()`` from time to time, which raises :class:`Stopped` once another task has failed or
        the program is interrupted.
    starts
        What the task is called with.
    at_once
        Number of threads.

    Examples
    --------
    >>> from wbdit.cell_blocks import run_tasks
    >>> run_tasks(lambda start, check: (start, torch.get_num_threads()), [0, 64, 128], at_once=2)
    [(0, 1), (64, 1), (128, 1)]
    """
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Stopped

    if at_once == 1:
        with _one_thread():
            return [task(start, check) for start in starts]
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(at_once, "wbdit", initializer=torch.set_num_threads, initargs=(1,))
    try:
        return list(pool.map(lambda start: task(start, check), starts))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the pool's threads also set what new threads start with


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run the block with one thread per op."""
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)
