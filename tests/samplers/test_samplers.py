"""The samplers against diffusers and against exact distributions; timestep spacings; final timesteps."""

import inspect
import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from wbdit import NoiseSchedule, ops, samplers

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # raised by diffusers

PUBLISHED = NoiseSchedule()
COSINE = NoiseSchedule(kind="cosine")
SCHEDULES = pytest.mark.parametrize("schedule", [PUBLISHED, COSINE], ids=["linear", "cosine"])
SAMPLERS = {choice.sample.__name__: choice.sample for choice in samplers.BY_NAME.values()}
STOCHASTIC = ("ddpm", "ddim", "sde_dpmpp_2m")
TYPES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
PREDICTIONS = pytest.mark.parametrize("prediction", TYPES)


# the steps of diffusers


def toy_model(prediction):
    """Return a nonlinear function of x and t in place of a denoiser."""

    def model(x, t):
        return torch.tanh(1.5 * x + t.to(x.dtype).view(-1, 1, 1) / 300) - 0.3 * x.roll(1, -1)

    model.prediction = prediction
    return model


def diffusers_scheduler(kind, prediction, path, stop):
    """Return diffusers' scheduler with our noise levels; its own are rounded to whole timesteps and fp32."""
    betas = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    options = {"prediction_type": TYPES[prediction], "solver_order": 2, **betas}
    if kind == "unipc":
        scheduler = UniPCMultistepScheduler(solver_type="bh2", lower_order_final=stop == 0, **options)
    else:
        algorithm = {"dpmpp_2m": "dpmsolver++", "sde_dpmpp_2m": "sde-dpmsolver++"}[kind]
        ending = {"final_sigmas_type": "zero" if stop == 0 else "sigma_min", "lower_order_final": stop == 0}
        scheduler = DPMSolverMultistepScheduler(algorithm_type=algorithm, solver_type="midpoint", **ending, **options)
    scheduler.set_timesteps(len(path))
    levels = [PUBLISHED.levels(t) for t in (*path, stop)]
    ratios = [sigma / alpha for alpha, sigma in levels]
    scheduler.sigmas = torch.tensor(ratios if stop else [*ratios[:-1], 0.0], dtype=torch.float64)
    scheduler.timesteps = torch.arange(len(path))  # used only as indices
    return scheduler


@PREDICTIONS
@pytest.mark.parametrize("stop", [0, 60])
@pytest.mark.parametrize("spacing", ["uniform", "logsnr"])
@pytest.mark.parametrize("kind", ["dpmpp_2m", "sde_dpmpp_2m", "unipc"])
def test_steps_are_those_of_diffusers(kind, spacing, stop, prediction):
    model, generator = toy_model(prediction), torch.Generator().manual_seed(0)
    path = samplers.timesteps(PUBLISHED, 9, spacing, stop=stop)
    x_T, *noise = torch.randn(10, 4, 1, 8, generator=generator, dtype=torch.float64)
    ours, called, theirs = [], [], [x_T]

    def recording(x, t):
        called.append(t)
        return model(x, t)

    recording.prediction = prediction
    end = SAMPLERS[kind](
        recording, x_T, PUBLISHED, path, stop=stop, clamp_min=None, noise=noise, callback=lambda i, t, x: ours.append(x)
    )
    scheduler = diffusers_scheduler(kind, prediction, path, stop)
    for i, t in enumerate(called):
        options = {"variance_noise": noise[i]} if kind == "sde_dpmpp_2m" else {}
        x = theirs[-1]
        theirs.append(scheduler.step(model(x, t), i, x, **options).prev_sample.double())
    for x, expected in zip(ours, theirs[1:], strict=True):  # compare every step, to find the first error
        assert (x - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())
    assert torch.equal(end, ours[-1])


@PREDICTIONS
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_steps_are_those_of_diffusers(eta, prediction):
    model, path = toy_model(prediction), list(range(901, 0, -100))
    x_T, *noise = torch.randn(10, 4, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    betas = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    scheduler = DDIMScheduler(
        prediction_type=TYPES[prediction], clip_sample=False, set_alpha_to_one=False, steps_offset=1, **betas
    )
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == path
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = PUBLISHED.alpha_hat, PUBLISHED.alpha_hat[0]
    x = x_T
    for t, z in zip(path, [*noise, torch.zeros_like(x)], strict=True):
        out = model(x, torch.tensor([t]))
        x = scheduler.step(out, t, x, eta=eta, variance_noise=z if eta else None).prev_sample
    ours = samplers.ddim(model, x_T, PUBLISHED, path, eta=eta, clamp_min=None, noise=noise)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


# exact denoisers


class Mixture:
    """The exact denoiser of a one-dimensional Gaussian mixture: E[x_0 | x_t] in closed form."""

    means = torch.tensor([-2.0, 0.0, 1.5], dtype=torch.float64)
    sds = torch.tensor([0.3, 0.05, 0.6], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.4, 0.3], dtype=torch.float64)

    def __init__(self, schedule, prediction="v"):
        self.schedule = schedule
        self.prediction = prediction

    def __call__(self, x, t):
        alpha, sigma = self.schedule.levels(t[0].item())
        away, spread = x[..., None] - alpha * self.means, (alpha * self.sds) ** 2 + sigma**2
        share = torch.softmax(self.weights.log() - spread.log() / 2 - away**2 / (2 * spread), -1)
        clean = (share * (self.means + alpha * self.sds**2 / spread * away)).sum(-1)
        noise = (x - alpha * clean) / sigma
        return {"epsilon": noise, "x0": clean, "v": alpha * noise - sigma * clean}[self.prediction]

    def quantiles(self, levels, alpha=1.0, sigma=0.0):
        """Return quantiles of ``alpha x_0 + sigma noise``, by bisection."""
        spread = ((alpha * self.sds) ** 2 + sigma**2).sqrt()
        low, high = torch.full_like(levels, -8), torch.full_like(levels, 8)
        for _ in range(60):
            middle = (low + high) / 2
            below = (self.weights * torch.special.ndtr((middle[:, None] - alpha * self.means) / spread)).sum(-1)
            low, high = torch.where(below < levels, middle, low), torch.where(below < levels, high, middle)
        return low


LEVELS = (torch.arange(400, dtype=torch.float64) + 0.5) / 400


def transported(sampler, schedule, steps, stop, **options):
    """Return the quantiles of a deterministic sampler's output: its map in one dimension is monotonic."""
    x_T = torch.special.ndtri(LEVELS)[:, None, None]
    path = samplers.timesteps(schedule, steps, "logsnr", stop=stop)
    return sampler(Mixture(schedule), x_T, schedule, path, stop=stop, clamp_min=None, **options)[:, 0, 0]


@cache
def finely_transported(schedule):
    return transported(samplers.unipc, schedule, 300, 200)


@SCHEDULES
@pytest.mark.parametrize(
    ("sampler", "options", "falls"),
    [
        (samplers.ddim, {"eta": 0.0}, (1.8, 2.2)),
        (samplers.dpmpp_2m, {}, (3.2, 4.5)),
        (samplers.unipc, {}, (4.5, 9)),
    ],
    ids=["ddim", "dpmpp_2m", "unipc"],
)
def test_order_of_convergence(schedule, sampler, options, falls):
    """Halving the step divides the error by 2 at first order and by 4 at second; UniPC's corrector nears 8."""
    exact = finely_transported(schedule)
    errors = [(transported(sampler, schedule, n, 200, **options) - exact).square().mean().sqrt() for n in (20, 40, 80)]
    for coarse, fine in pairwise(errors):
        assert falls[0] < coarse / fine < falls[1]


@pytest.mark.parametrize("stop", [0, 200])
def test_the_ode_leads_to_the_distribution(stop):
    exact = Mixture(COSINE).quantiles(LEVELS, *COSINE.levels(stop))
    assert (transported(samplers.unipc, COSINE, 60, stop) - exact).abs().mean() < 2e-3
    few = {
        sampler: (transported(sampler, COSINE, 15, stop) - exact).abs().mean()
        for sampler in (samplers.unipc, ode_of_ddim)
    }
    assert few[samplers.unipc] < 0.3 * few[ode_of_ddim]


def ode_of_ddim(*arguments, **options):
    return samplers.ddim(*arguments, eta=0.0, **options)


@SCHEDULES
def test_fresh_noise_leads_to_the_distribution(schedule):
    """At 20 calls, the second-order solver beats DDIM with as much fresh noise."""
    x_T = torch.randn(8_000, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path, away = samplers.timesteps(schedule, 20, "logsnr"), {}
    exact = Mixture(schedule).quantiles((torch.arange(8_000) + 0.5) / 8_000)
    for sampler in (samplers.sde_dpmpp_2m, samplers.ddim):
        torch.manual_seed(0)
        x = sampler(Mixture(schedule), x_T, schedule, path, clamp_min=None)[:, 0, 0]
        away[sampler] = (x.sort().values - exact).abs().mean()
    assert away[samplers.sde_dpmpp_2m] < 0.06
    assert away[samplers.sde_dpmpp_2m] < 0.3 * away[samplers.ddim]


def spread(sampler, schedule, steps, spacing, stop):
    """Return the standard deviation of a sampler's output at `stop` for data N(0, 4), and the exact one.

    The exact denoiser is linear, so x is linear in the noise: each row of the batch follows one of the draws.
    """
    path = samplers.timesteps(schedule, steps, spacing, stop=stop)

    def model(x, t):
        alpha, sigma = schedule.levels(t[0].item())
        return x * alpha * sigma * (1 - 4) / (alpha**2 * 4 + sigma**2)

    model.prediction = "v"
    draws = torch.eye(steps + 1, dtype=torch.float64)[:, :, None, None]
    x = sampler(model, draws[0], schedule, path, stop=stop, clamp_min=None, noise=draws[1:])
    alpha, sigma = schedule.levels(stop)
    return float(x.norm()), math.hypot(2 * alpha, sigma)


@SCHEDULES
@pytest.mark.parametrize("stop", [0, 1, 99.5, 400])
@pytest.mark.parametrize("name", SAMPLERS)
def test_where_a_walk_ends(name, stop, schedule):
    steps = 500 if name in ("ddpm", "ddim") else 100
    given, right = spread(SAMPLERS[name], schedule, steps, "logsnr", stop)
    assert given == pytest.approx(right, rel=0.02)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_walk_in_two_parts(name):
    sampler, model, path = SAMPLERS[name], toy_model("v"), samplers.timesteps(PUBLISHED, 9)
    x_T, *noise = torch.randn(10, 4, 1, 8, generator=torch.Generator().manual_seed(0))
    half = sampler(model, x_T, PUBLISHED, path[:4], stop=path[4], noise=noise)
    assert (half < 0).any()  # intermediate states are not clamped
    assert torch.equal(
        sampler(model, half, PUBLISHED, path[4:], noise=noise[4:]), sampler(model, x_T, PUBLISHED, path, noise=noise)
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_a_jump_to_cells_is_without_fresh_noise(name):
    for stop, drawn in ((0, 3), (5, 4)):
        steps = []

        def noise(step, steps=steps):
            steps.append(step)
            return torch.zeros(2, 1, 3)

        SAMPLERS[name](toy_model("v"), torch.zeros(2, 1, 3), PUBLISHED, [900, 500, 100, 20], stop=stop, noise=noise)
        assert steps == (list(range(drawn)) if name in STOCHASTIC else [])


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_step_from_pure_noise_is_of_first_order(name):
    """At the first timestep x is pure noise, so the step uses only the model's estimate of x_0."""
    model, x_T = toy_model("x0"), torch.randn(3, 1, 6, dtype=torch.float64)
    noise = torch.randn(1, 3, 1, 6, dtype=torch.float64)
    alpha, sigma = COSINE.levels(800.5)
    x = SAMPLERS[name](model, x_T, COSINE, [999], stop=800.5, noise=noise)
    fresh = noise[0] if name in STOCHASTIC else x_T
    expected = alpha * model(x_T, torch.tensor([999])) + sigma * fresh
    if name == "ddpm":  # its variance is beta, not that of the posterior
        expected += (1 - sigma) * noise[0]
    torch.testing.assert_close(x, expected)


# the sampling loop


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", samplers.SPACINGS)
def test_a_sample_does_not_depend_on_its_batch(name, spacing):
    path = samplers.timesteps(COSINE, 7, spacing)

    def sample(rows):
        noise = samplers.PhiloxNoise(11, torch.tensor(rows), (1, 9))
        return SAMPLERS[name](toy_model("v"), noise(-1), COSINE, path, noise=noise)

    together = sample([0, 1, 2, 3])
    assert together.isfinite().all()
    assert torch.equal(sample([2]), together[2:3])


@pytest.mark.parametrize("name", ["dpmpp_2m", "sde_dpmpp_2m", "unipc"])
def test_the_parametrisation_does_not_change_the_path(name):
    x_T, *noise = torch.randn(12, 5, 1, 1, dtype=torch.float64)
    path = samplers.timesteps(PUBLISHED, 12, "sqrt")
    cells = [SAMPLERS[name](Mixture(PUBLISHED, p), x_T, PUBLISHED, path, noise=noise) for p in TYPES]
    torch.testing.assert_close(cells[0], cells[1])
    torch.testing.assert_close(cells[0], cells[2])


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", TYPES)
def test_passes_over_memory(name, prediction, monkeypatch):
    """Each step is one pass, plus one if the sampler keeps an estimate of x_0 that is not the model's output."""
    passes, step = [], ops.sampler_step
    monkeypatch.setattr("wbdit.ops.sampler_step", lambda *terms, **factors: passes.append(1) or step(*terms, **factors))
    SAMPLERS[name](toy_model(prediction), torch.randn(2, 1, 3), PUBLISHED, [900, 500, 100, 20])
    assert len(passes) == (4 if name in ("ddpm", "ddim") or prediction == "x0" else 7)


@pytest.mark.parametrize(
    ("timesteps", "dtype"),
    [
        ([999, 500, 1], torch.int64),
        ([999.0, 500.0, 1.0], torch.int64),
        (torch.tensor([999, 500, 1]), torch.int64),
        (np.array([999, 500, 1]), torch.int64),
        ([999, 500.5, 1], torch.float32),
    ],
)
def test_what_the_model_is_given(timesteps, dtype):
    called, model = [], toy_model("v")

    def recording(x, t):
        called.append(t)
        return model(x, t)

    samplers.unipc(recording, torch.randn(2, 1, 3), PUBLISHED, timesteps)
    assert [t[0].item() for t in called] == list(timesteps)
    assert all(t.dtype == dtype and t.stride() == (0,) for t in called)


@pytest.mark.parametrize(
    ("timesteps", "stop"), [([900, 5], 5), ([900, 4.5], 5), ([900], -1), ([900], 999), ([900, 0.5], 0), (None, 999)]
)
def test_refused_ends(timesteps, stop):
    with pytest.raises(ValueError, match="must decrease|stop must be"):
        samplers.unipc(toy_model("v"), torch.zeros(1, 1, 2), PUBLISHED, timesteps, stop=stop)


# spacings and fractional timesteps


@SCHEDULES
def test_whole_timesteps_are_the_table(schedule):
    for t in (0, 1, 500, 998, 999):
        alpha_hat = float(schedule.alpha_hat[t])
        assert schedule.levels(t) == schedule.levels(float(t)) == (math.sqrt(alpha_hat), math.sqrt(1 - alpha_hat))


def test_between_whole_timesteps():
    alpha, sigma = PUBLISHED.levels(499.5)
    assert alpha**4 == pytest.approx(float(PUBLISHED.alpha_hat[499] * PUBLISHED.alpha_hat[500]))
    assert alpha**2 + sigma**2 == pytest.approx(1)
    # a third of 1000 timesteps is an angle of 30 degrees
    assert NoiseSchedule(1001, kind="cosine").levels(1000 / 3) == pytest.approx((math.sqrt(0.75), 0.5))


@SCHEDULES
def test_a_timestep_has_one_log_snr(schedule):
    for t in (1, 1.25, 77.7, 500, 998):
        assert schedule.timestep(schedule.log_snr(t)) == pytest.approx(t)
    alpha, sigma = schedule.levels(77.7)
    assert schedule.log_snr(77.7) == pytest.approx(math.log(alpha / sigma))


def test_log_snr_at_the_ends():
    assert (COSINE.log_snr(0), COSINE.log_snr(999)) == (math.inf, -math.inf)
    assert (COSINE.timestep(math.inf), COSINE.timestep(-5)) == (0, pytest.approx(994.7, abs=0.1))
    assert (PUBLISHED.timestep(20), PUBLISHED.timestep(-20)) == (0, 999)


@SCHEDULES
@pytest.mark.parametrize("steps", [1, 10, 300])
def test_the_log_snr_grid_is_even(schedule, steps):
    path = samplers.timesteps(schedule, steps, "logsnr")
    assert len(path) == steps
    assert path[0] == 999
    lambdas = np.array([schedule.log_snr(t) for t in path[1:]])
    if steps > 1:
        assert np.ptp(np.diff(lambdas)) < 1e-6
        assert -5.1 < lambdas[0] - np.diff(lambdas)[0] < -4.9
        assert lambdas[-1] == pytest.approx(min(schedule.log_snr(1), 5))


def test_the_sqrt_grid_is_even():
    path = samplers.timesteps(PUBLISHED, 10, "sqrt")
    np.testing.assert_allclose(np.sqrt(path), np.linspace(math.sqrt(999), 1, 10))


@SCHEDULES
@pytest.mark.parametrize("spacing", samplers.SPACINGS)
@pytest.mark.parametrize("stop", [1, 40, 250.5])
def test_grids_end_a_step_above_the_stop(schedule, spacing, stop):
    def even(t):
        lowest, highest = -5, 5
        return {"uniform": t, "sqrt": math.sqrt(t), "logsnr": min(max(schedule.log_snr(t), lowest), highest)}[spacing]

    path = samplers.timesteps(schedule, 20, spacing, stop=stop)
    gaps = -np.diff([even(t) for t in (*path, stop)])
    slack = 1.5 if spacing == "uniform" else 0.1
    assert (abs(gaps - gaps.mean()) < slack).all()
    assert (gaps != 0).all()
    samplers.unipc(toy_model("v"), torch.zeros(1, 1, 2), schedule, path, stop=stop)


def test_uniform_timesteps_are_whole():
    assert all(isinstance(t, int) for t in samplers.timesteps(PUBLISHED, 50))
    assert samplers.timesteps(PUBLISHED, 49, "uniform", stop=950) == list(range(999, 950, -1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 5, "spacing": "karras"}, "choose one of uniform, logsnr, sqrt"),
        ({"steps": 0}, "between 1 and 999"),
        ({"steps": 500, "stop": 500}, "between 1 and 499"),
        ({"steps": 5, "stop": 0.5}, "stop must be 0, or at least 1"),
        ({"steps": 1, "stop": 999}, "stop must be 0, or at least 1"),
    ],
)
def test_refused_grids(arguments, words):
    with pytest.raises(ValueError, match=words):
        samplers.timesteps(PUBLISHED, **arguments)


def test_samplers_share_a_signature():
    """Samplers are interchangeable; those with fresh noise also take `eta`, its share."""

    def parameters(sampler):
        return [p for p in inspect.signature(sampler).parameters.values() if p.name != "eta"]

    first, *others = SAMPLERS.values()
    assert all(parameters(sampler) == parameters(first) for sampler in others)
