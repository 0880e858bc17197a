"""Faults of steps: what is not finite is skipped, and where memory does not suffice the batch is divided."""

import json

import pytest
import torch
from helpers import make_cells, tiny_preset

import wbdit
from wbdit import InputError
from wbdit.checkpoint import read_tensors_and_facts, state_hash
from wbdit.training import faults
from wbdit.training.losses import CountNLL
from wbdit.training.settings import with_settings
from wbdit.training.trainer import Trainer

CELLS = make_cells(60, 12)
LOSS = CountNLL.__call__


def fitted(steps=4, out=None, **training):
    preset = tiny_preset(**{"batch_size": 32, "precision": "fp32", **training})
    return wbdit.fit(CELLS, label="type", preset=preset, steps=steps, progress=False, out=out)


def weights(generator):
    return state_hash(generator.model.state_dict())


def spoil(monkeypatch, steps, how):
    """Let `how` change the loss of these steps, counted from 1."""
    taken = []

    def loss(loss_fn, batch, t):
        taken.append(len(taken) + 1)
        whole = LOSS(loss_fn, batch, t)
        return how(loss_fn, whole) if taken[-1] in steps else whole

    monkeypatch.setattr(CountNLL, "__call__", loss)


# losses and gradients that are not finite


def nan_loss(loss_fn, loss):
    return loss * torch.nan


def infinite_gradient(loss_fn, loss):
    """Return the same loss; the square root of 0 has an infinite slope."""
    trained = next(weight for weight in loss_fn.model.parameters() if weight.requires_grad)
    return loss + (0 * trained).sum().sqrt()


@pytest.mark.parametrize(("how", "why"), [(nan_loss, "its loss is nan"), (infinite_gradient, "its gradient is not")])
def test_a_step_that_is_not_finite_is_skipped(how, why, monkeypatch, tmp_path, log):
    seen, rows, update = {}, {}, Trainer._update

    def note(trainer):
        update(trainer)
        state = trainer.optimizer.state[next(iter(trainer.weights.values()))]
        seen[trainer.step] = [p.detach().clone() for p in (*trainer.weights.values(), *state.values())]
        rows[trainer.step] = trainer.batches.order[trainer.batches.position - 32 : trainer.batches.position].tolist()

    monkeypatch.setattr(Trainer, "_update", note)
    spoil(monkeypatch, {3}, how)
    assert fitted(5, tmp_path / "run").config.trained.steps == 5
    assert all(torch.equal(one, other) for one, other in zip(seen[2], seen[3], strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(seen[3], seen[4], strict=True))
    (line,) = (tmp_path / "run" / "bad_batches.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 3
    assert json.loads(line)["rows"] == rows[3]
    (said,) = [text for text in log if "skipped" in text]
    assert said.startswith(f"step 3 was skipped, because {why}")
    assert said.endswith(f"1 skipped so far; the rows of its cells are in {tmp_path / 'run' / 'bad_batches.jsonl'}")
    assert read_tensors_and_facts(tmp_path / "run" / "resume" / "state.safetensors")[1]["skipped"] == 1
    assert all(p.isfinite().all() for p in seen[5])


def test_a_diverged_training_stops_and_its_last_save_remains(monkeypatch, tmp_path):
    run = tmp_path / "run"
    fitted(2, run)
    kept = weights(wbdit.load(run))
    spoil(monkeypatch, {2, 3, 4}, nan_loss)
    with pytest.raises(InputError, match="diverged: .* in 3 steps in a row, the last of them step 6; lower the learn"):
        wbdit.fit(CELLS, steps=20, progress=False, out=run, resume=True)
    assert weights(wbdit.load(run)) == kept
    assert [json.loads(line)["step"] for line in (run / "bad_batches.jsonl").read_text().splitlines()] == [4, 5, 6]
    monkeypatch.setattr(CountNLL, "__call__", LOSS)
    assert wbdit.fit(CELLS, steps=4, progress=False, out=run, resume=True).config.trained.steps == 4


def test_too_many_skipped_steps_stop(monkeypatch):
    monkeypatch.setattr(faults, "MOST_SKIPPED", 2)
    spoil(monkeypatch, {1, 3}, nan_loss)
    with pytest.raises(InputError, match="not finite in 2 steps, the last of them step 3"):
        fitted(5)


def test_flags_wait_on_the_device_until_they_are_read():
    skipped = faults.SkippedSteps()
    for step, loss in enumerate([1.0, torch.nan, 3.0], 1):
        skipped.note(step, torch.arange(2), torch.tensor(loss), torch.tensor(loss == loss))
    assert skipped.count == 0
    assert skipped.read() == [1, 3]
    assert skipped.count == 1
    assert skipped.read() == []


# memory


def small_memory(monkeypatch, cells, error=torch.OutOfMemoryError):
    """Let the loss of more than so many cells run out of memory, after it has drawn its random numbers."""

    def loss(loss_fn, batch, t):
        whole = LOSS(loss_fn, batch, t)
        if len(t) > cells:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return whole

    monkeypatch.setattr(CountNLL, "__call__", loss)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_the_micro_batch_is_halved_where_memory_does_not_suffice(error, monkeypatch, tmp_path, log):
    small_memory(monkeypatch, 10, error)
    made = fitted(out=tmp_path / "run")
    assert [line.split(":")[0] for line in log if "memory did" in line] == [
        f"memory did not suffice for {cells} cells at once" for cells in (32, 16)
    ]
    assert made.config.training["micro_batch"] == wbdit.load(tmp_path / "run").config.training["micro_batch"] == 8
    monkeypatch.setattr(CountNLL, "__call__", LOSS)
    assert weights(made) == weights(fitted(micro_batch=8))  # no random number was lost
    resumed = wbdit.fit(CELLS, steps=5, progress=False, out=tmp_path / "run", resume=True)
    assert resumed.config.training["micro_batch"] == 8


def test_memory_for_not_even_one_cell(monkeypatch):
    small_memory(monkeypatch, 0)
    with pytest.raises(InputError, match="does not suffice for a single cell: choose fewer genes"):
        fitted()


def test_what_is_out_of_memory():
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60, dtype=torch.uint8)
    assert faults.is_out_of_memory(found.value)
    assert not faults.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("options", [{"label": "type"}, {"label": "type", "continuous": "time", "validation": 0.2}])
@pytest.mark.parametrize("name", ["small", "paper"])
def test_micro_batches_give_the_gradient_of_the_batch(name, options):
    """The last of 32 cells make an incomplete micro-batch."""
    cells = CELLS.copy()
    cells.obs["time"] = torch.rand(60, generator=torch.Generator().manual_seed(0)).numpy()
    preset = tiny_preset(name, batch_size=32, precision="fp32")
    one, other = (
        wbdit.fit(cells, preset=with_settings(preset, changes), steps=3, progress=False, **options)
        for changes in ([], ["training.micro_batch=7"])
    )
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    if "validation" in options:
        assert one.config.trained.validation_loss == pytest.approx(other.config.trained.validation_loss, rel=1e-5)
