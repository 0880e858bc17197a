"""Spacings of the timesteps at which a sampler calls its model."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from wbdit.schedule import NoiseSchedule

Spacing = Literal["uniform", "logsnr", "sqrt"]
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)

# Bounds of ln(alpha / sigma) for "logsnr", because it is infinite at the ends of a "cosine" schedule. The published
# schedule begins at -5.1; below that, x_t carries almost no information about x_0 and calls would be wasted. Above 5,
# the remaining noise is under 0.7 % of a unit of x, and the jump to x_0 removes it as well as further calls would.
LOG_SNR_BOUNDS = (-5.0, 5.0)


def timesteps(
    schedule: NoiseSchedule, steps: int, spacing: Spacing = "uniform", *, stop: float = 0.0, start: float | None = None
) -> list[float]:
    """Return the timesteps at which a sampler calls its model, decreasing from T - 1.

    Parameters
    ----------
    schedule
        The noise schedule.
    steps
        Number of calls.
    spacing
        "uniform": even in t, rounded to whole timesteps. "sqrt": even in sqrt(t), denser at low noise.
        "logsnr": even in ``ln(alpha / sigma)`` (Lu et al. 2022, DPM-Solver), limited to [-5, 5]. "sqrt" and "logsnr"
        give fractional timesteps.
    stop
        Final timestep of sampling. At 0, sampling ends with a jump from the last call, at t = 1 or slightly above. A
        timestep of 1 or more is the point after the last call in the spacing.
    start
        Timestep of the first call, T - 1 by default.

    Returns
    -------
    `steps` timesteps in [1, `start`], without `stop`.

    Raises
    ------
    ValueError
        If the spacing is unknown, if `start` is not in [1, T - 1], if `stop` is neither 0 nor in [1, `start`), or if
        `steps` is not between 1 and `start` - `stop`.

    Examples
    --------
    >>> schedule = wbdit.NoiseSchedule(1000)
    >>> wbdit.samplers.timesteps(schedule, 5)
    [999, 750, 500, 250, 1]
    >>> [round(t) for t in wbdit.samplers.timesteps(schedule, 5, "logsnr")]
    [999, 729, 336, 41, 1]
    """
    highest: float = schedule.noise_steps - 1
    if start is not None and not 1 <= start <= highest:
        raise ValueError(f"start must be between 1 and {highest}, not {start}")
    highest = highest if start is None else start
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
    if stop != 0 and not 1 <= stop < highest:
        raise ValueError(f"stop must be 0, or at least 1 and less than {highest}, not {stop}")
    most = math.floor(highest - stop)
    if not 1 <= steps <= most:
        raise ValueError(f"steps must be between 1 and {most}, not {steps}")
    first, last = (_coordinate(schedule, spacing, t) for t in (highest, stop or 1))
    points = torch.linspace(first, last, steps + (stop > 0), dtype=torch.float64)[:steps].tolist()
    # the first call is always at the start, even if it is pure noise, outside the bounds of "logsnr"
    return [highest, *(max(_timestep(schedule, spacing, point), 1) for point in points[1:])]


def _coordinate(schedule: NoiseSchedule, spacing: Spacing, t: float) -> float:
    """Return the coordinate in which the spacing is even."""
    if spacing == "uniform":
        return t
    if spacing == "sqrt":
        return math.sqrt(t)
    lowest, highest = LOG_SNR_BOUNDS
    return min(max(schedule.log_snr(t), lowest), highest)


def _timestep(schedule: NoiseSchedule, spacing: Spacing, coordinate: float) -> float:
    """Return the timestep at a coordinate: the inverse of :func:`_coordinate`."""
    if spacing == "uniform":
        return round(coordinate)
    return coordinate**2 if spacing == "sqrt" else schedule.timestep(coordinate)
