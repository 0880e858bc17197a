"""The choice of implementation per op: the reference, or an engine's kernel if it is available and fits.

:func:`define_op` defines an op: its schema, its reference, its shape inference and its adapter to the engines.
An engine is a collection of kernels: the C++ library of ``csrc/`` on a CPU or the Triton modules of ``kernels/`` on a
GPU. Both provide the same passes over memory, with the same names and arguments. A pass writes its results to tensors
that the caller allocates.
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
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from wbdit.errors import InputError
from wbdit.ops.layout import TYPES

BACKENDS = ("auto", "reference")

_ops: dict[str, CustomOpDef] = {}
_references: dict[str, Callable[..., Any]] = {}
_adapters: dict[str, Callable[..., Any]] = {}
_kernels: dict[tuple[str, str], str] = {}  # (op, device type) -> backend name
_served: dict[tuple[str, str], Callable[..., Any]] = {}  # (op, device type) -> its kernel or reference
_available: dict[str, Callable[[], bool]] = {}  # by backend name
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
    """Register ``wbdit::name`` with PyTorch; the reference serves every device without a kernel.

    Parameters
    ----------
    name, schema
        The op's name and PyTorch schema.
    reference
        The op in plain PyTorch.
    fake
        The op's shape inference: the same arguments, and empty tensors of the results' shapes and dtypes.
    on_engine
        The op's adapter: it takes an engine and then the same arguments, and returns the same results.
    mutates
        Names of the arguments that the op writes to.

    Returns
    -------
    The op: call it, or add its gradient with ``register_autograd``.
    """
    reference = _without_autocast(reference)
    op = custom_op(f"wbdit::{name}", reference, mutates_args=mutates, schema=schema)
    op.register_fake(fake)
    _ops[name], _references[name], _adapters[name] = op, reference, on_engine
    return op


def adapter(op: str) -> Callable[..., Any]:
    """Return the function that runs an op on an engine; it takes the engine, then the op's arguments."""
    return _adapters[op]


def served(op: str, device: str) -> Callable[..., Any]:
    """Return the function that computes an op on a device type, without PyTorch's dispatcher and without gradients.

    For ops with long lists of tensors, the dispatcher takes a millisecond per call. Compilation, fake tensors and other
    modes that must see the call get the op itself.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return _ops[op]
    return _served.get((op, device), _references[op])


def add_engine(
    device: str,
    backend: str,
    passes: Any,
    available: Callable[[], bool],
    fits: Callable[[str, tuple[Any, ...]], bool] = lambda op, args: True,
    overrides: Mapping[str, Callable[..., Any]] | None = None,
) -> None:
    """Register an engine for all ops on tensors of a device type.

    Parameters
    ----------
    device, backend
        Device type ("cpu" or "cuda") and the engine's name.
    passes
        The engine: an object with the passes as attributes.
    available
        Whether the engine can be used on this machine.
    fits
        Whether the engine supports a call, given the op's name and its arguments (fp32 or bf16). The reference serves
        all other calls.
    overrides
        Adapters, by op name, that replace the op's own adapter on this engine.
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
    """Return a decorator that registers a function as the kernel of `op` on a device type.

    The kernel takes the arguments of the same-named function in :mod:`wbdit.ops.reference`, positionally, and returns
    new tensors. It runs if the active backend is ``"auto"``, all floating tensors are fp32 or bf16, and both
    `available` and `fits` return True. Otherwise the reference runs.

    Parameters
    ----------
    op
        Name of the op, as in :func:`serving`.
    device
        Device type of the tensors, such as ``"cpu"`` or ``"cuda"``.
    backend
        Name to report in :func:`serving`.
    available
        Whether the kernel can be used on this machine.
    fits
        Whether the kernel supports a call, given the tuple of its arguments.

    Returns
    -------
    The decorator; it returns the function unchanged.

    Examples
    --------
    >>> @wbdit.ops.register_kernel("fold", "xpu", backend="mine")
    ... def fold_on_xpu(dictionary):
    ...     return torch.addmm(dictionary, dictionary.mT, dictionary, alpha=-1)
    >>> with wbdit.ops.backend("auto"):
    ...     wbdit.ops.serving("xpu")["fold"]
    'mine'
    """

    def decorate(kernel: Callable[..., Any]) -> Callable[..., Any]:
        plain = _without_autocast(kernel)

        def kernel_or_reference(*args: Any) -> Any:
            served = active_backend() == "auto" and _have_types(args) and available() and fits(args)
            return (plain if served else _references[op])(*args)

        _ops[op].register_kernel(device, kernel_or_reference)
        _served[op, device] = kernel_or_reference
        _kernels[op, device] = backend
        _available[backend] = available
        return kernel

    return decorate


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Select a backend inside a ``with`` block, for the whole process and every device.

    Outside such a block, the environment variable ``WBDIT_BACKEND`` selects the backend; its default is ``"auto"``.

    Parameters
    ----------
    name
        ``"reference"`` for plain PyTorch, ``"auto"`` for the kernels of each device.

    Raises
    ------
    InputError
        If `name` is neither.

    Examples
    --------
    >>> with wbdit.ops.backend("reference"):
    ...     wbdit.ops.active_backend()
    'reference'
    """
    global _forced
    before, _forced = _forced, _check(name)
    try:
        yield
    finally:
        _forced = before


def active_backend() -> str:
    """Return the active backend, ``"auto"`` or ``"reference"``.

    Raises
    ------
    InputError
        If the environment variable ``WBDIT_BACKEND`` has another value.

    Examples
    --------
    >>> with wbdit.ops.backend("auto"):
    ...     wbdit.ops.active_backend()
    'auto'
    """
    return _forced or _check(os.environ.get("WBDIT_BACKEND", "auto"))


def serving(device: str) -> dict[str, str]:
    """Return the backend that serves each op on a device type now.

    For ``"cpu"`` it first builds the CPU kernels, unless the active backend is ``"reference"``.

    Parameters
    ----------
    device
        Device type, such as ``"cpu"`` or ``"cuda"``.

    Returns
    -------
    Names of the backends by op: ``"csrc"``, ``"triton"``, ``"reference"``, or one given to :func:`register_kernel`.

    Examples
    --------
    >>> with wbdit.ops.backend("reference"):
    ...     backends = wbdit.ops.serving("cpu")
    >>> list(backends)[:3]
    ['adaln', 'adaln_backward', 'count_draw']
    >>> backends["adaln"]
    'reference'
    """
    here = {} if active_backend() == "reference" else {op: name for (op, on), name in _kernels.items() if on == device}
    there = {name for name in set(here.values()) if _available[name]()}
    here = {op: name for op, name in here.items() if name in there}
    return {op: here.get(op, "reference") for op in sorted(_ops)}


def _have_types(args: tuple[Any, ...]) -> bool:
    """Return whether the engines support all dtypes: of tensors, of lists of them, and dtypes asked for."""
    for a in args:
        if isinstance(a, list) and not _have_types(tuple(a)):
            return False
        dtype = a.dtype if isinstance(a, Tensor) else a
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype not in TYPES:
            return False
    return True


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Disable autocast inside a function, so that it computes in the dtypes of its arguments."""

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
        raise InputError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    return name
