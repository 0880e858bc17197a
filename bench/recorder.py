"""A record of everything that a GPU would run: our kernels' launches and PyTorch's own ops, with the tensors of each.

A launch's bytes are compulsory: each tensor that it reads or writes counts once, by its memory, in which a dimension of
stride 0 has one element. PyTorch's ops count if they run a kernel or copy memory; views and uninitialized tensors do
not. Such an op is one launch here. On a GPU it may be more: cuBLAS can split a product and add the parts in a second.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from access import Access, access_of
from roofline import FLOPS, Cost
from torch import Tensor
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
PLACE = torch.ops.prim.device.default
OVERWRITTEN = ("copy_", "fill_", "zero_", "uniform_", "normal_", "random_", "bernoulli_")
ADDING = ("addmm", "baddbmm")
GATHERED = ("index", "embedding", "gather", "index_select")


class Operand(NamedTuple):
    """A part of memory that a launch reads or writes: its storage, its offset there, its elements and its bytes."""

    storage: int
    offset: int
    values: int
    bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> Operand:
        """Return a tensor's memory; a dimension of stride 0 counts as one element."""
        values = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        size = tensor.dtype.itemsize
        return cls(tensor.untyped_storage()._cdata, tensor.storage_offset() * size, values, values * size)


@dataclass(frozen=True)
class Launch:
    """A kernel's launch, or an op of PyTorch that runs one.

    `flops` counts matrix products, and is None if the kernel has some and :data:`roofline.FLOPS` does not know it.
    `replayed` says whether a CUDA graph launches it. PyTorch's grids are unknown.
    """

    kernel: str
    ours: bool
    grid: tuple[int, ...] | None
    reads: tuple[Operand, ...]
    writes: tuple[Operand, ...]
    flops: float | None
    replayed: bool = False

    @property
    def read(self) -> int:
        """Bytes read."""
        return sum(operand.bytes for operand in self.reads)

    @property
    def written(self) -> int:
        """Bytes written."""
        return sum(operand.bytes for operand in self.writes)

    @property
    def cost(self) -> Cost:
        """Bytes moved and FLOPs of products; unknown FLOPs count as none."""
        return Cost(self.read + self.written, self.flops or 0.0)


class Graph:
    """A CUDA graph: the launches that it captured, which each replay makes."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.captured: list[Launch] = []

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Capture the launches inside a ``with`` block, which do not run."""
        launches = self.recorder.launches
        begun = len(launches)
        with self.recorder.recording():
            yield
        self.captured = [replace(launch, replayed=True) for launch in launches[begun:]]
        del launches[begun:]

    def replay(self) -> None:
        """Run the captured launches."""
        if self.recorder.is_recording:
            self.recorder.launches += self.captured


class Recorder(TorchDispatchMode):
    """The launches so far, in order, of the ``with`` blocks of :meth:`recording`.

    As a context manager, inside FakeTensorMode, it sees each op of PyTorch, and lets those on a CPU compute. The driver
    of ``drylaunch.py`` calls :meth:`on_launch` for our kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.compiled: list[Any] = []  # Triton's compiled kernels
        self.choose: Callable[[str, Sequence[Any]], Any] = lambda op, candidates: candidates[0]
        self._access: dict[int, tuple[Any, Access]] = {}
        self.is_recording = self._is_backward = False

    def recording(self) -> contextlib.AbstractContextManager[None]:
        """Record the launches inside a ``with`` block."""
        return self._with("is_recording")

    def graph(self) -> Graph:
        """Return a new CUDA graph."""
        return Graph(self)

    def going_back(self) -> contextlib.AbstractContextManager[None]:
        """Run autograd's engine inside a ``with`` block.

        The engine would look for the streams of a GPU, so PyTorch's C++ is told there that tensors are on no device.
        """
        return self._with("_is_backward")

    @contextlib.contextmanager
    def _with(self, state: str) -> Iterator[None]:
        before = getattr(self, state)
        setattr(self, state, True)
        try:
            yield
        finally:
            setattr(self, state, before)

    def on_launch(self, source: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """Record a launch of one of our kernels."""
        if not self.is_recording:
            return
        kernel, access = self._look_up(source)
        tensors = [t for t in map(_tensor, _flat(arguments.values())) if t is not None]
        count = FLOPS.get(source.fn.__name__)
        flops = count({name: _tensor(value, value) for name, value in arguments.items()}) if count else None
        self.launches.append(
            Launch(
                kernel.metadata.name,
                True,
                grid,
                _operands(t for t, used in zip(tensors, access.reads, strict=True) if used),
                _operands(t for t, used in zip(tensors, access.writes, strict=True) if used),
                flops if count or access.multiplies else 0.0,
            )
        )

    def _look_up(self, source: Any) -> tuple[Any, Access]:
        """Return the compiled kernel of a source, and what it does with its tensors."""
        if id(source) not in self._access:
            kernel = next(kernel for kernel in self.compiled if kernel.src is source)
            self._access[id(source)] = kernel, access_of(kernel)
        return self._access[id(source)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op and record it; run our own ops, and composite ones, as what they consist of."""
        kwargs = kwargs or {}
        if func is PLACE:
            return torch.device("meta") if self._is_backward else args[0].device
        if not _is_on_gpu(args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.namespace == "wbdit":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(DispatchKey.CUDA), *args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        if self._is_backward and func is aten._to_copy.default and _is_unchanged(args[0], **kwargs):
            return args[0]  # a copy to the device on which the tensor is
        try:
            out = func(*args, **kwargs)
        except DataDependentOutputException as error:
            raise RuntimeError(f"{func} reads a value from the GPU: the host would wait for it") from error
        if self.is_recording and func.namespace == "aten" and _runs_a_kernel(func, args, kwargs, out):
            self.launches += self._of_pytorch(func, args, kwargs, out)
        return out

    def _of_pytorch(self, func: Any, args: Any, kwargs: Any, out: Any) -> Iterator[Launch]:
        name = func._schema.name.split("::")[1]
        changed = _written(func, args, kwargs)
        written = changed or _tensors(out)
        read = _tensors(args, kwargs)
        if changed and (name in OVERWRITTEN or func._overloadname.endswith("out")):
            read = [t for t in read if not any(t is other for other in changed)]
        if not changed and (name.startswith("new_") or name.endswith("_like")):
            read = []
        if name in ADDING and not changed and read[0].ndim > 1:  # PyTorch first copies what it adds to
            yield Launch("aten::copy_", False, None, _operands(read[:1]), _operands(written), 0.0)
            read[0] = written[0]
        reads = _operands(read)
        if name in GATHERED:  # at most as much of the table as there are results
            most = sum(t.nbytes for t in written)
            reads = tuple(operand._replace(bytes=min(operand.bytes, most)) for operand in reads)
        count = flop_registry.get(func.overloadpacket)
        flops = float(count(*args, **kwargs, out_val=out)) if count else 0.0
        yield Launch(f"aten::{name}", False, None, reads, _operands(written), flops)


def _flat(arguments: Iterable[Any]) -> Iterator[Any]:
    """Return arguments one by one, those in tuples too."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _flat(argument)
        else:
            yield argument


def _tensor(value: Any, otherwise: Any = None) -> Any:
    """Return a kernel's argument if it is a tensor, and the tensor of a tensor descriptor."""
    if isinstance(value, Tensor):
        return value
    return value.base if hasattr(value, "base") and hasattr(value, "block_shape") else otherwise


def _operands(tensors: Iterable[Tensor]) -> tuple[Operand, ...]:
    """Return the GPU memory of tensors, each part once."""
    return tuple(dict.fromkeys(Operand.of(t) for t in tensors if t.numel() and t.device.type == "cuda"))


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_on_gpu(args: Any, kwargs: Any) -> bool:
    """Return whether an op takes fake tensors, or makes a tensor on the GPU."""
    device = kwargs.get("device")
    made = device is not None and torch.device(device).type == "cuda"
    return made or any(isinstance(t, FakeTensor) for t in _tensors(args, kwargs))


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the arguments that an op writes to, as its schema says."""
    schema = func._schema.arguments
    given = dict(zip((argument.name for argument in schema), args, strict=False)) | kwargs
    return _tensors([given.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write])


def _runs_a_kernel(func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Return whether an op runs a kernel or copies memory on a GPU."""
    written = _written(func, args, kwargs)
    touched = written or _tensors(out)
    name = func._schema.name.split("::")[1]
    if not any(t.numel() for t in touched) or "empty" in name:
        return False
    given = _tensors(args, kwargs)
    if all(t.device.type == "cpu" for t in (*given, *touched)):
        return False
    storages = {t.untyped_storage()._cdata for t in given}
    return bool(written) or any(t.untyped_storage()._cdata not in storages for t in touched)


def _is_unchanged(tensor: Tensor, dtype: torch.dtype | None = None, **options: Any) -> bool:
    return dtype in (None, tensor.dtype)
