"""Who serves an op: its reference, or an engine's kernels where they are there and take the arguments.

An op is defined once, by :func:`define_op`: its schema, its reference, its shape inference, and how it runs on an
engine. An engine is what holds the passes over memory, the C++ library of ``csrc/`` on a CPU or the Triton modules of
``kernels/`` on a GPU; both have passes of the same names and arguments, which write to memory given to them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from wbdit.errors import InputError
from wbdit.ops.layout import TYPES

BACKENDS = ("auto", "reference")

_ops: dict[str, CustomOpDef] = {}
_references: dict[str, Callable[..., Any]] = {}
_adapters: dict[str, Callable[..., Any]] = {}
_kernels: dict[tuple[str, str], str] = {}  # (op, device type) -> the backend's name
_available: dict[str, Callable[[], bool]] = {}  # by the backend's name
_forced: str | None = None  # process-wide, so that autograd's own threads see it too


def define_op(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    on_engine: Callable[..., Any],
    mutates: tuple[str, ...] = (),
) -> CustomOpDef:
    """Register ``wbdit::name`` with PyTorch; on every device without a kernel the reference serves it.

    Parameters
    ----------
    name, schema
        The op's name and PyTorch schema.
    reference
        The op in plain PyTorch.
    fake
        Takes the same arguments and returns empty tensors of the right shapes and types, for torch.compile and export.
    on_engine
        Takes an engine's passes and then the same arguments, and returns the same results.
    mutates
        Names of the arguments that it writes to.
    """
    reference = _without_autocast(reference)
    op = custom_op(f"wbdit::{name}", reference, mutates_args=mutates, schema=schema)
    op.register_fake(fake)
    _ops[name], _references[name], _adapters[name] = op, reference, on_engine
    return op


def adapter(op: str) -> Callable[..., Any]:
    """Return what runs an op on an engine: it takes the engine's passes, then the op's arguments."""
    return _adapters[op]


def add_engine(
    device: str,
    backend: str,
    passes: Any,
    available: Callable[[], bool],
    fits: Callable[[str, tuple[Any, ...]], bool] = lambda op, args: True,
    overrides: Mapping[str, Callable[..., Any]] | None = None,
) -> None:
    """Let an engine serve all ops for tensors of a device type.

    Parameters
    ----------
    device, backend
        "cpu" or "cuda", and the engine's name.
    passes
        What has the passes as attributes.
    available
        Whether the engine is there.
    fits
        Whether it takes an op's arguments, given the op's name and these; fp32 and bf16 alone reach it. What it does
        not take goes to the reference.
    overrides
        By the op's name, what runs it on this engine in place of its own way.
    """
    chosen = overrides or {}

    def serve(op: str) -> Callable[..., Any]:
        return lambda *args: (chosen.get(op) or _adapters[op])(passes, *args)

    for op in _ops:
        register_kernel(op, device, backend, available, functools.partial(fits, op))(serve(op))


def register_kernel(
    op: str,
    device: str,
    backend: str,
    available: Callable[[], bool] = lambda: True,
    fits: Callable[[tuple[Any, ...]], bool] = lambda args: True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function that serves `op` on `device` ("cpu", "cuda") from now on.

    PyTorch's dispatcher picks it by the device of the tensors. It takes the arguments of the same-named function in
    :mod:`wbdit.ops.reference`, positionally, and returns fresh tensors. It is called where no backend is forced, all
    floating tensors are fp32 or bf16, `available` says that the backend is there and `fits` that it takes these
    arguments; elsewhere the reference is.
    """

    def decorate(kernel: Callable[..., Any]) -> Callable[..., Any]:
        plain = _without_autocast(kernel)

        def kernel_or_reference(*args: Any) -> Any:
            served = active_backend() == "auto" and _have_types(args) and available() and fits(args)
            return (plain if served else _references[op])(*args)

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


def _have_types(args: tuple[Any, ...]) -> bool:
    """Whether the engines compute with the types of all tensors."""
    return all(a.dtype in TYPES or not a.is_floating_point() for a in args if isinstance(a, Tensor))


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let an op compute in the types of its arguments: autocast has had its say before it was called."""

    @functools.wraps(function)
    def plain(*args: Any) -> Any:
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args)

    return plain


def _check(name: str) -> str:
    if name not in BACKENDS:
        raise InputError(f"no backend {name!r}: choose one of {', '.join(BACKENDS)}")
    return name
