"""The CPU kernels of csrc/, compiled once into a folder of the user's and loaded from there.

PyTorch's stable ABI needs no Python headers and holds from one PyTorch to the next, so the sources travel in the wheel
and are compiled by the compiler that the machine has: on first use, or ahead of it by ``wbdit build``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from wbdit._cache import cache_folders, is_private

COMPILERS = ("g++", "clang++", "c++")
FLAGS = "-std=c++20 -O3 -fno-math-errno -fopenmp-simd -fPIC -fvisibility=hidden"
TORCH_API = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # of torch 2.10, the oldest that is supported
ERROR = r"^(?!collect2|clang).*\berror: |undefined (reference|symbol)|cannot find"  # not "collect2: error: ..."
PREFIX = "wbdit_cpu-"
UNFINISHED = ".building-"
DAY = 86400.0
KEEP_DAYS = 30
JOBS = min(4, os.cpu_count() or 1)
SECONDS_A_FILE = 5

logger = logging.getLogger("wbdit")
_lock = threading.Lock()
_outcome: bool | None = None  # of the one attempt to load in this process; None before it
_why = ""
_warned = False


class BuildError(RuntimeError):
    """The kernels cannot be compiled or loaded here: the message is one line and says why."""


def available() -> bool:
    """Say whether the CPU kernels are loaded, after one attempt a process to build and load them.

    Where that fails it gives one ``RuntimeWarning``, and from then on returns False at once.
    """
    if _outcome is not None:
        return _outcome
    try:
        load()
    except BuildError as error:
        _warn_once(str(error))
    return bool(_outcome)


def load() -> None:
    """Build the CPU kernels, if they are not yet built, and load them into PyTorch, once a process.

    Raises
    ------
    BuildError
        If they cannot be compiled or loaded. It is not tried again: later calls raise the same at once.
    """
    global _outcome, _why
    with _lock:
        if _outcome is None:
            try:
                _load(build())
                _outcome = True
            except (BuildError, OSError) as error:
                _outcome, _why = False, str(error)
    if not _outcome:
        raise BuildError(_why)


def build() -> Path:
    """Return the compiled library, compiling it if this user has none that fits; logs a warning before that work.

    Raises
    ------
    BuildError
        If there is no compiler, no folder to be trusted, or the compiler refuses the sources.
    """
    spec, folders = _build_spec(), cache_folders()
    library = spec.find_in(folders)
    if library is not None:
        with suppress(OSError):  # the folder may be read-only
            os.utime(library)  # it was used today, so the sweep passes it by
        return library
    if spec.obstacle:
        raise BuildError(spec.obstacle)
    refusals = []
    for folder in folders:
        try:
            return _make(spec, folder)
        except OSError as error:
            refusals.append(f"{folder} ({error.strerror or error})")
    raise BuildError(f"cannot write to {' or '.join(refusals)}: set WBDIT_CACHE to a folder of your own")


def status() -> str:
    """Return one line on where the CPU kernels stand, without building anything."""
    if _outcome is False:
        return f"not in use, {_why}"
    try:
        spec = _build_spec()
    except BuildError as error:
        return f"cannot be built, {error}"
    library = spec.find_in(cache_folders())
    if library is not None:
        return f"built, {library}"
    if spec.obstacle:
        return f"cannot be built, {spec.obstacle}"
    return "not built yet, the first use or `wbdit build` does that"


def source_dir() -> Path:
    """Return the folder of the C++ sources: inside the package when installed, beside it in a checkout.

    Raises
    ------
    BuildError
        If there is none.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError(f"the C++ sources are missing from {package}: install wbdit again")


# what is to be built


@dataclass(frozen=True)
class _BuildSpec:
    """All that the library depends on."""

    sources: tuple[Path, ...]
    compiler: tuple[str, ...]  # empty where there is none
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    name: str  # where there is no compiler a pattern, which any compiler's library matches
    obstacle: str  # what stands in the way of compiling, though not of a library that is there; mostly ""

    def find_in(self, folders: list[Path]) -> Path | None:
        """Return the library if it lies in one of the folders, and nobody else can have put it there."""
        for folder in filter(is_private, folders):
            built = [library for library in folder.glob(self.name) if is_private(library)]
            if built:
                return max(built, key=lambda library: library.stat().st_mtime)
        return None


def _build_spec() -> _BuildSpec:
    """Gather what the library depends on, and name it after that.

    The compiler has a part of the name to itself: a library built in an image or on a cluster's login node serves
    where there is no compiler at all.
    """
    if sys.platform == "win32":
        raise BuildError("the CPU kernels are not built on Windows")
    sources = sorted(path for path in source_dir().iterdir() if path.suffix in (".cpp", ".h"))
    if not any(path.suffix == ".cpp" for path in sources):
        raise BuildError(f"there are no C++ sources in {source_dir()}")
    compiler, version = _compiler()
    root, obstacle = _torch_root()
    if not compiler:
        obstacle = f"no C++ compiler (looked for {', '.join(_compiler_names())}): install g++, or set CXX to one"
    flags = _flags(root)
    texts = [(path.name, path.read_bytes().hex()) for path in sources]
    key = _digest(texts, str(torch.__version__), flags, sys.platform, platform.machine())
    by = _digest(compiler, version)[:8] if compiler else "*"
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    files = tuple(path for path in sources if path.suffix == ".cpp")
    return _BuildSpec(files, compiler, *flags, f"{PREFIX}{key}-{by}{suffix}", obstacle)


def _torch_root() -> tuple[Path, str]:
    """Return the folder that holds PyTorch's include and lib, and what is amiss with it, mostly nothing."""
    roots = [Path(torch.__file__).parent, Path(sys.prefix)]  # of a wheel; of distributions that share their libraries
    for root in roots:
        if (root / "include/torch/csrc/stable/library.h").is_file():
            return root, ""
    return roots[0], f"PyTorch's C++ headers are missing from {roots[0]}: install a torch that has them"


def _flags(root: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the flags to compile with and to link with."""
    extra = _words("WBDIT_CXXFLAGS")
    libraries = root / "lib"
    if sys.platform == "darwin":
        link = ["-undefined", "dynamic_lookup", f"-Wl,-rpath,{libraries}", f"-L{libraries}", "-ltorch_cpu"]
    else:
        link = [f"-L{libraries}", "-Wl,--as-needed", "-ltorch_cpu"]
    return (*FLAGS.split(), TORCH_API, f"-I{root / 'include'}", *extra), (*link, *extra)


def _compiler() -> tuple[tuple[str, ...], str]:
    """Return the compiler's command and the first line of its version; an empty command where there is none."""
    for name in _compiler_names():
        path = shutil.which(name)
        if path is not None:
            command = (path, *_words("CXX")[1:])  # CXX may read "ccache g++"
            with suppress(OSError):
                done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
                return command, done.stdout.partition("\n")[0]
    return (), ""


def _compiler_names() -> tuple[str, ...]:
    return tuple(_words("CXX")[:1]) or COMPILERS


def _words(variable: str) -> list[str]:
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise BuildError(f"cannot read the environment variable {variable} ({error})") from error


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _sweep(folder: Path) -> None:
    """Remove what was left by builds cut short, and libraries that nobody has used for long."""
    for pattern, days in ((f"{UNFINISHED}*", 1), (f"{PREFIX}*", KEEP_DAYS)):
        for path in folder.glob(pattern):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > days * DAY:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from building in the folder meanwhile; the system unlocks when a process dies."""
    import fcntl

    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with suppress(OSError):  # some network folders have no locks: there two may compile, and the last one's stays
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# the work


def _make(spec: _BuildSpec, folder: Path) -> Path:
    """Compile into the folder, unless another process has meanwhile; an OSError if it cannot be written to."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_private(folder):
        raise BuildError(
            f"{folder} belongs to another user, or others can write to it: set WBDIT_CACHE to a folder of your own"
        )
    with _locked(folder):
        library = spec.find_in([folder])
        if library is None:
            seconds = SECONDS_A_FILE * math.ceil(len(spec.sources) / JOBS)
            with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED, ignore_cleanup_errors=True) as scratch:
                logger.warning(f"wbdit: compiling the CPU kernels into {folder}, once, about {seconds} seconds")
                compiled = _compile(spec, Path(scratch))
                if _build_spec().name != spec.name:
                    raise BuildError("the sources changed while they were being compiled: try again")
                library = _put(compiled, folder / spec.name)
            _sweep(folder)
    return library


def _compile(spec: _BuildSpec, scratch: Path) -> Path:
    def compile_one(source: Path) -> str:
        target = str(scratch / f"{source.stem}.o")
        _run([*spec.compiler, *spec.compile_flags, "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compile_one, spec.sources))
    library = scratch / "library"
    _run([*spec.compiler, "-shared", *objects, "-o", str(library), *spec.link_flags])
    return library


def _put(library: Path, place: Path) -> Path:
    """Move the finished library to its place in one step, whole, and as readable as the folder is."""
    library.chmod(place.parent.stat().st_mode & 0o644)
    with library.open("rb") as file:
        os.fsync(file)
    return library.replace(place)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, env={**os.environ, "LC_ALL": "C"}
        )
    except OSError as error:
        raise BuildError(f"cannot run {command[0]} ({error.strerror})") from error
    if done.returncode:
        raise BuildError(f"{command[0]} cannot compile the CPU kernels: {_first_error(done)}")


def _first_error(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(ERROR, line)]
    return (errors or lines or [f"exit code {done.returncode}"])[0][:500]


def _load(library: Path) -> None:
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0].removeprefix(f"{library}: ")
        raise BuildError(f"cannot load {library} ({reason}): delete it to have it compiled again") from error


def _warn_once(why: str) -> None:
    global _warned
    with _lock:
        first, _warned = not _warned, True
    if first:
        warnings.warn(
            f"no CPU kernels, so the ops run on the slower PyTorch reference: {why}. "
            "Once that is mended `wbdit build` tries again, or the next process by itself.",
            RuntimeWarning,
            stacklevel=3,
        )
