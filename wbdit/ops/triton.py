"""The Triton kernels of kernels/ as the ops' engine on a GPU; without triton, the reference runs after one warning."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wbdit.ops import dispatch, reference
from wbdit.ops.layout import TYPES

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
    "count_nll": "counts",
    "count_nll_backward": "counts",
    "count_draw": "counts",
    "run_blocks": "blocks",
    "run_denoiser": "narrow",
}
NO_ROWS = (  # ops whose kernels keep no whole row in registers, so the row length is not limited
    *("noising", "sampler_step", "normal", "fold", "fold_backward"),
    *("count_mean", "count_nll", "count_nll_backward", "count_draw"),
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
    step = functools.partial(dispatch.adapter("denoise_step"), denoise=_denoise)
    overrides: dict[str, Callable[..., Any]] = {"run_blocks": _run_blocks, "denoise": _denoise, "denoise_step": step}
    dispatch.add_engine(device, "triton", Triton(), available, _fits, overrides)


def _run_blocks(engine: Triton, *args: Any) -> Tensor:
    """Run all blocks, fused if :mod:`wbdit.kernels.blocks` supports them, else op by op."""
    return engine.run_blocks(*args) if _is_one(*args) else dispatch.adapter("run_blocks")(engine, *args)


def _denoise(engine: Triton, x: Tensor, modulations: Any, embedding: Any, *given: Any) -> Tensor:
    """Run a denoiser: narrow ones by :mod:`wbdit.kernels.narrow` up to the last norm, others by their blocks."""
    (*weights, readout), settings = given[:5], given[5:]
    if _is_one(x, modulations, *weights) and _is_narrow(weights[0], x.device):
        z = engine.run_denoiser(x, modulations, embedding, *weights, *settings)
    else:
        tokens = reference.embed_patches(x, weights[-1][0].dtype, *embedding)
        z = _run_blocks(engine, tokens, modulations, *weights, *settings)
    return reference.read_patches(z, x.shape[2], embedding[0].shape[2] // x.shape[1], *readout).to(x.dtype)


def _fits(name: str, args: tuple[Any, ...]) -> bool:
    """Return whether the kernels support a call: the GPU's architecture, registers and shared memory."""
    from wbdit.kernels import adaln

    device = next(a for a in args if isinstance(a, Tensor)).device
    if not _is_served(device):
        return False
    if name in NO_ROWS:
        return True
    rows = args[2] if name.endswith("adaln_backward") and name != "adaln_backward" else args[0]
    if name.startswith("mssa"):
        return _attends(rows.shape[-1] // args[-1], rows.dtype, device, backward=name == "mssa_backward")
    if name in ("run_blocks", "denoise", "denoise_step"):
        projections, folded, heads = (args[i] for i in ((2, 5, 6) if name == "run_blocks" else (3, 6, 8)))
        inner, d = projections[0].shape
        return d <= adaln.WIDEST and _attends(inner // heads, folded[0].dtype, device, backward=False)
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


def _is_one(x: Tensor, *others: Any) -> bool:
    """Return whether :mod:`wbdit.kernels.blocks` supports these blocks: their matrix products must be in bf16."""
    _, projections, _, _, folded, *_ = others
    low = all(t.dtype == torch.bfloat16 for t in (*projections, *folded))
    return low and x.dtype in TYPES and x.numel() > 0


def _is_narrow(projections: list[Tensor], device: torch.device) -> bool:
    from wbdit.kernels import narrow

    return narrow.fits(projections, device)
