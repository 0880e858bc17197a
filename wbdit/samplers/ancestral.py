"""The published samplers: ancestral steps (DDPM), and DDIM between them and the ODE's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from wbdit.samplers.loop import Callback, Model, Update, sampling_loop
from wbdit.samplers.noise import Noise
from wbdit.schedule import NoiseSchedule, Prediction


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
        Lower bound of the cells: 0 for expression values, as published; None for centered data. Not applied where
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

    return sampling_loop(
        plan, model, x_T, schedule, timesteps, stop=stop, clamp_min=clamp_min, noise=noise, callback=callback
    )


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

    return sampling_loop(
        plan, model, x_T, schedule, timesteps, stop=stop, clamp_min=clamp_min, noise=noise, callback=callback
    )
