"""Samplers: flat functions from noise to cells.

Every step of every sampler is ``a x + b out + e z``: the model's output, whatever it predicts, enters linearly, and
the factors are host scalars worked out from the schedule (:func:`wbdit.ops.sampler_step`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from wbdit import ops
from wbdit.schedule import NoiseSchedule, Prediction
from wbdit.trace import span

Model = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor] | Sequence[Tensor] | Tensor
Callback = Callable[[int, int, Tensor], object]


@torch.no_grad()
def ddpm(
    model: Model,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Iterable[int] | None = None,
    *,
    clamp_min: float | None = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample by ancestral steps with the variance ``sigma^2 = beta`` (Ho et al. 2020), the published sampler.

    Parameters
    ----------
    model
        Called as ``model(x, t)`` with ``x (B, C, G)`` and ``t (B,)`` int64; its attribute ``prediction`` says what it
        answers ("epsilon" where it has none).
    x_T
        Gaussian noise ``(B, C, G)``.
    schedule
        The noise schedule the model was trained with.
    timesteps
        Where the model is called, falling, all in [1, T); T - 1 ... 1 by default. The last step lands on t = 0. With
        gaps, beta is that of the whole gap.
    clamp_min
        Lower bound of the result: 0 for expression values, as published; None for centred data.
    noise
        Noise of each step but the last: tensors ``(steps - 1, B, C, G)``, or a function of the step's number. Fresh
        draws by default.
    callback
        Called as ``callback(step, t, x)`` after each step.

    Returns
    -------
    Cells ``(B, C, G)``.

    Raises
    ------
    ValueError
        If the timesteps do not fall or leave the schedule.
    """
    prediction: Prediction = getattr(model, "prediction", "epsilon")

    def step(t: int, prev: int) -> tuple[float, float, float]:
        (alpha, sigma), (alpha_prev, sigma_prev) = schedule.levels(t), schedule.levels(prev)
        ratio = alpha / alpha_prev
        beta = 1 - ratio**2
        # the posterior's mean, as a combination of x_0 and x_t
        on_clean, on_x = alpha_prev * beta / sigma**2, ratio * sigma_prev**2 / sigma**2
        clean = schedule.clean(prediction, t)
        return on_x + on_clean * clean.x, on_clean * clean.out, math.sqrt(beta)

    return _run(step, model, x_T, schedule, timesteps, clamp_min, noise, callback)


@torch.no_grad()
def ddim(
    model: Model,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Iterable[int] | None = None,
    *,
    eta: float = 1.0,
    clamp_min: float | None = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample by DDIM (Song et al. 2021): from the ODE's step (`eta` 0) to the ancestral one (`eta` 1, as published).

    Parameters
    ----------
    eta
        Share of fresh noise in each step.
    model, x_T, schedule, timesteps, clamp_min, noise, callback
        As in :func:`ddpm`.

    Returns
    -------
    Cells ``(B, C, G)``.
    """
    prediction: Prediction = getattr(model, "prediction", "epsilon")

    def step(t: int, prev: int) -> tuple[float, float, float]:
        (alpha, sigma), (alpha_prev, sigma_prev) = schedule.levels(t), schedule.levels(prev)
        fresh = eta * sigma_prev / sigma * math.sqrt(1 - (alpha / alpha_prev) ** 2)
        kept = math.sqrt(max(sigma_prev**2 - fresh**2, 0.0))
        clean, eps = schedule.clean(prediction, t), schedule.noise(prediction, t)
        return alpha_prev * clean.x + kept * eps.x, alpha_prev * clean.out + kept * eps.out, fresh

    return _run(step, model, x_T, schedule, timesteps, clamp_min, noise, callback)


def spaced_timesteps(schedule: NoiseSchedule, steps: int) -> list[int]:
    """Return `steps` timesteps evenly spaced from T - 1 down to 1.

    Raises
    ------
    ValueError
        If there are fewer than one or more than T - 1 steps.
    """
    highest = schedule.noise_steps - 1
    if not 1 <= steps <= highest:
        raise ValueError(f"steps must be between 1 and {highest}, not {steps}")
    return torch.linspace(highest, 1, steps, dtype=torch.float64).round().long().tolist()


class PhiloxNoise:
    """A source of noise in which a sample's draws depend on the seed and the sample's index alone.

    A sampler given one draws inside its update (:func:`wbdit.ops.sampler_step`); called, it writes the noise out.

    Parameters
    ----------
    seed
        64 bits.
    samples
        Indices of the samples in the batch ``(B,)``, int64.
    shape
        Shape of one sample ``(C, G)``.
    """

    def __init__(self, seed: int, samples: Tensor, shape: Sequence[int]) -> None:
        self.seed = seed
        self.samples = samples
        self.shape = tuple(shape)

    def __call__(self, step: int) -> Tensor:
        """Return the noise ``(B, C, G)`` fp32 of a step: 0 for the first update, -1 for the starting noise."""
        return ops.normal(self.seed, self.samples, step + 1, math.prod(self.shape)).unflatten(1, self.shape)

    def address(self, step: int) -> dict[str, Any]:
        """Return the arguments by which :func:`wbdit.ops.sampler_step` draws the same noise."""
        return {"samples": self.samples, "seed": self.seed, "step": step + 1}


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
        A :class:`wbdit.model.Denoiser` with labels.
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


def _run(
    step: Callable[[int, int], tuple[float, float, float]],
    model: Model,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Iterable[int] | None,
    clamp_min: float | None,
    noise: Noise | None,
    callback: Callback | None,
) -> Tensor:
    """Walk down the timesteps, the factors of each update given by ``step(t, next lower t)``."""
    highest = schedule.noise_steps - 1
    path = list(range(highest, 0, -1)) if timesteps is None else [int(t) for t in timesteps]
    if not path or path[0] > highest or path[-1] < 1 or any(a <= b for a, b in pairwise(path)):
        raise ValueError(f"timesteps must fall within {highest} ... 1")
    for i, (t, prev) in enumerate(zip(path, [*path[1:], 0], strict=True)):
        out = model(
            x, torch.full((1,), t, device=x.device).expand(x.shape[0])
        )  # a view: one number for all, as it says
        a, b, e = step(t, prev)
        last = prev == 0
        drawn = {} if last or e == 0 else _noise(noise, i, x)
        with span("sampler step"):
            x = ops.sampler_step(x, out, a=a, b=b, e=e, clamp_min=clamp_min if last else None, **drawn)
        if callback is not None:
            callback(i, t, x)
    return x


def _noise(noise: Noise | None, step: int, x: Tensor) -> dict[str, Any]:
    """Return the arguments of :func:`wbdit.ops.sampler_step` that bring a step's noise."""
    if isinstance(noise, PhiloxNoise):
        return noise.address(step)
    if noise is None:
        return {"noise": torch.randn_like(x)}
    return {"noise": (noise(step) if callable(noise) else noise[step]).to(x)}
