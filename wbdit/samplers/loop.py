"""The loop that all samplers share: one model call and one update per step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from wbdit import ops
from wbdit.profiling import span
from wbdit.samplers.noise import Noise, PhiloxNoise
from wbdit.schedule import Mix, NoiseSchedule, Prediction

Model = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, float, Tensor], object]


class Update(NamedTuple):
    """The coefficients of a step ``a x + b out + c previous + d earlier + e noise``, as host scalars.

    ``out`` is the model's output at ``x``, whatever it predicts. ``previous`` and ``earlier`` are the x_0 estimates of
    the previous step and of the step before it.
    """

    a: float
    b: float
    c: float = 0.0
    d: float = 0.0
    e: float = 0.0


class FusedSteps(Protocol):
    """The model calls of a whole run, each fused with the sampler's update: what ``fuse_steps`` of a model returns.

    A model may have this method. It is called once per run, as ``fuse_steps(x, times)`` with the initial state and the
    timesteps ``(T,)`` of the model calls, on a CPU. It returns None where the model must be called step by step.
    """

    def step(
        self, i: int, x: Tensor, *, clean: tuple[float, float] | None, **update: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the next state and the estimate of x_0 ``clean[0] x + clean[1] out``, which None leaves out.

        `out` is the model's output at timestep i, `update` the arguments of :func:`wbdit.ops.sampler_step` by name.
        """


# returns the update from path[step] to path[step + 1]; path ends with the final timestep
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
    """Sample down the timesteps to `stop` with the updates of a plan.

    Parameters
    ----------
    plan
        Called as ``plan(path, step)`` for the update of each step; ``path`` is the timesteps followed by `stop`.
    model, x, schedule, timesteps, stop, clamp_min, noise, callback
        As in :func:`wbdit.samplers.ddpm`.
    estimates
        Number of earlier x_0 estimates that the plan uses: 0, 1 (``previous``) or 2 (``earlier`` too). Each keeps one
        tensor in memory. Writing them takes one more pass per step, unless the model predicts x_0 itself.

    Returns
    -------
    Cells ``(B, C, G)``, or ``x`` at `stop`.

    Raises
    ------
    ValueError
        If the timesteps do not decrease, or lie outside the schedule or below `stop`.
    """
    prediction: Prediction = getattr(model, "prediction", "epsilon")
    path = _path(schedule, timesteps, stop)
    whole = all(isinstance(t, int) for t in path[:-1])
    dtype = torch.int64 if whole else torch.promote_types(x.dtype, torch.float32)
    prepare: Callable[[Tensor, Tensor], FusedSteps | None] | None = getattr(model, "fuse_steps", None)
    fused = None if prepare is None else prepare(x, torch.tensor(path[:-1], dtype=dtype))
    kept: deque[Tensor] = deque(maxlen=estimates)
    for i, (t, after) in enumerate(pairwise(path)):
        out = None
        if fused is None:
            # an expanded view (stride 0): models detect that all samples share the timestep
            out = model(x, torch.full((1,), t, dtype=dtype, device=x.device).expand(x.shape[0]))
        factors = plan(path, i)
        drawn = {} if after == 0 or factors.e == 0 else _noise(noise, i, x)
        update: dict[str, Any] = {
            **dict(zip(("previous", "earlier"), kept, strict=False)),
            **factors._asdict(),
            **drawn,
            "clamp_min": clamp_min if after == 0 else None,
        }
        clean = schedule.clean(prediction, t) if estimates and i + 2 < len(path) else None
        if fused is not None:
            x, estimate = fused.step(i, x, clean=clean, **update)
        else:
            assert out is not None
            with span("sampler step"):
                x, estimate = _separately(x, out, clean, update)
        if estimate is not None:
            kept.appendleft(estimate)
        if callback is not None:
            callback(i, t, x)
    return x


def _separately(x: Tensor, out: Tensor, clean: Mix | None, update: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return the next state and the estimate of x_0, given the model's output."""
    new = ops.sampler_step(x, out, **update)
    if clean is None or clean == Mix(0, 1):
        return new, None if clean is None else out
    return new, ops.sampler_step(x, out, a=clean.x, b=clean.out)


def _path(schedule: NoiseSchedule, timesteps: Iterable[float] | None, stop: float) -> list[float]:
    """Return the timesteps of the model calls, int if all are whole numbers, followed by `stop`."""
    highest = schedule.noise_steps - 1
    if not 0 <= stop < highest:
        raise ValueError(f"stop must be at least 0 and less than {highest}, not {stop}")
    path = [float(t) for t in (range(highest, math.floor(stop), -1) if timesteps is None else timesteps)]
    if not path or path[0] > highest or path[-1] < 1 or any(a <= b for a, b in pairwise([*path, stop])):
        raise ValueError(f"timesteps must decrease, lie within [1, {highest}] and stay above stop = {stop:g}")
    return [*([int(t) for t in path] if all(t.is_integer() for t in path) else path), stop]


def _noise(noise: Noise | None, step: int, x: Tensor) -> dict[str, Any]:
    """Return the arguments of :func:`wbdit.ops.sampler_step` for a step's noise."""
    if isinstance(noise, PhiloxNoise):
        return noise.address(step)
    if noise is None:
        return {"noise": torch.randn_like(x)}
    return {"noise": (noise(step) if callable(noise) else noise[step]).to(x)}
