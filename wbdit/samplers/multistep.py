"""Few-step solvers: second order from one call a step, by the estimates of x_0 that earlier calls gave.

They go by lambda = ln(alpha / sigma). Below, h is a step's length in it and B = e^-h - 1; m is the estimate of x_0 at
the step's start, m_ the one before, m' the one at its end; r is the length of the step before over h. From zero SNR a
step is infinitely long and its order one; the next step finds r infinite, and extrapolates nothing from there.

What is kept from step to step are estimates of x_0: one tensor for DPM-Solver++, two for UniPC, whose corrector is
folded into the next predictor, so that no corrected x is ever written. That takes two passes a step, the update and the
estimate, and one where the model predicts x_0. Keeping x and the raw output instead would spare DPM-Solver++ the second
pass and cost it a second tensor; UniPC would have to keep four.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from wbdit.samplers.loop import Callback, Model, Update, sampling_loop
from wbdit.samplers.noise import Noise
from wbdit.schedule import NoiseSchedule, Prediction


def dpmpp_2m(
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
    """Sample by DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): second order, deterministic, one call a step.

    A last step to 0 jumps to the estimate of x_0, which is of first order.

    Parameters
    ----------
    noise
        Not used: it is there so that all samplers are called alike.
    model, x_T, schedule, timesteps, stop, clamp_min, callback
        As in :func:`wbdit.samplers.ddpm`.

    Returns
    -------
    Cells ``(B, C, G)``, or ``x`` at `stop`.
    """
    return sde_dpmpp_2m(
        model, x_T, schedule, timesteps, eta=0.0, stop=stop, clamp_min=clamp_min, noise=noise, callback=callback
    )


def sde_dpmpp_2m(
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
    """Sample by SDE-DPM-Solver++ 2M (Lu et al. 2022, in its midpoint form): :func:`dpmpp_2m` with fresh noise.

    Its first step is that of :func:`wbdit.samplers.ddim` with `eta` 1. A last step to 0 jumps to the estimate of x_0.

    Parameters
    ----------
    eta
        Share of fresh noise: 1 for the reverse SDE, 0 for the ODE; between them as in k-diffusion.
    model, x_T, schedule, timesteps, stop, clamp_min, noise, callback
        As in :func:`wbdit.samplers.ddpm`.

    Returns
    -------
    Cells ``(B, C, G)``, or ``x`` at `stop`.
    """
    prediction: Prediction = getattr(model, "prediction", "epsilon")

    def plan(path: Sequence[float], step: int) -> Update:
        clean = schedule.clean(prediction, path[step])
        if path[step + 1] == 0:
            return Update(*clean)
        alpha, sigma = schedule.levels(path[step + 1])
        shrink, decay = _shrink(schedule, path, step)
        slope = 0.5 / _ratio(schedule, path, step)
        gain = alpha * (1 - decay ** (1 + eta))
        on_x, on_clean = shrink * decay**eta, gain * (1 + slope)
        fresh = sigma * math.sqrt(1 - decay ** (2 * eta))
        return Update(on_x + on_clean * clean.x, on_clean * clean.out, c=-gain * slope, e=fresh)

    return sampling_loop(
        plan,
        model,
        x_T,
        schedule,
        timesteps,
        stop=stop,
        clamp_min=clamp_min,
        noise=noise,
        callback=callback,
        estimates=1,
    )


def unipc(
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
    """Sample by UniPC-2 with B(h) = e^h - 1 (Zhao et al. 2023, "bh2"): deterministic, one call a step.

    Each step predicts as :func:`dpmpp_2m` does; the next call's answer then also corrects the x it was called with. A
    last step to 0 jumps to the estimate of x_0. What the callback sees is predicted, not yet corrected.

    Parameters
    ----------
    noise
        Not used: it is there so that all samplers are called alike.
    model, x_T, schedule, timesteps, stop, clamp_min, callback
        As in :func:`wbdit.samplers.ddpm`.

    Returns
    -------
    Cells ``(B, C, G)``, or ``x`` at `stop`.
    """
    prediction: Prediction = getattr(model, "prediction", "epsilon")

    def plan(path: Sequence[float], step: int) -> Update:
        clean = schedule.clean(prediction, path[step])
        if path[step + 1] == 0:
            return Update(*clean)
        shrink, decay = _shrink(schedule, path, step)
        gain = schedule.levels(path[step + 1])[0] * (1 - decay)
        slope = 0.5 / _ratio(schedule, path, step)
        on_clean, on_previous, on_earlier = gain * (1 + slope), -gain * slope, 0.0
        if step > 0:
            # x is corrected by what it lacked, before it is carried on
            now, previous, earlier = _correction(schedule, path, step - 1)
            on_clean += shrink * now
            on_previous += shrink * previous
            on_earlier = shrink * earlier
        return Update(shrink + on_clean * clean.x, on_clean * clean.out, c=on_previous, d=on_earlier)

    return sampling_loop(
        plan,
        model,
        x_T,
        schedule,
        timesteps,
        stop=stop,
        clamp_min=clamp_min,
        noise=noise,
        callback=callback,
        estimates=2,
    )


def _shrink(schedule: NoiseSchedule, path: Sequence[float], step: int) -> tuple[float, float]:
    """Return ``sigma'/sigma`` and ``e^-h`` of a step of h in lambda."""
    (alpha, sigma), (alpha_after, sigma_after) = map(schedule.levels, path[step : step + 2])
    return sigma_after / sigma, alpha * sigma_after / (sigma * alpha_after)


def _ratio(schedule: NoiseSchedule, path: Sequence[float], step: int) -> float:
    """Return r, the length in lambda of the step before over that of this one; infinite where there was none."""
    if step == 0:
        return math.inf
    before, here, after = map(schedule.log_snr, path[step - 1 : step + 2])
    return (here - before) / (after - here)


def _correction(schedule: NoiseSchedule, path: Sequence[float], step: int) -> tuple[float, float, float]:
    """Return UniPC's corrected less its predicted x after a step.

    As factors on the estimates of x_0 from there, from the step's start and from the one before. With m', m and m_ for
    these and B = e^-h - 1, the corrector differs from the predictor by
    ``-alpha' B [rho2 (m' - m) + (rho1 - 1/2)/r (m - m_)]``.
    """
    decay, ratio = _shrink(schedule, path, step)[1], _ratio(schedule, path, step)
    gain = schedule.levels(path[step + 1])[0] * (1 - decay)
    if math.isinf(ratio):
        on_new, on_old = 0.5, 0.0  # UniC-1
    else:
        H, B = math.log(decay), decay - 1
        phi = B / H - 1
        b1, b2 = phi / B, 2 * (phi / H - 0.5) / B
        rho1 = (b1 - b2) / (1 + ratio)
        on_new, on_old = b1 - rho1, (rho1 - 0.5) / ratio
    return gain * on_new, gain * (on_old - on_new), -gain * on_old
