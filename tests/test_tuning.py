"""Choosing block sizes: the expected best untried where it cannot be timed, else the fastest, once, and remembered."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from wbdit.kernels import tuning

GPU = SimpleNamespace(type="cuda")
CANDIDATES = ("expected", "faster", "slower")


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Return the candidates that were timed; "faster" is, and nothing is remembered from other tests."""
    seen = []
    seconds = {"expected": 2.0, "faster": 1.0, "slower": 3.0}

    def time(launch):
        seen.append(launch())
        return seconds[seen[-1]]

    monkeypatch.setattr(tuning, "_seconds", time)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_file", lambda device: tmp_path / "deeper" / "tuning.json")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("WBDIT_AUTOTUNE", raising=False)
    return seen


def choose(device=GPU, shape=(96, 200)):
    return tuning.choose("mssa", shape, CANDIDATES, lambda candidate: candidate, device)


def test_the_fastest_is_taken_and_remembered(timed, tmp_path):
    assert choose() == "faster"
    assert choose() == "faster"
    assert timed == list(CANDIDATES)
    assert json.loads((tmp_path / "deeper" / "tuning.json").read_text()) == {"mssa/96/200": 1}
    assert not list((tmp_path / "deeper").glob(".tuning.*"))


def test_another_process_remembers(timed, monkeypatch):
    choose()
    monkeypatch.setattr(tuning, "_chosen", {})
    assert choose() == "faster"
    assert timed == list(CANDIDATES)
    assert choose(shape=(64, 200)) == "faster"
    assert timed == 2 * list(CANDIDATES)


@pytest.mark.parametrize("case", ["cpu", "switched off", "capturing"])
def test_nothing_is_tried(timed, monkeypatch, case):
    if case == "switched off":
        monkeypatch.setenv("WBDIT_AUTOTUNE", "0")
    if case == "capturing":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(torch.device("cpu") if case == "cpu" else GPU) == "expected"
    assert timed == []


@pytest.mark.parametrize("text", ["", "[1]", '{"mssa/96/200": 7}', '{"mssa/96/200": "x"}'])
def test_a_spoilt_file_is_tried_again(timed, tmp_path, text):
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "tuning.json").write_text(text)
    assert choose() == "faster"


def test_the_time_is_limited(timed, monkeypatch):
    clock = iter([0.0, 1.0, 100.0])
    monkeypatch.setattr(tuning.time, "monotonic", lambda: next(clock))
    assert choose() == "expected"
    assert timed == ["expected"]


def test_what_does_not_fit_is_passed_over(timed, monkeypatch):
    from triton.runtime.errors import OutOfResources

    def time(launch):
        if launch() == "faster":
            raise OutOfResources(2, 1, "shared memory")
        return 1.0

    monkeypatch.setattr(tuning, "_seconds", time)
    assert choose() == "expected"
