"""The published samplers: DDPM (ancestral steps), and DDIM, which ranges from ancestral to ODE steps."""

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
    """Sample by DDPM, the published sampler: ancestral steps with the variance ``sigma^2 = beta`` (Ho et al. 2020).

    Parameters
    ----------
    model
        Called as ``model(x, t)`` with ``x (B, C, G)`` and ``t (B,)``, int64 if all timesteps are whole numbers and
        floating otherwise. Its attribute ``prediction`` names the predicted quantity; "epsilon" if it is missing.
    x_T
        Gaussian noise ``(B, C, G)``.
    schedule
        The noise schedule the model was trained with.
    timesteps
        Timesteps of the model calls, decreasing, in [1, T) and above `stop`; see :func:`timesteps`. All whole
        timesteps by default. Where timesteps are skipped, beta spans the whole gap.
    stop
        Final timestep. At 0, the last step returns cells, without fresh noise. Above 0, the last step is like the
        others and returns a sample of x at that noise level.
    clamp_min
        Lower bound of the cells: 0 for expression values, as published; None for centered data. Ignored if `stop` is
        above 0.
    noise
        Noise of each step except a last step to 0: tensors ``(steps, B, C, G)``, or ``(steps - 1, B, C, G)`` if `stop`
        is 0; or a function of the step's index, such as :class:`PhiloxNoise`. Fresh draws by default.
    callback
        Called as ``callback(step, t, x)`` after each step.

    Returns
    -------
    Cells ``(B, C, G)``, or ``x`` at `stop`.

    Raises
    ------
    ValueError
        If the timesteps do not decrease, or lie outside the schedule or below `stop`.

    Examples
    --------
    >>> model = wbdit.WBDiT(input_size=50, hidden_size=32, num_heads=4)
    >>> schedule = wbdit.NoiseSchedule()
    >>> path = wbdit.samplers.timesteps(schedule, 10)
    >>> wbdit.samplers.ddpm(model, torch.randn(3, 1, 50), schedule, path).shape
    torch.Size([3, 1, 50])
    """
    prediction: Prediction = getattr(model, "prediction", "epsilon")

    def plan(path: Sequence[float], step: int) -> Update:
        t, after = path[step : step + 2]
        (alpha, sigma), (alpha_after, sigma_after) = schedule.levels(t), schedule.levels(after)
        ratio = alpha / alpha_after
        beta = 1 - ratio**2
        # the posterior mean as a combination of x_0 and x_t
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
    """Sample by DDIM (Song et al. 2021), deterministic at `eta` 0 and ancestral at `eta` 1, as published.

    Parameters
    ----------
    eta
        Share of fresh noise per step: 0 for the ODE step, 1 for the ancestral step.
    model, x_T, schedule, timesteps, stop, clamp_min, noise, callback
        As in :func:`ddpm`.

    Returns
    -------
    Cells ``(B, C, G)``, or ``x`` at `stop`.

    Examples
    --------
    >>> model = wbdit.WBDiT(input_size=50, hidden_size=32, num_heads=4)
    >>> schedule = wbdit.NoiseSchedule()
    >>> path = wbdit.samplers.timesteps(schedule, 10)
    >>> wbdit.samplers.ddim(model, torch.randn(3, 1, 50), schedule, path, eta=0.0).shape
    torch.Size([3, 1, 50])
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
