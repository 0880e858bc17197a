"""Signals that ask a program to stop: training saves first, other commands clean up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Ctrl-C; Slurm, kill and shutdown; a terminal that closes, which Windows has not
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
PATIENCE = 3  # Ctrl-C this often raises KeyboardInterrupt at once, unless a save is being written

_active: StopRequests | None = None


class Terminated(SystemExit):
    """Exit because of a signal, with the exit status that shells give: 128 and the number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


class StopRequests:
    """Signals received in a block of :func:`deferred_signals`. A call tells whether there was one."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._at_once = False
        self._shields = 0

    def __call__(self) -> bool:
        return bool(self.received)

    def note(self, number: int, frame: Any) -> None:
        """Handle a signal."""
        self.received.append(number)
        if self._shields == 0 and (self._at_once or self.received.count(signal.SIGINT) >= PATIENCE):
            raise KeyboardInterrupt

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Let nothing interrupt the block."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let the block be interrupted: a signal received in it or before raises KeyboardInterrupt."""
        self._at_once = True
        try:
            if self.received:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False


@contextmanager
def deferred_signals() -> Iterator[StopRequests]:
    """Note SIGINT, SIGTERM and SIGHUP in place of stopping, so that the block can end in its own time.

    Afterwards the handlers are as before. SIGTERM and SIGHUP are then delivered again, to those handlers: the program
    still ends, or does what it does on that signal. SIGINT has done its work and is not. If the block ends with an
    error, only the error is raised. The third SIGINT raises KeyboardInterrupt at once, for a step that takes too long.
    Ignored signals stay ignored (nohup). Blocks can be nested and then share one object. Outside the main thread, which
    alone can handle signals, the block has no effect.

    Examples
    --------
    >>> import signal
    >>> from wbdit._signals import deferred_signals
    >>> with deferred_signals() as stop_requested:
    ...     signal.raise_signal(signal.SIGINT)
    ...     stop_requested()
    True
    """
    global _active
    if _active is not None and threading.current_thread() is threading.main_thread():
        yield _active
        return
    requests = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = _handle(requests.note)
    _active = requests
    try:
        yield requests
    except KeyboardInterrupt:
        _end(before, requests.received)
        raise
    except BaseException:
        _end(before, [])
        raise
    _end(before, requests.received)


@contextmanager
def terminating() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise :class:`Terminated` in the block, so that it cleans up; for the command line."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Terminated(number)

    before = _handle(stop, SIGNALS[1:])
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(before: dict[signal.Signals, Any], received: list[int]) -> None:
    """Restore the handlers, and deliver the signals received, other than SIGINT, to them."""
    global _active
    _active = None
    for number, handler in before.items():
        signal.signal(number, handler)
    for again in dict.fromkeys(received):
        if again != signal.SIGINT:
            signal.raise_signal(again)


def _handle(handler: Any, numbers: Sequence[signal.Signals] = SIGNALS) -> dict[signal.Signals, Any]:
    """Set the handler of signals that are not ignored, and return those before."""
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: own for number, own in before.items() if own not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    return before
