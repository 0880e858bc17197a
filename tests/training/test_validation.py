"""Held-out cells: their choice, their loss, early stopping, and exact resuming with them."""

import json

import numpy as np
import pytest
import torch
from helpers import as_old_version, interrupt_at, make_cells, tiny_preset, two_columns

import wbdit
from wbdit import InputError
from wbdit.checkpoint import read_tensors_and_facts, state_hash
from wbdit.data.cells import Cells
from wbdit.data.labels import Labels
from wbdit.training.trainer import Trainer
from wbdit.training.validation import FEWEST, Validation, split_rows

CELLS = make_cells(60, 12)
HELD_OUT = {"label": "type", "preset": tiny_preset(), "validation": 0.2, "progress": False}


def weights(generator):
    return state_hash(generator.model.state_dict())


def losses(generator):
    return {record["step"]: record["validation_loss"] for record in generator.history if "validation_loss" in record}


@pytest.fixture
def often(monkeypatch):
    """Evaluate the held-out cells after every second step."""
    monkeypatch.setattr(Validation, "interval", lambda validation, per_epoch: 2)


# the choice of cells


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_each_combination_gives_its_share(share):
    cells = two_columns(240)
    labels = Labels.fit(cells, ["type", "condition"])
    train, held_out = split_rows(labels, labels.codes(cells), share, seed=0)
    assert np.array_equal(np.sort(np.concatenate([train, held_out])), np.arange(240))
    assert len(held_out) == pytest.approx(240 * share, abs=1)
    combination = labels.combination_index(labels.codes(cells))
    found = np.bincount(combination[held_out], minlength=len(labels.sizes))
    assert np.abs(found - share * labels.sizes).max() < 1


def test_the_choice_follows_the_seed():
    labels = Labels.fit(CELLS, "type")
    codes = labels.codes(CELLS)
    one, again, other = (split_rows(labels, codes, 0.2, seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_small_combinations_keep_their_cells():
    cells = make_cells(60, 12)
    cells.obs["type"] = np.where(np.arange(60) < FEWEST - 1, "rare", cells.obs["type"])
    labels = Labels.fit(cells, "type")
    for seed in range(20):
        held_out = split_rows(labels, labels.codes(cells), 0.5, seed)[1]
        assert not (cells.obs["type"].iloc[held_out] == "rare").any()
    assert split_rows(Labels.fit(cells, None), np.zeros((60, 0), np.int64), 0.5, 0)[1].size == 30


# the loss


def test_the_loss_is_comparable_and_leaves_the_training_alone(often):
    """The same weights have the same loss, and the losses and weights of a training with held-out cells follow."""
    seen = []

    def twice(validation, low_precision, loss=Validation.loss):
        seen.append([loss(validation, low_precision) for _ in range(2)])
        return seen[-1][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "loss", twice)
        one = wbdit.fit(CELLS, steps=8, **HELD_OUT)
    assert [a for a, b in seen] == [b for a, b in seen]
    assert list(losses(one)) == [2, 4, 6, 8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "interval", lambda validation, per_epoch: 3)
        other = wbdit.fit(CELLS, steps=8, **HELD_OUT)
    assert weights(one) == weights(other)  # the evaluations change nothing
    assert losses(one)[6] == losses(other)[6]
    assert one.config.trained.cells == 48


def test_the_averaged_weights_are_evaluated(often):
    generator = wbdit.fit(CELLS, steps=4, **HELD_OUT)
    run = wbdit.training.fit.TrainingRun  # the loss function of the run, on the weights that it returned
    held_out = wbdit.training.fit._split(Cells.of(CELLS), "type", 0.2, 0)[1]
    data = wbdit.data.sources.TrainingData.of(generator.preprocessor, held_out)
    again = run(generator.model, data, generator.config, data).trainer.validation
    with torch.random.fork_rng([]):
        loss = again.loss(generator.config.training["precision"] == "bf16")
    assert loss == pytest.approx(generator.config.trained.validation_loss, rel=1e-6)
    assert losses(generator)[4] == pytest.approx(loss, rel=1e-4)


def test_counts_beyond_those_of_training_have_a_finite_loss(often):
    cells = make_cells(60, 12)
    counts = cells.X.toarray()
    held_out = split_rows(Labels.fit(cells, "type"), Labels.fit(cells, "type").codes(cells), 0.2, 0)[1]
    counts[held_out[0], :2] = [10**6, 80]
    cells.X = counts
    assert np.isfinite(wbdit.fit(cells, steps=2, **HELD_OUT).config.trained.validation_loss)


def test_without_a_count_likelihood(often):
    generator = wbdit.fit(CELLS, label="type", preset=tiny_preset("paper"), steps=2, validation=0.2, progress=False)
    assert np.isfinite(generator.config.trained.validation_loss)


def test_evaluations_take_a_twentieth_of_the_time():
    """With few held-out cells they come once per pass, and with many more rarely; a batch takes a third of a step."""

    class Held:
        def __init__(self, n):
            self.x = torch.zeros(n, 1)

    assert Validation(None, Held(100), 64, 0).interval(100) == 100
    many = Validation(None, Held(6400), 64, 0)
    assert many.batches / 3 / many.interval(100) == pytest.approx(0.05, rel=0.01)
    assert Validation(None, Held(10), 64, 0).batches == 3  # 130 losses


# early stopping


def falling_then_rising(monkeypatch, best):
    """Let the loss of the held-out cells be lowest after step `best`; evaluations come after every second step."""
    taken = []

    def loss(validation, low_precision):
        taken.append(len(taken))
        return abs(2 * len(taken) - best) + 1.0

    monkeypatch.setattr(Validation, "loss", loss)


def test_early_stopping_keeps_the_best_weights(often, monkeypatch, tmp_path, log):
    falling_then_rising(monkeypatch, best=6)
    stopped = wbdit.fit(CELLS, epochs=40, early_stopping=4, out=tmp_path / "run", **HELD_OUT)
    assert stopped.config.trained.steps == 10
    assert "ended early after 10 passes over the cells; kept the weights of pass 6" in log[-1]
    assert stopped.config.trained.validation_loss == 1
    kept = {}
    falling_then_rising(monkeypatch, best=6)

    def note(trainer, validate=Trainer._validate):
        record = validate(trainer)
        kept[trainer.step] = {name: p.clone() for name, p in trainer.average.items()}
        return record

    monkeypatch.setattr(Trainer, "_validate", note)
    wbdit.fit(CELLS, epochs=40, **HELD_OUT)
    state = dict(wbdit.load(tmp_path / "run").model.named_parameters())
    assert all(torch.equal(state[name], p) for name, p in kept[6].items())
    assert not all(torch.equal(state[name], p) for name, p in kept[10].items())


def test_the_best_weights_are_kept_when_the_budget_is_spent(often, monkeypatch, log):
    falling_then_rising(monkeypatch, best=2)
    assert wbdit.fit(CELLS, epochs=4, early_stopping=9, **HELD_OUT).config.trained.validation_loss == 1
    assert log[-1] == "4 passes; kept the weights of pass 2, which fit the held-out cells best"


def test_a_stopped_run_stays_stopped(often, monkeypatch, tmp_path):
    falling_then_rising(monkeypatch, best=2)
    stopped = wbdit.fit(CELLS, epochs=40, early_stopping=2, out=tmp_path / "run", **HELD_OUT)
    again = wbdit.fit(CELLS, progress=False, out=tmp_path / "run", resume=True)
    assert again.config.trained.steps == stopped.config.trained.steps == 4
    assert weights(again) == weights(stopped)


@pytest.mark.parametrize("at", [3, 6])
def test_resuming_is_bit_exact(often, monkeypatch, tmp_path, at):
    """Between evaluations and at one; the best weights may come from before the interruption."""
    options = {**HELD_OUT, "epochs": 12, "early_stopping": 6}
    once = wbdit.fit(CELLS, out=tmp_path / "once", **options)
    with interrupt_at(at):
        stopped = wbdit.fit(CELLS, out=tmp_path / "twice", **options)
    assert stopped.config.trained.steps == at
    twice = wbdit.fit(CELLS, progress=False, out=tmp_path / "twice", resume=True)
    assert weights(twice) == weights(once)
    assert losses(twice) == losses(once)
    one, other = (read_tensors_and_facts(tmp_path / run / "resume" / "state.safetensors") for run in ("once", "twice"))
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert {**one[1], "seconds": 0} == {**other[1], "seconds": 0}


# arguments


def test_off_by_default():
    generator = wbdit.fit(CELLS, label="type", preset=tiny_preset(), steps=1, progress=False)
    assert generator.config.trained.validation_loss is None
    assert generator.config.training["validation"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"validation": 0.6}, "`validation` must be at least 0 and at most 0.5, not 0.6"),
        ({"validation": -0.1}, "`validation` must be at least 0"),
        (
            {"early_stopping": 3},
            "`early_stopping` needs held-out cells: give a share of them, such as `validation=0.1`",
        ),
        ({"validation": 0.1, "early_stopping": 0}, "`early_stopping` must be above 0"),
        ({"validation": 0.001}, "holds out 0: give a larger share or 0"),
    ],
)
def test_refused_arguments(arguments, words):
    with pytest.raises(InputError, match=words):
        wbdit.fit(CELLS, label="type", preset=tiny_preset(), steps=1, progress=False, **arguments)


def test_a_resumed_run_keeps_its_held_out_cells(tmp_path):
    wbdit.fit(CELLS, out=tmp_path / "run", steps=1, **HELD_OUT)
    with pytest.raises(InputError, match="trained with validation 0.2: resume it without `validation=0.1`"):
        wbdit.fit(CELLS, out=tmp_path / "run", steps=2, resume=True, validation=0.1)


def test_a_run_from_before_held_out_cells_is_resumed(tmp_path):
    """Its config and state lack the new fields."""
    run = tmp_path / "run"
    wbdit.fit(CELLS, label="type", preset=tiny_preset(), steps=1, progress=False, out=run)
    as_old_version(run)
    config = json.loads((run / "config.json").read_text())
    for name in ("validation", "early_stopping"):
        del config["training"][name]
    config["trained"] = {name: config["trained"][name] for name in ("steps", "seconds", "cells", "epochs")}
    (run / "config.json").write_text(json.dumps(config))
    tensors, facts = read_tensors_and_facts(run / "resume" / "state.safetensors")
    old = {name: facts[name] for name in ("step", "seconds", "epoch", "position", "cells")}
    wbdit.checkpoint.write_tensors(run / "resume" / "state.safetensors", tensors, old)
    assert wbdit.load(run).config.trained.validation_loss is None
    assert wbdit.fit(CELLS, steps=2, progress=False, out=run, resume=True).config.trained.steps == 2
