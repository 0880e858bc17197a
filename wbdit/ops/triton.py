"""The Triton kernels of kernels/ as the ops' engine on a GPU; without triton, the reference runs after one warning."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wbdit.ops import count_step, dispatch
from wbdit.ops.layout import TYPES
from wbdit.ops.sampling import update_on_engine

MODULES = {  # pass -> module of wbdit.kernels
    "residual_adaln": "adaln",
    "residual_adaln_backward": "adaln",
    "mssa": "mssa",
    "mssa_backward": "mssa",
    "shrink": "ista",
    "shrink_backward": "ista",
    "noising": "noise",
    "sampler_step": "noise",
    "normal": "noise",
    "count_mean": "counts",
    "count_mean_step": "count_step",
    "count_nll": "counts",
    "count_nll_backward": "counts",
    "count_draw": "counts",
    "run_blocks": "blocks",
    "embed_patches": "ends",
    "read_patches": "ends",
    "denoise": "denoise",
}
NO_ROWS = (  # ops whose kernels keep no whole row in registers, so the row length is not limited
    *("noising", "sampler_step", "normal", "fold", "fold_backward"),
    *("count_mean", "count_mean_step", "count_nll", "count_nll_backward", "count_draw"),
)


class Triton:
    """The passes of :mod:`wbdit.kernels`: imported on first use, and launched on the device of their tensors."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        launch = getattr(importlib.import_module(f"wbdit.kernels.{MODULES[name]}"), name)

        @functools.wraps(launch)
        def on_device(*args: Any, **named: Any) -> Any:
            with torch.cuda.device_of(next(a for a in (*args, *named.values()) if isinstance(a, Tensor))):
                return launch(*args, **named)

        setattr(self, name, on_device)
        return on_device


@functools.cache
def available() -> bool:
    """Return whether triton can be imported; warn once if not."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        warnings.warn(
            f"wbdit: no triton ({error}), so the ops run on the slower PyTorch reference on this GPU: "
            'pip install "wbdit[gpu]" installs it.',
            stacklevel=2,
        )
        return False
    return True


def version() -> str:
    """Return triton's version, or "none" if it is not installed."""
    return importlib.import_module("triton").__version__ if available() else "none"


def register(device: str = "cuda") -> None:
    """Register the kernels for a device type: "cuda", or another one for Triton's interpreter in the tests."""
    fused: dict[str, Callable[..., Any]] = {
        "run_blocks": _run_blocks,
        "denoise": _denoise,
        "denoise_step": _denoise_step,
        "count_mean_step": count_step.one_pass,
    }
    dispatch.add_engine(device, "triton", Triton(), available, _fits, fused)


def _run_blocks(engine: Triton, *args: Any) -> Tensor:
    """Run all blocks, fused if :mod:`wbdit.kernels.blocks` supports them, else op by op."""
    x, _, projections, _, _, folded, *_ = args
    if x.dtype in TYPES and x.numel() > 0 and _are_low(projections, folded):
        return engine.run_blocks(*args)
    return dispatch.adapter("run_blocks")(engine, *args)


def _denoise(engine: Triton, x: Tensor, *network: Any) -> Tensor:
    """Run a denoiser by :mod:`wbdit.kernels.denoise` if it supports it, else op by op."""
    if not _is_whole(x, *network):
        return dispatch.adapter("denoise")(engine, x, *network)
    embedding, readout = network[1], network[6]
    patch = embedding[0].shape[2] // x.shape[1]
    new = x.new_empty(x.shape[0], readout[0].shape[1] // patch, x.shape[2])
    engine.denoise(x, *network, new=new)
    return new


def _denoise_step(engine: Triton, x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """Run a denoiser and a sampler's step like :func:`_denoise`."""
    network, update, factors = given[:11], given[11:-1], given[-1]
    if not _is_whole(x, *network):
        return dispatch.adapter("denoise_step")(engine, x, *given)
    new = torch.empty_like(x, memory_format=torch.contiguous_format)
    clean = None if factors is None else torch.empty_like(new)
    estimate = {"clean": clean, "factors": factors or (0.0, 0.0)}
    engine.denoise(x, *network, new=new, x=x.contiguous(), **update_on_engine(*update), **estimate)
    return new, x.new_empty(0) if clean is None else clean


def _fits(name: str, args: tuple[Any, ...]) -> bool:
    """Return whether the kernels support a call: the GPU's architecture, registers and shared memory."""
    from wbdit.kernels import adaln

    device = next(a for a in args if isinstance(a, Tensor)).device
    if not _is_served(device):
        return False
    if name in NO_ROWS:
        return True
    if name in ("run_blocks", "denoise", "denoise_step"):
        outs, _, folded, *_ = args[3:] if name == "run_blocks" else args[4:]
        heads = args[6] if name == "run_blocks" else args[8]
        d, width = outs[0].shape
        return d <= adaln.WIDEST and _attends(width // heads, folded[0].dtype, device, backward=False)
    rows = args[2] if name.endswith("adaln_backward") and name != "adaln_backward" else args[0]
    if name.startswith("mssa"):
        return _attends(rows.shape[-1] // args[-1], rows.dtype, device, backward=name == "mssa_backward")
    return rows.shape[-1] <= adaln.WIDEST


@functools.cache
def _is_served(device: torch.device) -> bool:
    """Return whether Triton supports a device: NVIDIA GPUs of compute capability 8.0 or later (Triton's README)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _attends(width: int, dtype: torch.dtype, device: torch.device, backward: bool) -> bool:
    """Return whether the attention kernel supports heads of `width` numbers on a device."""
    from wbdit.kernels import mssa

    if backward and dtype == torch.float32:
        return False  # with plain fp32 multiply-adds it is slower than PyTorch's matrix products
    return width <= mssa.WIDEST and (device.type != "cuda" or bool(mssa.candidates(backward, dtype, width, device)))


def _are_low(*weights: list[Tensor]) -> bool:
    """Return whether products with all these weights are in bf16, as the kernels with products need it."""
    return all(t.dtype == torch.bfloat16 for ts in weights for t in ts)


def _is_whole(x: Tensor, *network: Any) -> bool:
    """Return whether :mod:`wbdit.kernels.denoise` supports a denoiser."""
    from wbdit.kernels import ends

    _, embedding, projections, _, _, folded, *_ = network
    fits = embedding[2].shape[1] <= ends.WIDEST
    return fits and x.dtype in TYPES and x.numel() > 0 and _are_low(projections, folded)
