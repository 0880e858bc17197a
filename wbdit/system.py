"""What works on this machine: versions, kernels, optional packages, and the commands that add what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires

import torch
from packaging.requirements import Requirement
from torch import distributed

from wbdit import ops
from wbdit._version import MISSING, __version__, installed_version
from wbdit.ops import build, cpu, triton

EXTRAS = {  # each optional set of packages that a user may want, and what it is for
    "report": "evaluation, reports, the demo, choosing variable genes",
    "gpu": "Triton kernels on an NVIDIA GPU",
    "tensorboard": "wbdit train --tensorboard",
    "trace": "named ranges in a domain of their own, for NVIDIA Nsight",
}
COMPILER = {
    "Linux": "sudo apt-get install g++, or conda install -c conda-forge gxx",
    "Darwin": "xcode-select --install",
}


def describe() -> str:
    """Return what works on this machine and why, with one command for each part that is missing.

    The CPU kernels are loaded for it, and compiled first if there are none yet.

    Raises
    ------
    InputError
        If the environment variable ``WBDIT_CPU`` names an unknown processor level.

    Examples
    --------
    >>> from wbdit import system
    >>> print(system.describe())
    wbdit ...
    """
    level = cpu.cpu_level()  # loads the kernels, so that the table below shows the backends that ops will use
    lines = [
        f"wbdit {__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} CPU threads",
        f"system: {_system()}",
        f"cpu kernels: {_cpu_kernels(level)}",
        f"cuda: {_cuda()}",
        f"several processes (torchrun): {_distributed()}",
        f"triton: {_triton()}",
        "optional packages:",
        *(f"  {extra:12} {_extra(extra)}" for extra in EXTRAS),
        "backend of each op:",
    ]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for op, backend in ops.serving(device).items():
            lines.append(f"  {device:4}  {op:22}  {backend}{_reason(device, backend)}")
    return "\n".join(lines)


def _system() -> str:
    """Return the operating system, the processor type, and what wbdit supports there."""
    system, machine = platform.system(), platform.machine()
    if system == "Windows":
        support = "ops run on the PyTorch reference, because C++ and Triton kernels need Linux; untested"
    elif system == "Darwin":
        support = "CPU kernels are compiled on first use, else the PyTorch reference runs; untested. No GPU is used"
    elif system == "Linux" and machine in ("x86_64", "AMD64"):
        support = "CPU kernels come prebuilt in this system's wheel; GPU kernels need an NVIDIA GPU and Triton"
    elif system == "Linux":
        support = "CPU kernels are compiled on first use, without this processor's own instructions; untested"
    else:
        support = "unknown to wbdit: ops run on the PyTorch reference if the CPU kernels do not compile"
    return f"{system} {machine}. {support}."


def _cpu_kernels(level: str) -> str:
    """Return the state of the CPU kernels, with a command if a compiler is missing."""
    if level != "none":
        return f"{build.status()} (instructions: {level})"
    fix = COMPILER.get(platform.system())
    missing = fix is not None and "no C++ compiler" in build.status()
    return build.status() + (f". To get one: {fix}" if missing else "")


def _cuda() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        return "no device, because this PyTorch is built without CUDA: pip install --force-reinstall torch"
    return "no device"


def _distributed() -> str:
    """Return what processes that train together can use, and the number of this process among them."""
    if not distributed.is_available():
        return "not in this PyTorch"
    backends = {"gloo on CPUs": distributed.is_gloo_available(), "nccl on GPUs": distributed.is_nccl_available()}
    found = ", ".join(name for name, is_there in backends.items() if is_there) or "no backend"
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    return f"{found}; this is process {rank} of {size}" if rank and size else found


def _triton() -> str:
    found = installed_version("triton")
    if platform.system() != "Linux":
        return f"{found}; the GPU kernels need Linux"
    if torch.cuda.is_available():
        return found if found != MISSING else "not installed: pip install 'wbdit[gpu]'"
    return f"{found}, and not needed without an NVIDIA GPU"


def _extra(extra: str) -> str:
    """Return whether the packages of an extra are installed, what they are for, and the command that installs them."""
    try:
        listed = [Requirement(line) for line in requires("wbdit") or ()]
    except PackageNotFoundError:
        return "unknown, because wbdit itself is not installed: pip install ."
    # a requirement without the extra is wbdit's own; one for another platform belongs to nobody here
    wanted = [need for need in listed if need.marker and not need.marker.evaluate({"extra": ""})]
    wanted = [need for need in wanted if need.marker and need.marker.evaluate({"extra": extra})]
    if not wanted:
        return f"not for this system ({EXTRAS[extra]})"
    faults = list(filter(None, map(_fault, wanted)))
    if not faults:
        return f"installed ({EXTRAS[extra]})"
    return f"missing: {', '.join(faults)} ({EXTRAS[extra]}): pip install 'wbdit[{extra}]'"


def _fault(need: Requirement) -> str:
    """Return the name of a package that is missing or has a wrong version, with the version needed, or ""."""
    found = installed_version(need.name)
    if found == MISSING:
        return need.name
    return "" if need.specifier.contains(found, prereleases=True) else f"{need.name}{need.specifier}, not {found}"


def _reason(device: str, backend: str) -> str:
    """Return the reason why `backend` serves the ops on `device`, for display."""
    if backend == "csrc":
        return f" ({cpu.cpu_level()})"
    if backend == "triton":
        return f" ({triton.version()})"
    if ops.active_backend() == "reference":
        return " (forced by WBDIT_BACKEND)"
    if device == "cpu" and not build.available():
        return " (no CPU kernels, see above)"
    if device == "cuda" and not triton.available():
        return ' (no triton here: pip install "wbdit[gpu]")'
    return " (no kernel for this device)" if backend == "reference" else ""
