"""Progress of long work: a bar on a terminal and in a notebook, else a line in the log from time to time."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

from tqdm import tqdm

LAYOUT = "{desc} {percentage:3.0f}% |{bar:24}| {elapsed}<{remaining}{postfix}"
LINE_SECONDS = 2.0  # least time between two lines of the log
SILENT_SECONDS = 3.0  # a pass over the cells that is shorter shows nothing

logger = logging.getLogger("wbdit")

Show = Callable[[float, str], None]

_passes_shown: ContextVar[bool] = ContextVar("passes_shown", default=False)


@contextmanager
def progress_bar(name: str, shown: bool, done: float = 0.0) -> Iterator[Show]:
    """Yield a function that shows the share of the work that is done, from 0 to 1, and a text.

    Without a terminal, the logger "wbdit" gets a line at each tenth of the work instead.

    Parameters
    ----------
    name
        The work, such as "training".
    shown
        Whether to show anything.
    done
        Share that was done before.

    Examples
    --------
    >>> from wbdit._progress import progress_bar
    >>> with progress_bar("training", shown=False) as show:
    ...     show(0.5, "loss 0.3")
    """
    if shown and not _has_bars():
        yield _lines(name, done)
        return
    with tqdm(total=1.0, initial=done, desc=name, bar_format=LAYOUT, disable=not shown, file=sys.stderr) as bar:

        def show(share: float, text: str = "") -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(min(share, 1.0) - bar.n)

        bar.miniters = 0  # tqdm would adapt it to the first shares; its least interval of 0.1 s is enough
        yield show


def show_passes(shown: bool) -> None:
    """Show the progress of long passes over the cells from now on, or hide it; it is hidden at first.

    Examples
    --------
    >>> from wbdit._progress import pass_over, show_passes
    >>> show_passes(False)
    >>> with pass_over("reading cells") as show:
    ...     show(0.5)
    """
    _passes_shown.set(shown)


@contextmanager
def pass_over(name: str) -> Iterator[Callable[[float], None]]:
    """Yield a function that shows the share of a pass that is done, once it takes :data:`SILENT_SECONDS`.

    Nothing is shown without :func:`show_passes`.
    """
    began, shown = time.monotonic(), _passes_shown.get()
    with ExitStack() as stack:
        bar: Show | None = None

        def show(share: float) -> None:
            nonlocal bar
            if not shown:
                return
            if bar is None and share < 1 and time.monotonic() - began > SILENT_SECONDS:
                bar = stack.enter_context(progress_bar(name, True))
            if bar is not None:
                bar(share, "")

        yield show


def _has_bars() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules  # a notebook's stderr is no terminal but shows bars


def _lines(name: str, done: float) -> Show:
    """Return a function that logs each tenth, at most one line every :data:`LINE_SECONDS` before the end."""
    tenths, said = int(10 * done), -LINE_SECONDS

    def show(share: float, text: str = "") -> None:
        nonlocal tenths, said
        reached, now = int(10 * min(share, 1.0) + 1e-6), time.monotonic()
        if reached > tenths and (reached == 10 or now - said >= LINE_SECONDS):
            tenths, said = reached, now
            logger.info(f"{name} {10 * reached}%{', ' if text else ''}{text}")

    return show
