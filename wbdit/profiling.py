"""Named ranges in torch.profiler and in NVIDIA's Nsight tools, or no-ops where nothing can record them."""

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
    """Return a context manager whose duration a profiler shows as the range `name`.

    While ``torch.profiler`` records, the range is one of its events (``record_function``). Otherwise it is an NVTX
    range for Nsight: the package ``nvtx`` writes it, in the domain ``wbdit``, or else PyTorch's own NVTX, in no domain.
    The context does nothing if there is no profiler and neither ``nvtx`` nor a GPU, or while ``torch.compile`` or
    ``torch.jit`` traces the code. Ranges can be nested.

    Parameters
    ----------
    name
        Name of a part of the model or of a step. Use the same name each time, so that profilers can sum the durations.

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
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(name)
    if nvtx is not None:
        return nvtx.annotate(name, domain=DOMAIN)
    return torch.cuda.nvtx.range(name) if _has_gpu() else _NOTHING


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()
