"""Profiles: a table of kernels for one forward, one training step, and one replayed call of sampling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from checks import BF16
from configs import make_inputs, make_model
from denoisers import train_step, trained
from rows import Line
from setting import Setting
from torch.profiler import ProfilerActivity, profile

from wbdit.nn.cuda_graph import CUDAGraphModel

SHOWN = 25


def profiles(s: Setting) -> None:
    """Write one table per phase, the slowest kernels first."""
    for name, prepare in (("forward", _forward), ("train", _train), ("sampling call, replayed", _replayed)):
        s.rows.attempt(name, lambda prepare=prepare: _profile(s, prepare))
        s.free()


def _profile(s: Setting, prepare: Callable[[Setting], Callable[[], object]]) -> Line:
    step = prepare(s)
    for _ in range(3):
        step()
    s.timer.wait()
    activity = ProfilerActivity.CUDA if s.on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        step()
        s.timer.wait()
    kernels = []
    for event in seen.key_averages():
        microseconds = event.self_device_time_total if s.on_gpu else event.self_cpu_time_total
        if microseconds > 0:
            kernels.append({"kernel": event.key[:90], "calls": event.count, "us": round(microseconds, 1)})
    kernels.sort(key=lambda kernel: -kernel["us"])
    total = sum(kernel["us"] for kernel in kernels)
    return {"kernels_us": total, "launches": sum(k["calls"] for k in kernels), "table": kernels[:SHOWN]}


def _forward(s: Setting) -> Callable[[], object]:
    config = s.configs["published"]
    inputs = make_inputs(config, s.batch).to(s.device)
    call = BF16.call(make_model(BF16.kind, config).to(s.device).eval())
    return torch.no_grad()(lambda: call(*inputs[:3]))


def _train(s: Setting) -> Callable[[], object]:
    config = s.configs["published"]
    model = make_model(BF16.kind, config).to(s.device).train()
    return train_step(BF16.call(model), trained(model), make_inputs(config, s.batch).to(s.device))


def _replayed(s: Setting) -> Callable[[], object]:
    config = s.configs["base"]
    inputs = make_inputs(config, 4 if s.quick else 256).to(s.device)
    call = BF16.call(CUDAGraphModel(make_model(BF16.kind, config).to(s.device).eval()))
    t = inputs.t[:1].expand(len(inputs.x))
    return torch.no_grad()(lambda: call(inputs.x, t, inputs.y))
