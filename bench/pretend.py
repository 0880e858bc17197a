"""A GPU that is not there: the project's own code runs on CUDA tensors without data.

PyTorch's fake tensors have a shape, a dtype and a device, but no memory, and no op on them computes. Here they say that
they are on a GPU, so the code takes every branch that it takes on one. Kernels are compiled and not launched
(``drylaunch.py``), and :class:`Recorder` (``recorder.py``) sees each of them and each of PyTorch's ops.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from drylaunch import dry
from recorder import Recorder
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

DEVICE = torch.device("cuda:0")
SLOTS = int(torch._C._autograd.DeviceType.PrivateUse1) + 1  # the last device type
ALIGNED = 512  # bytes: PyTorch's allocator aligns the memory of each tensor to this


@contextlib.contextmanager
def gpu(arch: int) -> Iterator[Recorder]:
    """Pretend that this machine has a GPU of an architecture, such as 90, inside a ``with`` block; record what it runs.

    Tensors on the GPU are fake there. Autotuned choices are the ones expected to be fastest.
    """
    recorder = Recorder()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_device_guard())
        for target, name, substitute in _substitutes(arch, recorder):
            stack.enter_context(patch.object(target, name, substitute, create=True))
        recorder.compiled = stack.enter_context(dry(arch, recorder.on_launch))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(recorder)
        yield recorder


def _substitutes(arch: int, recorder: Recorder) -> Iterator[tuple[Any, str, Any]]:
    """Yield the functions that would ask a GPU: what holds them, their name and what answers instead."""
    from wbdit.kernels import tuning

    addresses = _Addresses()
    yield torch.cuda, "get_device_capability", lambda device=None: divmod(arch, 10)
    yield torch.cuda, "device_of", lambda tensor: contextlib.nullcontext()
    yield torch.cuda, "is_current_stream_capturing", lambda: False
    yield torch.cuda, "get_rng_state", lambda device=None: torch.empty(16, dtype=torch.uint8, device="cpu")
    yield torch.cuda, "set_rng_state", lambda state, device=None: None
    yield torch.cuda, "is_bf16_supported", lambda *given, **named: True
    yield torch.cuda.amp.common, "amp_definitely_not_available", lambda: False  # else autocast is off
    yield torch.utils._foreach_utils, "_foreach_supported_types", [torch.Tensor, torch.nn.Parameter, FakeTensor]
    yield Tensor, "backward", _backward(Tensor.backward, recorder)
    yield FakeTensor, "data_ptr", lambda tensor: addresses.of(tensor)
    yield FakeTensor, "numpy", lambda tensor: np.zeros(tensor.shape)
    yield torch.cuda, "Stream", lambda *given, **named: _Stream()
    yield torch.cuda, "current_stream", lambda device=None: _Stream()
    yield torch.cuda, "stream", lambda stream: contextlib.nullcontext()
    yield torch.cuda, "CUDAGraph", recorder.graph
    yield torch.cuda, "graph", lambda graph, **named: graph.capturing()
    yield torch.cuda, "graph_pool_handle", lambda: (0, 0)
    yield tuning, "choose", lambda op, shape, candidates, launch, device: recorder.choose(op, candidates)


class _Stream:
    """A stream of the pretended GPU, on which nothing has to wait."""

    def wait_stream(self, other: Any) -> None:
        pass


def _backward(own: Callable[..., None], recorder: Recorder) -> Callable[..., None]:
    def backward(tensor: Tensor, *given: Any, **named: Any) -> None:
        with recorder.going_back():
            own(tensor, *given, **named)

    return backward


class _Addresses:
    """Addresses of fake tensors, with the alignment of a GPU's, on which Triton specializes kernels."""

    def __init__(self) -> None:
        self.starts: dict[int, int] = {}

    def of(self, tensor: Tensor) -> int:
        start = self.starts.setdefault(tensor.untyped_storage()._cdata, ALIGNED * (len(self.starts) + 1))
        return start + tensor.storage_offset() * tensor.dtype.itemsize


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    """Let autograd ask for the current CUDA device inside a ``with`` block, on a CPU build of PyTorch.

    A build with CUDA gets a guard that does nothing from FakeTensorMode, if there is no GPU. So does a CPU build, but
    only if CUDA's slot already holds a guard without devices: that of another device type serves.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    slots = (ctypes.c_void_p * SLOTS).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda = int(torch._C._autograd.DeviceType.CUDA)
    if slots[cuda] is not None:
        yield
        return
    for other in [guard for guard in slots if guard is not None]:
        slots[cuda] = other
        torch._C._ensureCUDADeviceGuardSet()
        if slots[cuda] != other:
            break
    try:
        yield
    finally:
        slots[cuda] = None
