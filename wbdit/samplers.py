"""Samplers: flat functions from noise to cells.

Every step of every sampler is ``a x + b out + c previous + d earlier + e z``: the model's output, whatever it predicts,
and its earlier estimates of x_0 enter linearly, and the factors are host scalars worked out from the schedule
(:func:`wbdit.ops.sampler_step`). Here stand the factors of the published samplers, in :mod:`wbdit.multistep` those of
the solvers for few steps; :mod:`wbdit.walk` applies them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from wbdit.grids import GRIDS, Grid, timesteps
from wbdit.multistep import dpmpp_2m, sde_dpmpp_2m, unipc
from wbdit.schedule import NoiseSchedule, Prediction
from wbdit.walk import Callback, Model, Noise, PhiloxNoise, Update, walk

__all__ = [
    "BY_NAME",
    "GRIDS",
    "Callback",
    "Choice",
    "Grid",
    "Guided",
    "Model",
    "Name",
    "Noise",
    "PhiloxNoise",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "sde_dpmpp_2m",
    "timesteps",
    "unipc",
]


def ddpm(
    model: Model,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Iterable[float] | None = None,
    *,
    stop: float = 0,
    clamp_min: float | None = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample by ancestral steps with the variance ``sigma^2 = beta`` (Ho et al. 2020), the published sampler.

    Parameters
    ----------
    model
        Called as ``model(x, t)`` with ``x (B, C, G)`` and ``t (B,)``, int64 where all timesteps are whole numbers and
        floating elsewhere; its attribute ``prediction`` says what it answers ("epsilon" where it has none).
    x_T
        Gaussian noise ``(B, C, G)``.
    schedule
        The noise schedule the model was trained with.
    timesteps
        Where the model is called, falling, all in [1, T); T - 1 ... 1 by default. See :func:`timesteps`. With gaps,
        beta is that of the whole gap.
    stop
        The timestep that the last step lands on, below the others. At 0 it gives cells, without fresh noise; above, a
        sample of x at that level of noise, by a step like the others.
    clamp_min
        Lower bound of the cells: 0 for expression values, as published; None for centred data. Not applied where
        `stop` is above 0.
    noise
        Noise of each step but a last one to 0: tensors ``(steps - 1, B, C, G)``, or a function of the step's number.
        Fresh draws by default.
    callback
        Called as ``callback(step, t, x)`` after each step.

    Returns
    -------
    Cells ``(B, C, G)``, or ``x`` at `stop`.

    Raises
    ------
    ValueError
        If the timesteps do not fall or leave the schedule.
    """
    prediction: Prediction = getattr(model, "prediction", "epsilon")

    def plan(path: Sequence[float], step: int) -> Update:
        t, after = path[step : step + 2]
        (alpha, sigma), (alpha_after, sigma_after) = schedule.levels(t), schedule.levels(after)
        ratio = alpha / alpha_after
        beta = 1 - ratio**2
        # the posterior's mean, as a combination of x_0 and x_t
        on_clean, on_x = alpha_after * beta / sigma**2, ratio * sigma_after**2 / sigma**2
        clean = schedule.clean(prediction, t)
        return Update(on_x + on_clean * clean.x, on_clean * clean.out, e=math.sqrt(beta))

    return walk(plan, model, x_T, schedule, timesteps, stop=stop, clamp_min=clamp_min, noise=noise, callback=callback)


def ddim(
    model: Model,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Iterable[float] | None = None,
    *,
    eta: float = 1.0,
    stop: float = 0,
    clamp_min: float | None = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample by DDIM (Song et al. 2021): from the ODE's step (`eta` 0) to the ancestral one (`eta` 1, as published).

    Parameters
    ----------
    eta
        Share of fresh noise in each step.
    model, x_T, schedule, timesteps, stop, clamp_min, noise, callback
        As in :func:`ddpm`.

    Returns
    -------
    Cells ``(B, C, G)``, or ``x`` at `stop`.
    """
    prediction: Prediction = getattr(model, "prediction", "epsilon")

    def plan(path: Sequence[float], step: int) -> Update:
        t, after = path[step : step + 2]
        (alpha, sigma), (alpha_after, sigma_after) = schedule.levels(t), schedule.levels(after)
        fresh = eta * sigma_after / sigma * math.sqrt(1 - (alpha / alpha_after) ** 2)
        kept = math.sqrt(max(sigma_after**2 - fresh**2, 0.0))
        clean, eps = schedule.clean(prediction, t), schedule.noise(prediction, t)
        return Update(alpha_after * clean.x + kept * eps.x, alpha_after * clean.out + kept * eps.out, e=fresh)

    return walk(plan, model, x_T, schedule, timesteps, stop=stop, clamp_min=clamp_min, noise=noise, callback=callback)


class Guided:
    """A conditional model at fixed labels, with classifier-free guidance (Ho and Salimans 2022).

    Answers ``null + weight * (conditional - null)``; a weight of 1 is the conditional model itself, at one call.

    Parameters
    ----------
    model
        A :class:`wbdit.model.Denoiser` with labels.
    y
        Labels ``(B,)`` int64.
    weight
        Guidance weight.
    """

    def __init__(self, model: Callable[..., Tensor], y: Tensor, weight: float = 1.0) -> None:
        self.model = model
        self.y = y
        self.weight = weight
        self.prediction: Prediction = getattr(model, "prediction", "epsilon")

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Answer for noised cells ``(B, C, G)`` at timesteps ``(B,)``."""
        if self.weight == 1:
            return self.model(x, t, self.y)
        null = torch.full_like(self.y, self.model.num_classes)  # type: ignore[attr-defined]
        twice = t[:1].expand(2 * len(t)) if t.stride(0) == 0 else torch.cat([t, t])
        both = self.model(torch.cat([x, x]), twice, torch.cat([self.y, null]))
        conditional, unconditional = both.chunk(2)
        return torch.lerp(unconditional, conditional, self.weight)


class Choice(NamedTuple):
    """A sampler with what it takes where nothing else is asked for; no `steps` means every timestep."""

    sample: Callable[..., Tensor]
    steps: int | None
    grid: Grid


Name = Literal["ddim", "ddpm", "unipc", "dpmpp", "sde-dpmpp"]

# ddim and ddpm go their published way; the others' numbers are first guesses, not yet measured on trained models
BY_NAME: dict[Name, Choice] = {
    "ddim": Choice(ddim, 50, "uniform"),
    "ddpm": Choice(ddpm, None, "uniform"),
    "unipc": Choice(unipc, 15, "logsnr"),
    "dpmpp": Choice(dpmpp_2m, 20, "logsnr"),
    "sde-dpmpp": Choice(sde_dpmpp_2m, 20, "logsnr"),
}
