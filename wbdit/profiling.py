"""Named ranges on the timeline of NVIDIA's Nsight tools (NVTX), which vanish where there is nothing to name."""

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
    """Return a context whose duration Nsight shows under `name`.

    The range lies in the domain ``wbdit`` with the package ``nvtx``, and in no domain without it, where PyTorch's own
    NVTX writes it. Without a GPU as well, and where ``torch.compile`` or ``torch.jit`` is looking, it is a context that
    does nothing. Ranges nest; one costs about a microsecond, and nothing is recorded unless a tool is listening.

    Parameters
    ----------
    name
        What the range is called: a part of the model or of a step, the same every time, so that Nsight adds them up.

    Examples
    --------
    >>> with span("forward"):
    ...     out = model(x, t)
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _NOTHING
    if nvtx is not None:
        return nvtx.annotate(name, domain=DOMAIN)
    return torch.cuda.nvtx.range(name) if _has_gpu() else _NOTHING


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()
