"""Progress of long work: a bar on a terminal and in a notebook, else a line in the log from time to time."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

LAYOUT = "{desc} {percentage:3.0f}% |{bar:24}| {elapsed}<{remaining}{postfix}"
LINE_SECONDS = 2.0  # least time between two lines of the log

logger = logging.getLogger("wbdit")

Show = Callable[[float, str], None]


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
