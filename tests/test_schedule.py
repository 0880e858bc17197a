"""The schedule, the parameterizations and the samplers, beyond the recorded numbers."""

import math

import pytest
import torch

from wbdit import NoiseSchedule, samplers

KINDS = pytest.mark.parametrize("kind", ["linear", "cosine"])
PREDICTIONS = pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
SD = 2.0  # of the Gaussian data, whose exact denoiser is known


def exact_denoiser(schedule, prediction):
    """Return the exact denoiser of data N(0, SD^2): E[x0 | x_t] is linear in x_t."""

    def model(x, t):
        alpha, sigma = schedule.levels(int(t[0]))
        clean = x * alpha * SD**2 / (alpha**2 * SD**2 + sigma**2)
        noise = (x - alpha * clean) / sigma
        return {"epsilon": noise, "x0": clean, "v": alpha * noise - sigma * clean}[prediction]

    model.prediction = prediction
    return model


@KINDS
def test_signal_falls(kind):
    schedule = NoiseSchedule(200, kind=kind)
    assert schedule.alpha_hat.dtype == torch.float64
    assert (schedule.alpha_hat.diff() < 0).all()
    assert ((schedule.beta >= 0) & (schedule.beta <= 1)).all()


def test_cosine_ends_in_pure_noise():
    schedule = NoiseSchedule(kind="cosine")
    assert schedule.levels(0) == (1.0, 0.0)
    assert schedule.levels(999) == (0.0, 1.0)
    assert schedule.levels(333)[0] == pytest.approx(math.cos(math.pi / 6))


@KINDS
@PREDICTIONS
def test_targets_give_back_signal_and_noise(kind, prediction):
    schedule = NoiseSchedule(50, kind=kind)
    x0, noise = torch.randn(4, 1, 6).double(), torch.randn(4, 1, 6).double()
    for t in (1, 20, 48):
        steps = torch.full((4,), t)
        x_t, out = schedule.noising(x0, steps, noise), schedule.target(prediction, x0, steps, noise)
        clean, eps = schedule.clean(prediction, t), schedule.noise(prediction, t)
        torch.testing.assert_close(clean.x * x_t + clean.out * out, x0)
        torch.testing.assert_close(eps.x * x_t + eps.out * out, noise)


def test_epsilon_says_nothing_of_pure_noise():
    with pytest.raises(ValueError, match="no signal is left"):
        NoiseSchedule(kind="cosine").clean("epsilon", 999)


@PREDICTIONS
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ddim0"])
def test_samplers_reach_the_data(sampler, prediction):
    """With the exact denoiser of Gaussian data, every sampler returns that Gaussian."""
    schedule = NoiseSchedule(1000) if prediction == "epsilon" else NoiseSchedule(300, kind="cosine")
    x_T = torch.randn(20_000, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    options = {"ddpm": {}, "ddim": {"eta": 1.0}, "ddim0": {"eta": 0.0}}[sampler]
    sample = samplers.ddpm if sampler == "ddpm" else samplers.ddim
    torch.manual_seed(0)
    x0 = sample(exact_denoiser(schedule, prediction), x_T, schedule, clamp_min=None, **options)
    assert abs(x0.mean()) < 0.06
    assert x0.std() == pytest.approx(SD, rel=0.04)


def test_the_parametrisation_does_not_change_the_path():
    schedule = NoiseSchedule(100)
    x_T = torch.randn(5, 1, 3).double()
    noise = torch.randn(99, 5, 1, 3).double()
    for sample in (samplers.ddpm, samplers.ddim):
        paths = [
            sample(exact_denoiser(schedule, p), x_T, schedule, clamp_min=None, noise=noise)
            for p in ("epsilon", "v", "x0")
        ]
        torch.testing.assert_close(paths[0], paths[1])
        torch.testing.assert_close(paths[0], paths[2])


def test_a_sample_does_not_depend_on_its_batch():
    schedule = NoiseSchedule(50, kind="cosine")
    model = exact_denoiser(schedule, "v")

    def sample(rows):
        noise = samplers.PhiloxNoise(11, torch.tensor(rows), (1, 9))
        return samplers.ddim(model, noise(-1), schedule, clamp_min=None, noise=noise)

    together = sample([0, 1, 2, 3])
    torch.testing.assert_close(sample([2]), together[2:3], rtol=0, atol=0)


def test_the_starting_noise_is_no_later_noise():
    noise = samplers.PhiloxNoise(0, torch.arange(4), (1, 50))
    assert (noise(-1) == noise(0)).double().mean() < 0.05


def test_callback_and_clamp():
    schedule, seen = NoiseSchedule(10), []
    model = exact_denoiser(schedule, "epsilon")
    x0 = samplers.ddim(model, torch.randn(3, 1, 5), schedule, callback=lambda i, t, x: seen.append((i, t)))
    assert seen == [(i, 9 - i) for i in range(9)]
    assert (x0 >= 0).all()
    assert (x0 == 0).any()


def test_guidance():
    def model(x, t, y):
        return x + y[:, None, None]

    model.label_sizes = (10,)
    x, t, y = torch.zeros(2, 1, 3), torch.ones(2), torch.tensor([1, 4])
    assert samplers.GuidedModel(model, y)(x, t)[:, 0, 0].tolist() == [1, 4]
    assert samplers.GuidedModel(model, y, 2.0)(x, t)[:, 0, 0].tolist() == [-8, -2]  # null + 2 (conditional - null)
    assert samplers.GuidedModel(model, y, 0.0)(x, t)[:, 0, 0].tolist() == [10, 10]


def test_uniform_timesteps():
    schedule = NoiseSchedule(1000)
    path = samplers.timesteps(schedule, 50)
    assert (len(path), path[0], path[-1]) == (50, 999, 1)
    assert samplers.timesteps(schedule, 999) == list(range(999, 0, -1))
    with pytest.raises(ValueError, match="between 1 and 999"):
        samplers.timesteps(schedule, 1000)


@pytest.mark.parametrize("timesteps", [[], [5, 5, 1], [1, 5], [10, 1], [3, 0]])
def test_refused_timesteps(timesteps):
    schedule = NoiseSchedule(10)
    with pytest.raises(ValueError, match="timesteps must decrease"):
        samplers.ddim(exact_denoiser(schedule, "epsilon"), torch.zeros(1, 1, 2), schedule, timesteps)


@pytest.mark.parametrize(("arguments", "words"), [({"kind": "sigmoid"}, "kind"), ({"noise_steps": 1}, "at least 2")])
def test_refused_schedules(arguments, words):
    with pytest.raises(ValueError, match=words):
        NoiseSchedule(**arguments)
