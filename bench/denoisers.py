"""The denoisers that are compared, one row each: formula, compiled or eager, precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from configs import Config, Inputs, make_model, make_schedule
from published import published_forward
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import wbdit
from wbdit import samplers
from wbdit.schedule import Prediction

Forward = Callable[..., Tensor]


def own_forward(model: nn.Module, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    return model(x, t) if y is None else model(x, t, y)


@dataclass(frozen=True)
class Call:
    """A denoiser as a function of (x, t, y), and how a sampler prepares its calls, if it can fuse them."""

    forward: Forward
    precision: str
    fuse_steps: Callable[..., Any] | None

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        with self.context(x.device):
            return self.forward(x, t, y)

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return a context with the products' precision."""
        return nullcontext() if self.precision == "fp32" else torch.autocast(device.type, torch.bfloat16)


@dataclass(frozen=True)
class Row:
    name: str
    forward: Forward  # (model, x, t, y)
    kind: type = wbdit.WBDiT
    precision: str = "fp32"
    compiled: bool = False
    ours: bool = False

    def call(self, model: nn.Module) -> Call:
        """Return the row's denoiser with a model's weights, as a function of (x, t, y)."""
        forward = functools.partial(self.forward, model)
        forward = torch.compile(forward, dynamic=False) if self.compiled else forward
        return Call(forward, self.precision, getattr(model, "fuse_steps", None) if self.ours else None)

    @property
    def blocks(self) -> str:
        """Return the kind of the model's blocks, as flops.py names it."""
        return "white" if self.kind is wbdit.WBDiT else "black"

    def backend(self) -> AbstractContextManager[None]:
        """Return a context with kernels for ours and plain PyTorch for others, regardless of the environment."""
        return wbdit.backend("auto" if self.ours else "reference")


EAGER = "published, eager fp32"
ROWS = {
    row.name: row
    for row in (
        Row(EAGER, published_forward),
        Row("published, compiled fp32", published_forward, compiled=True),
        Row("published, eager bf16", published_forward, precision="bf16"),
        Row("DiT, eager fp32", own_forward, kind=wbdit.DiT),
        Row("ours, fp32", own_forward, ours=True),
        Row("ours, bf16", own_forward, precision="bf16", ours=True),
    )
}


# bf16 is the usual precision on a GPU
GPU_ROWS = {
    row.name: row
    for row in (
        ROWS["ours, bf16"],
        ROWS["ours, fp32"],
        ROWS[EAGER],
        ROWS["published, eager bf16"],
        Row("published, compiled bf16", published_forward, precision="bf16", compiled=True),
        Row("DiT, bf16", own_forward, kind=wbdit.DiT, precision="bf16"),
    )
}


def train_step(call: Forward, parameters: list[Tensor], inputs: Inputs) -> Callable[[], None]:
    """Return a training step: forward, loss, backward, update."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        gradients_of(call, inputs)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def gradients_of(call: Forward, inputs: Inputs) -> None:
    """Compute the loss's gradients into the parameters' ``grad``."""
    out = call(inputs.x, inputs.t, inputs.y)
    mse_loss(out.to(inputs.target.dtype), inputs.target).backward()


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


class AtLabels:
    """A row's denoiser at fixed labels, with the interface that samplers expect."""

    def __init__(self, call: Forward, y: Tensor | None, prediction: Prediction) -> None:
        self.call = call
        self.y = y
        self.prediction = prediction
        self.prepare = getattr(call, "fuse_steps", None)

    def fuse_steps(self, x: Tensor, times: Tensor) -> Any:
        return self.prepare and self.prepare(x, times, **({} if self.y is None else {"y": self.y}))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.call(x, t, self.y)


def sample(call: Forward, config: Config, inputs: Inputs, calls: int) -> Tensor:
    """Sample one cell per input with the given number of DDIM calls and counter-based noise."""
    schedule, cells, device = make_schedule(config), len(inputs.x), inputs.x.device
    noise = samplers.PhiloxNoise(0, torch.arange(cells, device=device), (1, config.model["input_size"]))
    denoiser = AtLabels(call, inputs.y, config.model["prediction"])
    path = samplers.timesteps(schedule, calls)
    with call.context(device) if isinstance(call, Call) else nullcontext():
        return samplers.ddim(denoiser, noise(-1), schedule, path, clamp_min=config.clamp_min, noise=noise)


class Expected:
    """The same model in fp64: the published formula, or the DiT itself."""

    def __init__(self, row: Row, config: Config, device: torch.device | str = "cpu") -> None:
        self.model = make_model(row.kind, config).double().to(device)
        forward = published_forward if row.kind is wbdit.WBDiT else own_forward
        self.call = functools.partial(forward, self.model.eval())

    def forward(self, inputs: Inputs) -> Tensor:
        with torch.no_grad(), wbdit.backend("reference"):
            return self.call(inputs.x.double(), inputs.t, inputs.y)

    def gradients(self, inputs: Inputs) -> list[Tensor]:
        with wbdit.backend("reference"):
            gradients_of(self.call, inputs._replace(x=inputs.x.double(), target=inputs.target.double()))
        return [p.grad for p in trained(self.model)]
