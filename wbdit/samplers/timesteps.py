"""Where a sampler calls its model: grids of timesteps."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from wbdit.schedule import NoiseSchedule

Grid = Literal["uniform", "logsnr", "sqrt"]
GRIDS: tuple[Grid, ...] = get_args(Grid)

# Bounds of ln(alpha / sigma) that "logsnr" spreads its calls over: "cosine" has it infinite at its ends. The published
# schedule begins at -5.1; below that x_t tells next to nothing of x_0, and calls there would be wasted. Above 5 the
# noise left is under 0.7 % of a unit of x, which the jump to x_0 removes as well as any further calls.
LOG_SNR_BOUNDS = (-5.0, 5.0)


def timesteps(schedule: NoiseSchedule, steps: int, grid: Grid = "uniform", *, stop: float = 0.0) -> list[float]:
    """Return the timesteps, falling from T - 1, at which a sampler calls its model.

    Parameters
    ----------
    schedule
        The noise schedule.
    steps
        Number of calls.
    grid
        "uniform": even in t, rounded to whole timesteps. "sqrt": even in sqrt(t), denser where little noise is left.
        "logsnr": even in ``ln(alpha / sigma)`` (Lu et al. 2022, DPM-Solver), as far as it lies within -5 and 5. The
        last two are fractional.
    stop
        Where the walk is to land: at 0 (a jump from the last call, which is at t = 1 or a little above), or at a
        timestep of 1 or more, which is then the point after the last call.

    Raises
    ------
    ValueError
        If the grid is unknown, `stop` is no such timestep, or there are fewer than one or more than T - 1 - `stop`
        steps.
    """
    highest = schedule.noise_steps - 1
    if grid not in GRIDS:
        raise ValueError(f"no grid {grid!r}: choose one of {', '.join(GRIDS)}")
    if stop != 0 and not 1 <= stop < highest:
        raise ValueError(f"stop must be 0, or at least 1 and less than {highest}, not {stop}")
    most = math.floor(highest - stop)
    if not 1 <= steps <= most:
        raise ValueError(f"steps must be between 1 and {most}, not {steps}")
    first, last = (_coordinate(schedule, grid, t) for t in (highest, stop or 1))
    points = torch.linspace(first, last, steps + (stop > 0), dtype=torch.float64)[:steps].tolist()
    # a walk begins in pure noise, at T - 1, whatever the bounds of its spacing
    return [highest, *(max(_timestep(schedule, grid, point), 1) for point in points[1:])]


def _coordinate(schedule: NoiseSchedule, grid: Grid, t: float) -> float:
    """Return what the grid is even in."""
    if grid == "uniform":
        return t
    if grid == "sqrt":
        return math.sqrt(t)
    lowest, highest = LOG_SNR_BOUNDS
    return min(max(schedule.log_snr(t), lowest), highest)


def _timestep(schedule: NoiseSchedule, grid: Grid, coordinate: float) -> float:
    """Invert :func:`_coordinate`."""
    if grid == "uniform":
        return round(coordinate)
    return coordinate**2 if grid == "sqrt" else schedule.timestep(coordinate)
