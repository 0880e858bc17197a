"""Few-step solvers: second order with one model call per step, using the x_0 estimates of earlier calls.

Steps are measured in lambda = ln(alpha / sigma): h is the length of a step, and B = e^-h - 1. The estimates of x_0 are
m at the start of the step, m' at its end, and m_ at the start of the previous step. The ratio r is the length of the
previous step divided by h. A step from zero SNR is infinitely long and of first order. The step after it has an
infinite r, so it does not extrapolate.

The solvers keep x_0 estimates between steps: one tensor for DPM-Solver++, two for UniPC. UniPC's corrector is folded
into the next predictor, so no corrected x is written. Each step takes two passes over memory, the update and the
estimate, or one if the model predicts x_0. Keeping x and the raw output instead would save DPM-Solver++ the second pass
but cost a second tensor; UniPC would need four.
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
    """Sample by DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): second order, deterministic, one call per step.

    A last step to 0 jumps to the x_0 estimate, which is of first order.

    Parameters
    ----------
    noise
        Unused; accepted so that all samplers share one signature.
    model, x_T, schedule, timesteps, stop, clamp_min, callback
        As in :func:`wbdit.samplers.ddpm`.

    Returns
    -------
    Cells ``(B, C, G)``, or ``x`` at `stop`.

    Examples
    --------
    >>> model = wbdit.WBDiT(input_size=50, hidden_size=32, num_heads=4)
    >>> schedule = wbdit.NoiseSchedule()
    >>> path = wbdit.samplers.timesteps(schedule, 10, "logsnr")
    >>> wbdit.samplers.dpmpp_2m(model, torch.randn(3, 1, 50), schedule, path).shape
    torch.Size([3, 1, 50])
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
    """Sample by SDE-DPM-Solver++ 2M (Lu et al. 2022, midpoint form): :func:`dpmpp_2m` with fresh noise.

    The first step equals that of :func:`wbdit.samplers.ddim` at `eta` 1. A last step to 0 jumps to the x_0 estimate.

    Parameters
    ----------
    eta
        Share of fresh noise: 1 for the reverse SDE, 0 for the ODE, values in between as in k-diffusion.
    model, x_T, schedule, timesteps, stop, clamp_min, noise, callback
        As in :func:`wbdit.samplers.ddpm`.

    Returns
    -------
    Cells ``(B, C, G)``, or ``x`` at `stop`.

    Examples
    --------
    >>> model = wbdit.WBDiT(input_size=50, hidden_size=32, num_heads=4)
    >>> schedule = wbdit.NoiseSchedule()
    >>> path = wbdit.samplers.timesteps(schedule, 10, "logsnr")
    >>> wbdit.samplers.sde_dpmpp_2m(model, torch.randn(3, 1, 50), schedule, path).shape
    torch.Size([3, 1, 50])
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
    """Sample by UniPC-2 with B(h) = e^h - 1 (Zhao et al. 2023, "bh2"): deterministic, one call per step.

    Each step predicts as :func:`dpmpp_2m` does. The model's output at the predicted x then also corrects that x. A last
    step to 0 jumps to the x_0 estimate. The callback receives the predicted x, before its correction.

    Parameters
    ----------
    noise
        Unused; accepted so that all samplers share one signature.
    model, x_T, schedule, timesteps, stop, clamp_min, callback
        As in :func:`wbdit.samplers.ddpm`.

    Returns
    -------
    Cells ``(B, C, G)``, or ``x`` at `stop`.

    Examples
    --------
    >>> model = wbdit.WBDiT(input_size=50, hidden_size=32, num_heads=4)
    >>> schedule = wbdit.NoiseSchedule()
    >>> path = wbdit.samplers.timesteps(schedule, 10, "logsnr")
    >>> wbdit.samplers.unipc(model, torch.randn(3, 1, 50), schedule, path).shape
    torch.Size([3, 1, 50])
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
            # the correction of x, carried on by the factor on x
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
    """Return ``sigma'/sigma`` and ``e^-h`` for a step of length h in lambda."""
    (alpha, sigma), (alpha_after, sigma_after) = map(schedule.levels, path[step : step + 2])
    return sigma_after / sigma, alpha * sigma_after / (sigma * alpha_after)


def _ratio(schedule: NoiseSchedule, path: Sequence[float], step: int) -> float:
    """Return r, the length in lambda of the previous step over that of this step; infinite for the first step."""
    if step == 0:
        return math.inf
    before, here, after = map(schedule.log_snr, path[step - 1 : step + 2])
    return (here - before) / (after - here)


def _correction(schedule: NoiseSchedule, path: Sequence[float], step: int) -> tuple[float, float, float]:
    """Return UniPC's corrected minus its predicted x after a step, as factors on the estimates m', m and m_.

    With the module's notation, the difference is ``-alpha' B [rho2 (m' - m) + (rho1 - 1/2)/r (m - m_)]``.
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
