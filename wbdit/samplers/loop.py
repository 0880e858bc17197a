"""The loop of every sampler, from noise to cells: one call of the model and one update per step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wbdit import ops
from wbdit.profiling import span
from wbdit.samplers.noise import Noise, PhiloxNoise
from wbdit.schedule import Mix, NoiseSchedule, Prediction

Model = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, float, Tensor], object]


class Update(NamedTuple):
    """A step ``a x + b out + c previous + d earlier + e noise``, as host scalars.

    ``out`` is the model's output at ``x``, whatever it predicts; ``previous`` and ``earlier`` are the estimates of x_0
    from the call before and from the one before that.
    """

    a: float
    b: float
    c: float = 0.0
    d: float = 0.0
    e: float = 0.0


# the update from path[step] to path[step + 1], where the path's last point is the one to land on
Plan = Callable[[Sequence[float], int], Update]


@torch.no_grad()
def sampling_loop(
    plan: Plan,
    model: Model,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Iterable[float] | None,
    *,
    stop: float,
    clamp_min: float | None,
    noise: Noise | None,
    callback: Callback | None,
    estimates: int = 0,
) -> Tensor:
    """Go down the timesteps to `stop` by the updates of a plan.

    Parameters
    ----------
    plan
        Called as ``plan(path, step)`` for each step's update, where ``path`` is the timesteps and then `stop`.
    model, x, schedule, timesteps, stop, clamp_min, noise, callback
        As in :func:`wbdit.samplers.ddpm`.
    estimates
        How many of the last estimates of x_0 the plan wants: none, ``previous``, or ``earlier`` too. Each is one tensor
        kept, and one more pass a step writes them unless the model predicts x_0 itself.

    Returns
    -------
    ``(B, C, G)``.
    """
    prediction: Prediction = getattr(model, "prediction", "epsilon")
    path = _path(schedule, timesteps, stop)
    whole = all(isinstance(t, int) for t in path[:-1])
    dtype = torch.int64 if whole else torch.promote_types(x.dtype, torch.float32)
    kept: deque[Tensor] = deque(maxlen=estimates)
    for i, (t, after) in enumerate(pairwise(path)):
        # a view: one number for all, as it says
        out = model(x, torch.full((1,), t, dtype=dtype, device=x.device).expand(x.shape[0]))
        a, b, c, d, e = plan(path, i)
        drawn = {} if after == 0 or e == 0 else _noise(noise, i, x)
        lowest = clamp_min if after == 0 else None
        with span("sampler step"):
            new = ops.sampler_step(x, out, *kept, a=a, b=b, c=c, d=d, e=e, clamp_min=lowest, **drawn)
            if estimates and i + 2 < len(path):
                clean = schedule.clean(prediction, t)
                kept.appendleft(out if clean == Mix(0, 1) else ops.sampler_step(x, out, a=clean.x, b=clean.out))
        x = new
        if callback is not None:
            callback(i, t, x)
    return x


def _path(schedule: NoiseSchedule, timesteps: Iterable[float] | None, stop: float) -> list[float]:
    """Return the timesteps to call the model at, and where to land: all int where all the former are whole numbers."""
    highest = schedule.noise_steps - 1
    if not 0 <= stop < highest:
        raise ValueError(f"stop must be at least 0 and less than {highest}, not {stop}")
    path = [float(t) for t in (range(highest, math.floor(stop), -1) if timesteps is None else timesteps)]
    if not path or path[0] > highest or path[-1] < 1 or any(a <= b for a, b in pairwise([*path, stop])):
        raise ValueError(f"timesteps must fall within {highest} ... 1, and to stop = {stop:g}")
    return [*([int(t) for t in path] if all(t.is_integer() for t in path) else path), stop]


def _noise(noise: Noise | None, step: int, x: Tensor) -> dict[str, Any]:
    """Return the arguments of :func:`wbdit.ops.sampler_step` that bring a step's noise."""
    if isinstance(noise, PhiloxNoise):
        return noise.address(step)
    if noise is None:
        return {"noise": torch.randn_like(x)}
    return {"noise": (noise(step) if callable(noise) else noise[step]).to(x)}
