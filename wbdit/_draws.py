"""Random numbers of a batch, drawn for the whole batch, so that its division among processes and passes changes none.

A model and its loss draw noise and dropout by :func:`draw`. In a :meth:`BatchDraws.part` they get their part of what is
drawn for the whole batch. All processes draw the same numbers, because their random states are equal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor


class _Active(threading.local):
    """The part of a batch that this thread works on, if any; unlike a ContextVar, torch.compile can read it."""

    part: _Part | None = None


_active = _Active()


class BatchDraws:
    """The random numbers of one batch, kept for all forward passes over its parts.

    Parameters
    ----------
    size
        Number of samples in the whole batch.

    Examples
    --------
    >>> from wbdit._draws import BatchDraws, draw
    >>> whole = torch.manual_seed(0) and draw(4, torch.rand)
    >>> draws = torch.manual_seed(0) and BatchDraws(4)
    >>> with draws.part(slice(0, 1)):
    ...     first = draw(1, torch.rand)
    >>> with draws.part(slice(1, 4)):
    ...     rest = draw(3, torch.rand)
    >>> torch.equal(torch.cat([first, rest]), whole)
    True
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._made: list[Tensor] = []

    @contextmanager
    def part(self, rows: slice) -> Iterator[None]:
        """Let :func:`draw` return these rows of the numbers of the whole batch."""
        _active.part = _Part(self, rows)
        try:
            yield
        finally:
            _active.part = None

    def _take(self, index: int, make: Callable[[int], Tensor]) -> Tensor:
        if index == len(self._made):
            self._made.append(make(self.size))
        return self._made[index]


class _Part:
    """One forward pass over a part of a batch; its draws come in the same order in each pass."""

    def __init__(self, draws: BatchDraws, rows: slice) -> None:
        self.draws = draws
        self.rows = rows
        self.count = 0

    def __call__(self, n: int, make: Callable[[int], Tensor]) -> Tensor:
        taken = self.draws._take(self.count, make)[self.rows]
        self.count += 1
        if len(taken) != n:
            raise RuntimeError(f"{n} samples are drawn for a part of {len(taken)}")
        return taken


def draw(n: int, make: Callable[[int], Tensor]) -> Tensor:
    """Return random numbers for `n` samples: ``make(n)``, or in a part of a batch, its rows of those for the batch.

    Parameters
    ----------
    n
        Number of samples.
    make
        Function of a number of samples that draws for them, ``(n, ...)``.

    Raises
    ------
    RuntimeError
        If the part of the batch has another number of samples.

    Examples
    --------
    >>> from wbdit._draws import draw
    >>> draw(3, lambda n: torch.rand(n, 5)).shape
    torch.Size([3, 5])
    """
    part = _active.part
    return make(n) if part is None else part(n, make)


def normal_like(x: Tensor) -> Tensor:
    """Return Gaussian noise with the shape, dtype and device of samples ``(B, ...)``, as by :func:`draw`.

    Examples
    --------
    >>> from wbdit._draws import normal_like
    >>> normal_like(torch.zeros(3, 1, 5)).shape
    torch.Size([3, 1, 5])
    """
    return draw(len(x), lambda n: x.new_empty(n, *x.shape[1:]).normal_())
