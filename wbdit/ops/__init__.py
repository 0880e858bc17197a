"""The operations of white-box blocks, samplers and count models, for CPU and GPU.

Each op is a PyTorch custom op in the namespace ``wbdit``. It has shape inference, and a gradient where one is needed.
It works with autograd, autocast, ``torch.compile`` and export. Each op's module holds its docstring, schema and
gradient; :mod:`wbdit.ops.reference` holds the mathematics in plain PyTorch. :func:`register_kernel` adds a kernel.
"""

from wbdit.ops import cpu, triton
from wbdit.ops.adaln import adaln, gated_adaln, gated_adaln_
from wbdit.ops.blocks import run_blocks
from wbdit.ops.count_step import count_mean_step
from wbdit.ops.counts import count_draw, count_mean, count_nll
from wbdit.ops.denoise import denoise, denoise_step
from wbdit.ops.dispatch import active_backend, backend, register_kernel, serving
from wbdit.ops.ista import fold, ista, ista_adaln, ista_adaln_
from wbdit.ops.mssa import mssa
from wbdit.ops.sampling import noising, normal, sampler_step
from wbdit.ops.training_blocks import training_blocks

__all__ = [
    "active_backend",
    "adaln",
    "backend",
    "count_draw",
    "count_mean",
    "count_mean_step",
    "count_nll",
    "denoise",
    "denoise_step",
    "fold",
    "gated_adaln",
    "gated_adaln_",
    "ista",
    "ista_adaln",
    "ista_adaln_",
    "mssa",
    "noising",
    "normal",
    "register_kernel",
    "run_blocks",
    "sampler_step",
    "serving",
    "training_blocks",
]

cpu.register()
triton.register()
