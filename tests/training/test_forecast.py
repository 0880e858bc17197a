"""The forecast of time and memory, and what the log says of a training that is cut short."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import interrupt_at, make_cells, tiny_preset

import wbdit
from wbdit import InputError
from wbdit.training import forecast, memory
from wbdit.training.config import Budget, Training
from wbdit.training.forecast import WARMUP_STEPS, Forecast, duration
from wbdit.training.trainer import Trainer

CELLS = make_cells(60, 12)
QUICK = {"label": "type", "preset": tiny_preset(), "progress": False}


class Clock:
    """A clock that a test sets, in place of the module `time`."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


def trained(budget, each=1.0, steps=30, calibration=20.0, most_epochs=50, monkeypatch=None, later=None):
    """Let 30 steps of a second pass, after a first one that compiles for 9 s; return the forecast."""
    clock = Clock()
    monkeypatch.setattr(forecast, "time", clock)
    monkeypatch.setattr(forecast, "peak_memory", lambda device: 1_000_000_000)
    trainer = SimpleNamespace(
        step=0, seconds=0.0, budget=budget, validation=None, device=torch.device("cpu"), batches=SimpleNamespace()
    )
    trainer.batches.per_epoch, trainer.training = 10, Training(most_epochs=most_epochs)
    trainer.steps_in_all = Trainer.steps_in_all.fget(trainer)
    seen = Forecast(trainer, 0.0, lambda: calibration, later_bytes=200_000_000)
    for step in range(steps):
        took = (9.0 if step == 0 else each) if later is None or step < later[0] else later[1]
        trainer.step, trainer.seconds, clock.now = step + 1, trainer.seconds + took, clock.now + took
        trainer.progress = budget.progress(trainer.seconds, trainer.step / 10, trainer.step)
        seen.watch()
    return seen


def test_a_forecast_of_passes(monkeypatch, log):
    """20 passes of 10 steps: 9 s, 199 s, and 20 s of calibration. The first steps do not count."""
    seen = trained(Budget(epochs=20), monkeypatch=monkeypatch)
    assert seen.seconds == pytest.approx(9 + 199 + 20)
    assert log == ["about 3.8 min for 20 passes over the cells; 1.2 GB"]


def test_a_forecast_of_minutes_tells_how_many_are_needed(monkeypatch, log):
    """Of 2 minutes, 112 steps are 11 passes of 50; all 500 steps and the calibration take 520 s, and a tenth more."""
    seen = trained(Budget(minutes=2), monkeypatch=monkeypatch)
    assert seen.seconds == pytest.approx(120 + 20)
    assert log == ["about 2.3 min for 11.2 of 50 passes over the cells (give `minutes=10` for all); 1.2 GB"]
    assert trained(Budget(minutes=100), monkeypatch=monkeypatch).seconds == pytest.approx(9 + 499 + 20)
    assert log[-1] == "about 8.8 min for 50 passes over the cells; 1.2 GB"
    trained(Budget(minutes=2), monkeypatch=monkeypatch, most_epochs=None)
    assert log[-1] == "about 2.3 min for 11.2 passes over the cells; 1.2 GB"


def test_a_forecast_is_corrected_once(monkeypatch, log):
    """From step 20 of 100 on, a step takes three seconds."""
    seen = trained(Budget(epochs=10), monkeypatch=monkeypatch, steps=90, later=(20, 3.0))
    assert seen.seconds == pytest.approx(9 + 99 + 20)  # what was foretold first
    assert len(log) == 2
    assert log[0].startswith("about 2.1 min")


def test_a_short_training_has_none(monkeypatch, log):
    assert trained(Budget(steps=WARMUP_STEPS + 5), steps=WARMUP_STEPS + 5, monkeypatch=monkeypatch).seconds is None
    assert trained(Budget(steps=10**4), each=0.01, monkeypatch=monkeypatch).seconds is None
    assert log == []


def test_what_was_foretold_is_saved_beside_what_happened(monkeypatch, tmp_path):
    monkeypatch.setattr(forecast, "FEWEST_SECONDS", 0.0)
    wbdit.fit(CELLS, steps=20, out=tmp_path / "run", **QUICK)
    found = json.loads((tmp_path / "run" / "config.json").read_text())["trained"]
    assert found["estimated_seconds"] > 0
    assert found["total_seconds"] > 0
    assert 0 < found["estimated_gigabytes"] <= found["peak_gigabytes"]


@pytest.mark.parametrize(
    ("seconds", "words"), [(4.2, "4 s"), (89, "89 s"), (150, "2.5 min"), (3000, "50 min"), (8000, "2.2 h")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words


# before and after


def test_the_plan_is_logged(log):
    wbdit.fit(CELLS, epochs=2, validation=0.2, **QUICK)
    assert "training for 2 passes over the cells in 2 steps of 48 cells; 12 cells are held out" in log
    assert not any("give `minutes" in line for line in log)


def test_a_budget_of_minutes_that_is_too_short_says_so(monkeypatch, log):
    """On a clock on which every step takes an eighth of a second, 50 passes of one step take 6.25 s."""
    ticks = itertools.count()
    monkeypatch.setattr("wbdit.training.trainer.time", SimpleNamespace(monotonic=lambda: next(ticks) / 8))
    wbdit.fit(CELLS, minutes=0.025, **QUICK)
    assert "training for 2 s, at most 50 passes over the cells in 50 steps of 60 cells" in log
    assert log[-1] == "12 of 50 passes: give `minutes=0.2` for all"


def test_an_interrupted_training_says_how_far_it_came(tmp_path, log):
    with interrupt_at(3):
        wbdit.fit(CELLS, epochs=20, out=tmp_path / "run", **QUICK)
    assert log[-1].startswith("stopped at step 3, 3 of 20 passes; all of them take about ")
    assert log[-1].endswith(f"; the run is saved in {tmp_path / 'run'}, continue with `resume=True`")


def test_the_default_is_a_number_of_passes(log):
    """The preset small trains for 50 passes, however many cells there are."""
    assert wbdit.Preset.from_name("small").budget == Budget(epochs=50)
    assert wbdit.fit(CELLS, **QUICK).config.trained.epochs == 50


# memory


def test_a_model_that_cannot_fit_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda device: 16_000_000_000)
    huge = wbdit.Preset(**{**vars(tiny_preset()), "model": {**tiny_preset().model, "depth": 10**9}})
    with pytest.raises(InputError, match=r"million weights, whose training needs .* GB or more, but cpu has 16 GB"):
        wbdit.fit(CELLS, label="type", preset=huge, steps=1, progress=False)
    monkeypatch.setattr(memory, "total_memory", lambda device: None)
    memory.check_memory(huge, 12, torch.device("cpu"))


@pytest.mark.parametrize("depth", [1, 4])
def test_weights_are_counted_without_building(depth):
    preset = tiny_preset()
    model = {**preset.model, "depth": depth}
    built = wbdit.WBDiT(**model, input_size=100)
    counted = memory.count_weights(wbdit.Preset(**{**vars(preset), "model": model}), 100)
    assert counted == sum(p.numel() for p in built.parameters())
