"""Where a sampler calls its model: spacings of timesteps."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from wbdit.schedule import NoiseSchedule

Spacing = Literal["uniform", "logsnr", "sqrt"]
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)

# Bounds of ln(alpha / sigma) that "logsnr" spreads its calls over: "cosine" has it infinite at its ends. The published
# schedule begins at -5.1; below that x_t tells next to nothing of x_0, and calls there would be wasted. Above 5 the
# noise left is under 0.7 % of a unit of x, which the jump to x_0 removes as well as any further calls.
LOG_SNR_BOUNDS = (-5.0, 5.0)


def timesteps(schedule: NoiseSchedule, steps: int, spacing: Spacing = "uniform", *, stop: float = 0.0) -> list[float]:
    """Return the timesteps, falling from T - 1, at which a sampler calls its model.

    Parameters
    ----------
    schedule
        The noise schedule.
    steps
        Number of calls.
    spacing
        "uniform": even in t, rounded to whole timesteps. "sqrt": even in sqrt(t), denser where little noise is left.
        "logsnr": even in ``ln(alpha / sigma)`` (Lu et al. 2022, DPM-Solver), as far as it lies within -5 and 5. The
        last two are fractional.
    stop
        Where sampling is to end: at 0 (a jump from the last call, which is at t = 1 or a little above), or at a
        timestep of 1 or more, which is then the point after the last call.

    Raises
    ------
    ValueError
        If the spacing is unknown, `stop` is no such timestep, or there are fewer than one or more than T - 1 - `stop`
        steps.
    """
    highest = schedule.noise_steps - 1
    if spacing not in SPACINGS:
        raise ValueError(f"no spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
    if stop != 0 and not 1 <= stop < highest:
        raise ValueError(f"stop must be 0, or at least 1 and less than {highest}, not {stop}")
    most = math.floor(highest - stop)
    if not 1 <= steps <= most:
        raise ValueError(f"steps must be between 1 and {most}, not {steps}")
    first, last = (_coordinate(schedule, spacing, t) for t in (highest, stop or 1))
    points = torch.linspace(first, last, steps + (stop > 0), dtype=torch.float64)[:steps].tolist()
    # sampling begins in pure noise, at T - 1, whatever the bounds of its spacing
    return [highest, *(max(_timestep(schedule, spacing, point), 1) for point in points[1:])]


def _coordinate(schedule: NoiseSchedule, spacing: Spacing, t: float) -> float:
    """Return what the spacing is even in."""
    if spacing == "uniform":
        return t
    if spacing == "sqrt":
        return math.sqrt(t)
    lowest, highest = LOG_SNR_BOUNDS
    return min(max(schedule.log_snr(t), lowest), highest)


def _timestep(schedule: NoiseSchedule, spacing: Spacing, coordinate: float) -> float:
    """Invert :func:`_coordinate`."""
    if spacing == "uniform":
        return round(coordinate)
    return coordinate**2 if spacing == "sqrt" else schedule.timestep(coordinate)
