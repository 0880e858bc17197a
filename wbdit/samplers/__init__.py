"""Samplers: flat functions from noise to cells.

Every step of every sampler is ``a x + b out + c previous + d earlier + e z``: the model's output, whatever it predicts,
and its earlier estimates of x_0 enter linearly, and the factors are host scalars worked out from the schedule
(:func:`wbdit.ops.sampler_step`). Here stand the factors of the published samplers, in :mod:`wbdit.samplers.multistep`
those of the solvers for few steps; :mod:`wbdit.samplers.loop` applies them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from wbdit.samplers.loop import Callback, Model, Noise, PhiloxNoise, Update, walk
from wbdit.samplers.multistep import dpmpp_2m, sde_dpmpp_2m, unipc
from wbdit.samplers.timesteps import GRIDS, Grid, timesteps
from wbdit.schedule import NoiseSchedule, Prediction

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
    """A conditional model at fixed labels, with classifier-free guidance.

    With one weight w for all labels it answers ``null + w (joint - null)`` (Ho and Salimans 2022): `joint` is the model
    given every label, `null` given none. With a weight for each column of labels, and f(S) the model given the columns
    S alone::

        f() + w_1 (f(1) - f()) + w_2 (f(1, 2) - f(1)) + ... + w_C (f(1 ... C) - f(1 ... C-1))

    the columns in rising order of ``|w - 1|``. This is the score of ``p(x) p(y_1 | x)^w_1 p(y_2 | x, y_1)^w_2 ...``:
    composed guidance (Liu et al. 2022) in the chain that Brooks et al. (2023, InstructPix2Pix, equation 3) use for two
    conditions. ``null + sum of w_c (f(c) - null)``, as Liu et al. and CFGen (Palma et al. 2024) have it, takes labels
    to be independent given the cell, and at weights of 1 is not the model. Here weights of 1 are the model itself, at
    one call; a weight w on one column and 1 on the others is ``joint + (w - 1) (joint - joint without that column)``,
    and one of 0 leaves the column open; columns of one weight are guided as one. The terms whose factor is not zero
    are computed as one batch.

    Parameters
    ----------
    model
        A :class:`wbdit.nn.denoiser.Denoiser` with labels.
    y
        Labels ``(B,)`` or ``(B, C)`` int64.
    weight
        Guidance weight, or one for each column.
    toward
        Labels of `y`'s shape that the cells lie toward: the model is conditioned on
        ``(1 - mix) embedding(y) + mix embedding(toward)``, and on `y` or `toward` themselves at the ends.
    mix
        How far, 0 to 1.

    Raises
    ------
    ValueError
        If there is not one weight for each column.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        y: Tensor,
        weight: float | Sequence[float] = 1.0,
        *,
        toward: Tensor | None = None,
        mix: float = 0.0,
    ) -> None:
        self.model = model
        self.prediction: Prediction = getattr(model, "prediction", "epsilon")
        columns = 1 if y.ndim == 1 else y.shape[1]
        weights = [weight] * columns if isinstance(weight, float | int) else list(weight)
        if len(weights) != columns:
            raise ValueError(f"{len(weights)} guidance weights for {columns} columns of labels")
        terms = _guidance_terms(weights)
        self._factors = [factor for factor, _ in terms]

        def given(labels: Tensor) -> Tensor:
            return torch.cat([_without(labels, dropped, model.num_classes) for _, dropped in terms])  # type: ignore[attr-defined]

        if toward is None or mix == 0:
            self._y = given(y)
        elif mix == 1:
            self._y = given(toward)
        else:
            own, other = (model.embed_labels(given(labels)).detach() for labels in (y, toward))  # type: ignore[attr-defined]
            self._y = torch.lerp(own, other, mix)

    @property
    def conditions(self) -> Tensor:
        """What the model is conditioned on where it is given every label, as vectors: ``(B, ...)``."""
        fullest = self._y[: len(self._y) // len(self._factors)]
        return fullest if fullest.is_floating_point() else self.model.embed_labels(fullest)  # type: ignore[attr-defined]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Answer for noised cells ``(B, C, G)`` at timesteps ``(B,)``."""
        n = len(self._factors)
        if n == 1:
            return self.model(x, t, self._y)
        times = t[:1].expand(n * len(t)) if t.stride(0) == 0 else t.repeat(n)
        most, *others, least = self.model(torch.cat([x] * n), times, self._y).chunk(n)
        out = torch.lerp(least, most, self._factors[0])  # the factors' sum is 1
        for factor, answer in zip(self._factors[1:-1], others, strict=True):
            out = out.add(answer - least, alpha=factor)
        return out


def _guidance_terms(weights: Sequence[float]) -> list[tuple[float, list[int]]]:
    """Return the factor of each term of :class:`Guided` that has one, and the columns it drops, fewest first."""
    order = sorted(range(len(weights)), key=lambda column: abs(weights[column] - 1))
    chain = pairwise([1.0, *(weights[column] for column in order), 0.0])
    terms = [(inner - outer, order[given:]) for given, (inner, outer) in enumerate(chain)]
    return [(factor, dropped) for factor, dropped in reversed(terms) if factor != 0]


def _without(y: Tensor, columns: Sequence[int], num_classes: int | Sequence[int]) -> Tensor:
    """Return labels with those of some columns replaced by null."""
    nulls = [num_classes] if isinstance(num_classes, int) else num_classes
    kept = y.reshape(len(y), len(nulls)).clone()
    for column in columns:
        kept[:, column] = nulls[column]
    return kept.view_as(y)


class Choice(NamedTuple):
    """A sampler with what it takes where nothing else is asked for; no `steps` means every timestep."""

    sample: Callable[..., Tensor]
    steps: int | None
    grid: Grid


Name = Literal["ddim", "ddpm", "unipc", "dpmpp", "sde-dpmpp"]

# for walks to x_0: ddim and ddpm go their published way, the others' numbers are first guesses, not measured on trained
# models; where counts are drawn on the way, wbdit.generator has measured ones of its own
BY_NAME: dict[Name, Choice] = {
    "ddim": Choice(ddim, 50, "uniform"),
    "ddpm": Choice(ddpm, None, "uniform"),
    "unipc": Choice(unipc, 15, "logsnr"),
    "dpmpp": Choice(dpmpp_2m, 20, "logsnr"),
    "sde-dpmpp": Choice(sde_dpmpp_2m, 20, "logsnr"),
}
