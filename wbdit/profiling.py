"""Named NVTX ranges on the timeline of NVIDIA's Nsight tools, or no-ops where nothing can record them."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

try:
    import nvtx
except ImportError:
    nvtx = None

DOMAIN = "wbdit"
_NOTHING: AbstractContextManager[Any] = nullcontext()


def span(name: str) -> AbstractContextManager[Any]:
    """Return a context manager whose duration Nsight shows as the range `name`.

    The package ``nvtx`` writes the range, in the domain ``wbdit``. If it is not installed, PyTorch's own NVTX writes
    the range, in no domain. The context does nothing if there is neither ``nvtx`` nor a GPU, or while ``torch.compile``
    or ``torch.jit`` traces the code. Ranges can be nested. Each costs about a microsecond, and nothing is recorded
    unless a profiler is attached.

    Parameters
    ----------
    name
        Name of a part of the model or of a step. Use the same name each time, so that Nsight can sum the durations.

    Examples
    --------
    >>> from wbdit.profiling import span
    >>> with span("product"):
    ...     product = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> product.shape
    torch.Size([2, 4])
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _NOTHING
    if nvtx is not None:
        return nvtx.annotate(name, domain=DOMAIN)
    return torch.cuda.nvtx.range(name) if _has_gpu() else _NOTHING


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()
