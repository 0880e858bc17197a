"""Compile the kernels for any GPU without having it: the project's own launches on CPU tensors, without running them.

Triton asks its driver for the target and gives it the binary. With a driver that reports a chosen GPU and loads
nothing, every launch only compiles, with the same arguments, options and specializations as a real launch.
"""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

# shared memory available to one program, in bytes (CUDA C++ Programming Guide, compute capabilities; CDNA 3 ISA)
SHARED = {75: 65536, 80: 166912, 86: 101376, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536}
MULTIPROCESSORS = 132
OnLaunch = Callable[[Any, tuple[int, ...], dict[str, Any]], object]  # source, grid, arguments by name
_serial = itertools.count()


class DryDriver(DriverBase):
    """Driver of one GPU of an architecture: an int for NVIDIA's compute capability, a name for AMD.

    `on_launch` is called in place of a launch.
    """

    def __init__(self, arch: int | str, on_launch: OnLaunch = lambda source, grid, arguments: None) -> None:
        backend, warp = ("cuda", 32) if isinstance(arch, int) else ("hip", 64)
        self.target = GPUTarget(backend, arch, warp)
        self.device = (arch, next(_serial))  # a new key each time, so that nothing counts as already compiled
        properties = {
            "max_shared_mem": SHARED[arch],
            "multiprocessor_count": MULTIPROCESSORS,
            "max_num_regs": 65536,
            "warpSize": warp,
            "sm_clock_rate": 1_700_000,
            "mem_clock_rate": 2_600_000,
            "mem_bus_width": 5120,
        }
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda name, binary, shared, device: (0, 0, 0, 0, 1024),
            unload_module=lambda module: None,
        )
        self.launcher_cls = lambda source, metadata: functools.partial(_launch, on_launch, source)

    @classmethod
    def is_active(cls) -> bool:
        """Return True, since Triton would otherwise look for a GPU."""
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Return the type unchanged; the launcher that would need it is not built."""
        return ty

    def get_current_target(self) -> GPUTarget:
        """Return the target to compile for."""
        return self.target

    def get_active_torch_device(self) -> torch.device:
        """Return the device of the tensors."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        """Return a benchmark function that reports the same time for every configuration."""
        return lambda launch, quantiles=None, **options: (launch(), [1.0] * len(quantiles or (1,)))[1]

    def get_current_device(self) -> Any:
        """Return the device's key."""
        return self.device

    def set_current_device(self, device: Any) -> None:
        """Do nothing: there is only one device."""

    def get_current_stream(self, device: Any) -> int:
        """Return the default stream."""
        return 0

    def assemble_tensormap_to_arg(self, info: Any, args: Any) -> Any:
        """Return the arguments unchanged."""
        return args


def _launch(on_launch: OnLaunch, source: Any, *given: Any) -> None:
    """Take a launch's arguments: grid, stream, function, two kinds of metadata, two hooks, the kernel's own."""
    on_launch(source, given[:3], dict(zip(source.fn.arg_names, given[9:], strict=True)))


@contextmanager
def dry(arch: int | str, on_launch: OnLaunch = lambda source, grid, arguments: None) -> Iterator[list[Any]]:
    """Compile every launch inside a ``with`` block for `arch`; yield the list of compiled kernels.

    Each launch calls `on_launch` with the kernel's source (the attribute ``src`` of a compiled kernel), grid and
    arguments.
    """
    compiled: list[Any] = []
    driver = DryDriver(arch, on_launch)

    def note(*, fn: Any, **_: Any) -> None:
        compiled.append(list(fn.jit_function.device_caches[driver.device][0].values())[-1])

    before = triton.runtime.driver._active, triton.knobs.runtime.jit_post_compile_hook
    triton.runtime.driver.set_active(driver)
    triton.knobs.runtime.jit_post_compile_hook = note
    try:
        yield compiled
    finally:
        triton.runtime.driver._active, triton.knobs.runtime.jit_post_compile_hook = before


@dataclass(frozen=True)
class Resources:
    """Resources of a compiled kernel, and counts of some kinds of instructions."""

    name: str
    warps: int
    registers: int
    shared: int
    spills: int
    matrix: int
    asynchronous: int
    wide_loads: int

    @property
    def registers_of_a_program(self) -> int:
        """Registers per program, over all its threads; a multiprocessor has 65,536."""
        return self.registers * self.warps * 32


# names of the matrix and copy instructions expected in each architecture's disassembly
MATRIX = {75: r"HMMA", 80: r"HMMA", 86: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA", 120: r"HMMA"}
ASYNCHRONOUS = r"LDGSTS|UTMALDG"


def resources(kernel: Any, arch: int) -> Resources:
    """Return the resources of a compiled kernel, read with the NVIDIA tools that triton includes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        code = _run(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    taken = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE)
    count = Counter(names)

    def matching(pattern: str) -> int:
        return sum(n for name, n in count.items() if re.match(pattern, name))

    return Resources(
        name=kernel.metadata.name.lstrip("_"),
        warps=kernel.metadata.num_warps,
        registers=taken["REG"],
        shared=kernel.metadata.shared,
        spills=matching(r"STL|LDL"),
        matrix=matching(MATRIX[arch]),
        asynchronous=matching(ASYNCHRONOUS),
        wide_loads=matching(r"LDG\.E\S*128|LDGSTS\.E\S*128|UTMALDG"),
    )


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
