"""The door for kernels: who serves an op on which device, and how to force the reference."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.library import CustomOpDef, custom_op

from wbdit.errors import InputError

BACKENDS = ("auto", "reference")

_ops: dict[str, CustomOpDef] = {}
_references: dict[str, Callable[..., Any]] = {}
_kernels: dict[tuple[str, str], str] = {}  # (op, device type) -> the backend's name
_available: dict[str, Callable[[], bool]] = {}  # by the backend's name
_forced: str | None = None  # process-wide, so that autograd's own threads see it too


def define_op(name: str, schema: str, reference: Callable[..., Any], mutates_args: tuple[str, ...] = ()) -> CustomOpDef:
    """Register ``wbdit::name`` with PyTorch; on every device without a kernel the reference serves it."""
    reference = _as_typed(reference)
    op = custom_op(f"wbdit::{name}", reference, mutates_args=mutates_args, schema=schema)
    _ops[name], _references[name] = op, reference
    return op


def register_kernel(
    op: str, device: str, backend: str, available: Callable[[], bool] = lambda: True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function that serves `op` on `device` ("cpu", "cuda") from now on.

    PyTorch's dispatcher picks it by the device of the tensors. It takes the arguments of the same-named function in
    :mod:`wbdit.ops.reference`, positionally, and returns fresh tensors. `available` says whether the backend of that
    name is there; where it is not, the function itself goes to the reference.
    """

    def decorate(kernel: Callable[..., Any]) -> Callable[..., Any]:
        typed = _as_typed(kernel)

        @functools.wraps(kernel)
        def kernel_or_reference(*args: Any) -> Any:
            return (_references[op] if active_backend() == "reference" else typed)(*args)

        _ops[op].register_kernel(device, kernel_or_reference)
        _kernels[op, device] = backend
        _available[backend] = available
        return kernel

    return decorate


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block, in the whole process and on every device.

    Parameters
    ----------
    name
        ``"reference"`` for plain PyTorch, ``"auto"`` for the kernels that a device has. Outside such a block the
        environment variable ``WBDIT_BACKEND`` decides, and ``"auto"`` where it is not set.

    Raises
    ------
    InputError
        If there is no such backend.
    """
    global _forced
    before, _forced = _forced, _check(name)
    try:
        yield
    finally:
        _forced = before


def active_backend() -> str:
    """Return the backend in force, ``"auto"`` or ``"reference"``."""
    return _forced or _check(os.environ.get("WBDIT_BACKEND", "auto"))


def serving(device: str) -> dict[str, str]:
    """Return, for each op, the name of the backend that serves it on a device type now; builds the CPU kernels."""
    here = {} if active_backend() == "reference" else {op: name for (op, on), name in _kernels.items() if on == device}
    there = {name for name in set(here.values()) if _available[name]()}
    here = {op: name for op, name in here.items() if name in there}
    return {op: here.get(op, "reference") for op in sorted(_ops)}


def _as_typed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let an op compute in the types of its arguments: autocast has had its say before it was called."""

    @functools.wraps(function)
    def typed(*args: Any) -> Any:
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args)

    return typed


def _check(name: str) -> str:
    if name not in BACKENDS:
        raise InputError(f"no backend {name!r}: choose one of {', '.join(BACKENDS)}")
    return name
