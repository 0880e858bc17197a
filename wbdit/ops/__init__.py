"""The operations a white-box block is made of, one function an op, on whatever device the tensors are.

Each is a PyTorch custom op in the namespace ``wbdit`` with shape inference and a gradient, so autograd, autocast,
``torch.compile`` and export see through it. Each has a file with all that belongs to it; the mathematics are in
:mod:`wbdit.ops.reference`. Kernels enter by :func:`register_kernel`.
"""

from wbdit.ops import cpu, triton
from wbdit.ops.adaln import adaln, gated_adaln, gated_adaln_
from wbdit.ops.blocks import run_blocks
from wbdit.ops.counts import count_mean, count_nll
from wbdit.ops.dispatch import active_backend, backend, register_kernel, serving
from wbdit.ops.ista import fold, ista, ista_adaln, ista_adaln_
from wbdit.ops.mssa import mssa
from wbdit.ops.sampling import noising, normal, sampler_step

__all__ = [
    "active_backend",
    "adaln",
    "backend",
    "count_mean",
    "count_nll",
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
]

cpu.register()
triton.register()
