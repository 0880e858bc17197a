"""Calibration of the initial noise, so that generated cells of a label vary as much as real ones."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_cells, spreading, tiny_preset

import wbdit
from wbdit.counts.denoiser import NOISE_AXES, CountDenoiser
from wbdit.data.preprocessor import Preprocessor
from wbdit.data.sources import TrainingData
from wbdit.training import calibration
from wbdit.training.config import Budget
from wbdit.training.trainer import Trainer


class Narrow:
    """A stub generator whose cells deviate 0.7 times as much as real ones, times the factors of its noise."""

    def __init__(self):
        self.config = SimpleNamespace(seed=0)
        self.asked = []
        self.model = CountDenoiser.__new__(CountDenoiser)
        torch.nn.Module.__init__(self.model)
        self.model.gaussians = None
        self.model.register_buffer("noise_axes", torch.ones(NOISE_AXES, 60))
        self.model.register_buffer("noise_factors", torch.full((NOISE_AXES,), 5.0))

    def sample(self, codes, seed, show, covariates=None, calls=None):
        self.asked.append(len(codes))
        return spreading(len(codes), 0.7 * self.model.noise_factors[:2].numpy(), seed=seed % 1000, code=codes[:, 0]).X


def test_noise_is_wider_along_the_axes_alone():
    torch.manual_seed(0)
    cells = make_cells(40, 30)
    generator = wbdit.fit(cells, label="type", preset=tiny_preset(), steps=1, progress=False)
    model, noise = generator.model, torch.randn(5, 1, 30)
    assert torch.equal(model.start(noise), noise)  # too few cells for axes
    axes = torch.linalg.qr(torch.randn(30, NOISE_AXES))[0].T.contiguous()
    model.noise_axes.copy_(axes)
    model.noise_factors.copy_(torch.linspace(0.8, 2, NOISE_AXES))
    wide = model.start(noise)
    torch.testing.assert_close(wide @ axes.T, noise @ axes.T * model.noise_factors)
    rest = torch.eye(30) - axes.T @ axes
    torch.testing.assert_close(wide @ rest, noise @ rest)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.start(noise), wide)


def test_factors_give_back_the_spread_that_is_lost():
    data = TrainingData.fit(spreading(1000), label="type")
    generator = Narrow()
    noise = calibration.calibrate_noise(generator, data)
    assert noise["noise_factors"][:2].numpy() == pytest.approx(np.full(2, 1 / 0.7), rel=0.1)
    assert noise["noise_factors"][2:].mean() == pytest.approx(1, abs=0.1)  # sequencing noise only
    torch.testing.assert_close(noise["noise_axes"] @ noise["noise_axes"].T, torch.eye(NOISE_AXES), atol=1e-4, rtol=0)
    assert generator.asked == [calibration.CELLS] * calibration.ROUNDS
    again = calibration.calibrate_noise(generator, data)
    assert all(torch.equal(noise[name], again[name]) for name in noise)


def test_what_follows_from_library_sizes_is_no_spread():
    cells = spreading(600)
    cells.X = np.random.default_rng(1).poisson(cells.X * np.array([1, 4])[np.arange(600) // 2 % 2][:, None])
    cells.X = cells.X.astype(np.float32)
    preprocessor = Preprocessor.fit(cells, label="type")
    depth = np.log(cells.X.sum(1))
    assert abs(np.corrcoef(preprocessor.encode(cells).mean(1), depth)[0, 1]) > 0.9
    # rows are grouped by label, while the labels of the cells alternate
    beyond = calibration.within_labels(TrainingData.of(preprocessor, cells)).toarray()
    assert abs(np.corrcoef(beyond.mean(1), np.concatenate([depth[::2], depth[1::2]]))[0, 1]) < 1e-3
    assert beyond.mean(0) == pytest.approx(np.zeros(60), abs=1e-5)


def test_a_few_cells_far_off_change_little():
    places = np.random.default_rng(0).normal(size=(1000, 1))
    off = places.copy()
    off[:10] *= 100
    assert calibration._width(off) == pytest.approx(calibration._width(places), rel=0.02)
    assert off.std() > 3 * places.std()


def test_too_few_cells_leave_the_noise_as_it_is():
    generator = Narrow()
    data = TrainingData.fit(spreading(2 * calibration.FEWEST - 2), label="type")
    noise = calibration.calibrate_noise(generator, data)
    assert not noise["noise_axes"].any()
    assert (noise["noise_factors"] == 1).all()
    assert generator.asked == []


def test_a_label_of_few_cells_is_left_out():
    cells = spreading(303)
    cells.obs["type"] = np.where(np.arange(303) < 3, "rare", cells.obs["type"])
    assert len(calibration.within_labels(TrainingData.fit(cells, label="type"))) == 300


def test_values_without_a_likelihood_are_left_alone():
    cells = make_cells(40, 30)
    generator = wbdit.fit(cells, preset=tiny_preset("paper"), steps=1, progress=False)
    data = TrainingData.of(generator.preprocessor, cells)
    assert calibration.calibrate_noise(generator, data) == {}
    assert calibration.calibration_seconds(generator, data) == 0


def test_a_run_keeps_its_factors_and_finds_new_ones_when_resumed(tmp_path, monkeypatch, log):
    monkeypatch.setattr(calibration, "CELLS", 200)
    cells, run = spreading(240), tmp_path / "run"
    made = wbdit.fit(cells, label="type", preset=tiny_preset(learning_rate=0.02), steps=3, progress=False, out=run)
    assert (made.model.noise_factors != 1).any()
    assert f"along {NOISE_AXES} directions" in log[-1]
    loaded = wbdit.load(run)
    assert torch.equal(loaded.model.noise_factors, made.model.noise_factors)
    assert torch.equal(loaded.model.noise_axes, made.model.noise_axes)
    assert loaded.config.model_hash == made.config.model_hash
    longer = wbdit.fit(cells, steps=40, progress=False, out=run, resume=True)
    factors = longer.model.noise_factors.clone()
    assert torch.equal(
        calibration.calibrate_noise(longer, TrainingData.of(longer.preprocessor, cells))["noise_factors"], factors
    )
    assert not torch.equal(factors, made.model.noise_factors)


def test_what_was_trained_is_saved_before_the_spread_is_matched(tmp_path, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("wbdit.training.fit.calibrate_noise", stopped)
    made = wbdit.fit(spreading(240), preset=tiny_preset(), steps=3, out=tmp_path, progress=False)
    loaded = wbdit.load(tmp_path)
    assert loaded.config.trained.steps == 3
    assert loaded.config.model_hash == made.config.model_hash
    assert (loaded.model.noise_factors == 1).all()


@pytest.mark.parametrize(("estimate", "reserved"), [(0.5, 0.5), (60.0, 1.5)])  # at most a quarter of 6 s
def test_the_clock_includes_the_matching(monkeypatch, estimate, reserved):
    """The training time is shortened by the estimated calibration time. No time is measured in this test."""
    budgets, train = [], Trainer.train

    def two_steps(trainer, *given):
        budgets.append(trainer.budget)
        trainer.budget = Budget(steps=2)
        return train(trainer, *given)

    monkeypatch.setattr(calibration, "CELLS", 200)
    monkeypatch.setattr("wbdit.training.fit.calibration_seconds", lambda *given: estimate)
    monkeypatch.setattr(Trainer, "train", two_steps)
    generator = wbdit.fit(spreading(240), label="type", preset=tiny_preset(), minutes=0.1, progress=False)
    assert budgets[0].minutes == pytest.approx(0.1 - reserved / 60)
    data = TrainingData.of(generator.preprocessor, spreading(240))
    assert calibration.calibration_seconds(generator, data) > 0
