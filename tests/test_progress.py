"""Progress: bars on a terminal, a line per tenth elsewhere, nothing if it is not wanted."""

import io

import pytest

from wbdit import _progress
from wbdit._progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Let a second pass whenever the time is asked for."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(_progress.time, "monotonic", lambda: next(seconds))


def work(shown, done=0.0):
    with progress_bar("training", shown, done) as show:
        for step in range(1, 101):
            if step / 100 > done:
                show(step / 100, f"step {step}")


def test_a_terminal_has_a_bar(monkeypatch, log):
    monkeypatch.setattr("sys.stderr", Terminal())
    work(True)
    import sys

    assert "training 100% |" in sys.stderr.getvalue()
    assert "step 100" in sys.stderr.getvalue()
    assert log == []


def test_elsewhere_each_tenth_is_a_line(monkeypatch, clock, log):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    work(True)
    assert log == [f"training {tenth}%, step {tenth}" for tenth in range(10, 101, 10)]
    log.clear()
    work(True, done=0.75)
    assert [line.split(",")[0] for line in log] == ["training 80%", "training 90%", "training 100%"]


def test_lines_are_rare_and_the_last_one_comes(monkeypatch, log):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr(_progress.time, "monotonic", lambda: 7.0)
    work(True)
    assert log == ["training 10%, step 10", "training 100%, step 100"]


def test_nothing_if_it_is_not_wanted(monkeypatch, log):
    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    work(False)
    assert (stderr.getvalue(), log) == ("", [])
