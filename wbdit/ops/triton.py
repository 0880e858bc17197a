"""The Triton kernels of kernels/ as the ops' engine on a GPU; without triton, one warning, then the reference."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wbdit.ops import dispatch
from wbdit.ops.layout import TYPES

MODULES = {  # of each pass
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
    "count_nll": "counts",
    "count_nll_backward": "counts",
    "run_blocks": "blocks",
}
NO_ROWS = (  # ops that keep no row in registers
    *("noising", "sampler_step", "normal", "fold", "fold_backward"),
    *("count_mean", "count_nll", "count_nll_backward"),
)


class Triton:
    """The modules of :mod:`wbdit.kernels`, imported when a pass is first called, each pass on its tensors' device."""

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
    """Whether triton can be imported; says once what to do if not."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        warnings.warn(
            f"wbdit: no triton ({error}): on this GPU the ops run on their slower PyTorch reference. "
            'pip install "wbdit[gpu]" brings it.',
            stacklevel=2,
        )
        return False
    return True


def version() -> str:
    """Return triton's version, "none" without it."""
    return importlib.import_module("triton").__version__ if available() else "none"


def register(device: str = "cuda") -> None:
    """Enter the kernels for tensors on a GPU; another device type is for Triton's interpreter alone."""
    dispatch.add_engine(device, "triton", Triton(), available, _fits, {"run_blocks": _run_blocks})


def _run_blocks(engine: Triton, *args: Any) -> Tensor:
    """Run all blocks, as one where :mod:`wbdit.kernels.blocks` takes them."""
    return engine.run_blocks(*args) if _is_one(*args) else dispatch.adapter("run_blocks")(engine, *args)


def _fits(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the kernels take an op's arguments: an architecture and a program's registers and shared memory."""
    from wbdit.kernels import adaln

    device = next(a for a in args if isinstance(a, Tensor)).device
    if not _is_served(device):
        return False
    if name in NO_ROWS:
        return True
    rows = args[2] if name.endswith("adaln_backward") and name != "adaln_backward" else args[0]
    if name.startswith("mssa"):
        return _attends(rows.shape[-1] // args[-1], rows.dtype, device, backward=name == "mssa_backward")
    if name == "run_blocks":
        projections, heads = args[2], args[6]
        width, dtype = projections[0].shape[0] // heads, args[5][0].dtype
        return rows.shape[-1] <= adaln.WIDEST and _attends(width, dtype, device, backward=False)
    return rows.shape[-1] <= adaln.WIDEST


@functools.cache
def _is_served(device: torch.device) -> bool:
    """Whether Triton compiles for a device: NVIDIA's since compute capability 8.0, says its README."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _attends(width: int, dtype: torch.dtype, device: torch.device, backward: bool) -> bool:
    """Whether attention with so many numbers per head fits a device."""
    from wbdit.kernels import mssa

    if backward and dtype == torch.float32:
        return False  # of multiply-adds alone it takes longer than PyTorch's products
    return width <= mssa.WIDEST and (device.type != "cuda" or bool(mssa.candidates(backward, dtype, width, device)))


def _is_one(x: Tensor, *others: Any) -> bool:
    """Whether :mod:`wbdit.kernels.blocks` takes these blocks: those whose products are in bf16."""
    _, projections, _, _, folded, *_ = others
    low = all(t.dtype == torch.bfloat16 for t in (*projections, *folded))
    return low and x.dtype in TYPES and x.numel() > 0
