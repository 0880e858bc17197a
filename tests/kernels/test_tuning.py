"""Choosing block sizes: the first candidate if timing is impossible, else the fastest, timed once and cached."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources
from wbdit.kernels import tuning

GPU = SimpleNamespace(type="cuda")
SECONDS = {"expected": 2.0, "faster": 1.0, "slower": 3.0}
CANDIDATES = tuple(SECONDS)


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Return the list of timed candidates; "faster" is the fastest, and no cache is shared between tests."""
    seen = []

    def time(launch):
        seen.append(launch()[0].name)
        return SECONDS[seen[-1]]

    monkeypatch.setattr(tuning, "_seconds", time)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_file", lambda device: tmp_path / "deeper" / "tuning.json")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("WBDIT_AUTOTUNE", raising=False)
    return seen


def kernel(name, spills=0):
    return (SimpleNamespace(name=name, n_spills=spills),)


def choose(device=GPU, shape=(96, 200), candidates=CANDIDATES, launch=kernel):
    return tuning.choose("mssa", shape, candidates, launch, device)


def test_the_fastest_is_taken_and_remembered(timed, tmp_path):
    assert choose() == "faster"
    assert choose() == "faster"
    assert timed == list(CANDIDATES)
    kept = json.loads((tmp_path / "deeper" / "tuning.json").read_text())
    assert kept == {"mssa/96/200": {"chosen": "faster", "among": list(CANDIDATES)}}
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


@pytest.mark.parametrize("text", ["", "[1]", '{"mssa/96/200": 1}', '{"mssa/96/200": {"chosen": "x", "among": ["x"]}}'])
def test_a_spoilt_file_is_searched_again(timed, tmp_path, text):
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "tuning.json").write_text(text)
    assert choose() == "faster"


def test_other_candidates_are_searched_again(timed, monkeypatch):
    """A cached choice is valid only for the candidates that it was made from."""
    choose()
    monkeypatch.setattr(tuning, "_chosen", {})
    assert choose(candidates=("slower", "expected")) == "expected"
    assert timed == [*CANDIDATES, "slower", "expected"]


def test_a_search_cut_short_is_not_kept(timed, monkeypatch, tmp_path):
    clock = iter([0.0, 100.0])
    monkeypatch.setattr(tuning.time, "monotonic", lambda: next(clock))
    assert choose() == "expected"
    assert choose() == "expected"  # this process does not search again
    assert timed == ["expected"]
    assert not (tmp_path / "deeper").exists()


def test_compiling_takes_none_of_the_time(timed, monkeypatch):
    """Every candidate is launched once, and so compiled, before the time limit starts."""
    launched = []

    def clock():
        assert launched[:3] == list(CANDIDATES)
        return 0.0

    monkeypatch.setattr(tuning.time, "monotonic", clock)
    assert choose(launch=lambda name: launched.append(name) or kernel(name)) == "faster"


@pytest.mark.parametrize("error", [OutOfResources(2, 1, "shared memory"), RuntimeError("PassManager::run failed")])
def test_what_does_not_compile_is_passed_over(timed, error):
    def launch(name):
        if name == "faster":
            raise error
        return kernel(name)

    assert choose(launch=launch) == "expected"
    assert timed == ["expected", "slower"]


def test_what_spills_is_passed_over(timed):
    assert choose(launch=lambda name: kernel(name, spills=4 * (name == "faster"))) == "expected"
    assert timed == ["expected", "slower"]
    assert choose(shape=(64, 200), launch=lambda name: kernel(name, spills=4)) == "faster"  # all spill


def test_where_nothing_compiles_the_first_says_why(timed):
    def launch(name):
        raise RuntimeError(name)

    assert choose(launch=launch) == "expected"
    assert timed == []


def test_a_round_is_many_launches_behind_a_busy_gpu(monkeypatch):
    """The GPU sleeps while a round is queued, so that Python's overhead is not timed."""
    order, clock = [], iter(())

    class Event:
        def __init__(self, **_):
            pass

        def record(self):
            order.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 40.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep") if cycles > 0 else None)
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: next(clock))
    # a first launch determines the launches per round: about ROUND seconds in total, at most LAUNCHES
    for seconds, count in ((1e-9, tuning.LAUNCHES), (tuning.ROUND / 4, 4), (1.0, 1)):
        order.clear()
        clock = iter([0.0, 1e-6, seconds])
        assert tuning._seconds(lambda: order.append("launch")) == pytest.approx(40e-3 / count)
        launches = ["launch"] * count
        assert order == ["wait", "launch", "wait", *(["sleep", "event", *launches, "event"] * tuning.ROUNDS)]
