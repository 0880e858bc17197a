"""Named ranges on the timeline of NVIDIA's Nsight tools (NVTX), which vanish where the package ``nvtx`` is absent."""

from __future__ import annotations

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
    """Return a context whose duration Nsight shows under `name`, in the domain ``wbdit``.

    Without the package ``nvtx``, and where ``torch.compile`` or ``torch.jit`` is looking, it is a context that does
    nothing. Ranges nest; one costs about a microsecond, and nothing is recorded unless a tool is listening.

    Parameters
    ----------
    name
        What the range is called: a part of the model or of a step, the same every time, so that Nsight adds them up.

    Examples
    --------
    >>> with span("forward"):
    ...     out = model(x, t)
    """
    if nvtx is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _NOTHING
    return nvtx.annotate(name, domain=DOMAIN)
