"""Build and load the CPU kernels of csrc/.

Every wheel ships the sources. The wheel for Linux on x86-64 also ships the library compiled from them, which is used if
it matches the sources and flags. Otherwise the machine's own compiler builds one per user, on first use or by
``wbdit build``. The kernels use PyTorch's stable ABI: one library serves every Python, and every PyTorch from 2.10.
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from wbdit._cache import cache_folders, is_private

COMPILERS = ("g++", "clang++", "c++")
FLAGS = "-std=c++20 -O3 -fno-math-errno -fopenmp-simd -fPIC -fvisibility=hidden"
TORCH_API = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10, the oldest supported version
ERROR = r"^(?!collect2|clang).*\berror: |undefined (reference|symbol)|cannot find"  # not "collect2: error: ..."
PREFIX = "wbdit_cpu-"
UNFINISHED = ".building-"
DAY = 86400.0
KEEP_DAYS = 30
JOBS = min(4, os.cpu_count() or 1)
SECONDS_A_FILE = 5

logger = logging.getLogger("wbdit")
_lock = threading.Lock()
_outcome: bool | None = None  # result of this process's one attempt to load; None before it
_why = ""
_fault = ""  # why the prebuilt library cannot be loaded here, or ""
_warned = False


class BuildError(RuntimeError):
    """The error raised if the CPU kernels cannot be compiled or loaded; its message is one line with the reason."""


def available() -> bool:
    """Return whether the CPU kernels are loaded; the first call in a process tries to build and load them.

    If that fails, it emits one ``RuntimeWarning``. Later calls return False without another attempt.
    """
    if _outcome is not None:
        return _outcome
    try:
        load()
    except BuildError as error:
        _warn_once(str(error))
    return bool(_outcome)


def load() -> None:
    """Load the CPU kernels into PyTorch, once per process: the prebuilt library, else a compiled one.

    Raises
    ------
    BuildError
        If they cannot be compiled or loaded. Later calls raise the same error without another attempt.
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
    """Return the path of the library: prebuilt, or compiled earlier, or compiled now after a log warning.

    Raises
    ------
    BuildError
        If there is no compiler, no private writable folder, or a compiler error.
    """
    prebuilt = _prebuilt()
    if _loads(prebuilt):
        return prebuilt
    spec, folders = _build_spec(), cache_folders()
    library = spec.find_in(folders)
    if library is not None:
        with suppress(OSError):  # the folder may be read-only
            os.utime(library)  # mark it as used, so that _sweep keeps it
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
    """Return one line on the state of the CPU kernels, without compiling anything."""
    if _outcome is False:
        return f"not in use, {_why}"
    try:
        prebuilt = _prebuilt()
        if _loads(prebuilt):
            return f"prebuilt, {prebuilt}"
        spec = _build_spec()
    except BuildError as error:
        return f"cannot be built, {error}"
    library = spec.find_in(cache_folders())
    if library is not None:
        return f"compiled here, {library}"
    if spec.obstacle:
        return f"cannot be built, {spec.obstacle}"
    return "not built yet: `wbdit build` or the first use of a CPU op builds them"


def compile_for_wheel(folder: Path, additions: Sequence[str]) -> Path:
    """Compile the library that the wheel for this platform ships, into a folder; ``setup.py`` calls this.

    Parameters
    ----------
    folder
        The wheel's folder of C++ sources. The sources in it must equal those of :func:`source_dir`.
    additions
        Texts of C++ files that are compiled into the library in addition.

    Raises
    ------
    BuildError
        If there is no compiler or a compiler error.
    """
    spec = _build_spec()
    if spec.obstacle:
        raise BuildError(spec.obstacle)
    with tempfile.TemporaryDirectory() as scratch:
        extra = [Path(scratch, f"addition-{i}.cpp") for i in range(len(additions))]
        for path, text in zip(extra, additions, strict=True):
            path.write_text(text)
        compiled = _compile(replace(spec, sources=(*spec.sources, *extra)), Path(scratch))
        return Path(shutil.copyfile(compiled, folder / _prebuilt().name))


def source_dir() -> Path:
    """Return the folder of the C++ sources: inside an installed package, or beside the package in a checkout.

    Raises
    ------
    BuildError
        If neither folder exists.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError(f"the C++ sources are missing from {package}: install wbdit again")


# the build's inputs


@dataclass(frozen=True)
class _BuildSpec:
    """The inputs of the build: sources, compiler, flags, and the library name derived from them."""

    sources: tuple[Path, ...]
    compiler: tuple[str, ...]  # empty if none is found
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    name: str  # file name; without a compiler, a glob pattern that matches any compiler's library
    obstacle: str  # the reason why compiling is impossible, or ""; an existing library is used regardless

    def find_in(self, folders: list[Path]) -> Path | None:
        """Return the newest matching library, from folders and files that no other user can write to, or None."""
        for folder in filter(is_private, folders):
            built = [library for library in folder.glob(self.name) if is_private(library)]
            if built:
                return max(built, key=lambda library: library.stat().st_mtime)
        return None


def _build_spec() -> _BuildSpec:
    """Collect the build's inputs and derive the library's name from a hash of them.

    The compiler has a separate hash in the name. A library built in an image or on a cluster's login node can thus be
    found on machines without a compiler.
    """
    sources = _sources()
    compiler, version = _compiler()
    root, obstacle = _torch_root()
    if not compiler:
        obstacle = f"no C++ compiler (looked for {', '.join(_compiler_names())}): install g++, or set CXX to one"
    flags = _flags(root)
    key = _digest(_texts(sources), str(torch.__version__), flags, sys.platform, platform.machine())
    by = _digest(compiler, version)[:8] if compiler else "*"
    files = tuple(path for path in sources if path.suffix == ".cpp")
    return _BuildSpec(files, compiler, *flags, f"{PREFIX}{key}-{by}{_suffix()}", obstacle)


def _prebuilt() -> Path:
    """Return the path of the wheel's library; there is none if the wheel is another platform's, or in a checkout.

    The name has a hash of sources and flags only: the library was compiled elsewhere and serves every PyTorch release.
    """
    key = _digest(_texts(_sources()), FLAGS, TORCH_API, _words("WBDIT_CXXFLAGS"), sys.platform, platform.machine())
    return source_dir() / f"{PREFIX}{key}-prebuilt{_suffix()}"


def _loads(prebuilt: Path) -> bool:
    """Return whether the wheel's library exists and loads; if it does not load, log the reason once.

    Its owner does not matter: whoever can write to the package can change its Python code as well.
    """
    global _fault
    if _fault or not prebuilt.is_file():
        return False
    try:
        _load(prebuilt)
    except BuildError as error:
        _fault = str(error)
        logger.warning(f"wbdit: the prebuilt CPU kernels do not load here, so they are compiled: {error}")
    return not _fault


def _sources() -> list[Path]:
    """Return the C++ sources and headers, in order."""
    if sys.platform == "win32":
        raise BuildError("the CPU kernels are not built on Windows")
    sources = sorted(path for path in source_dir().iterdir() if path.suffix in (".cpp", ".h"))
    if not any(path.suffix == ".cpp" for path in sources):
        raise BuildError(f"there are no C++ sources in {source_dir()}")
    return sources


def _texts(sources: list[Path]) -> list[tuple[str, str]]:
    return [(path.name, path.read_bytes().hex()) for path in sources]


def _suffix() -> str:
    return ".dylib" if sys.platform == "darwin" else ".so"


def _torch_root() -> tuple[Path, str]:
    """Return the folder that holds PyTorch's include and lib, and an error message, or "" if the headers exist."""
    roots = [Path(torch.__file__).parent, Path(sys.prefix)]  # a wheel; a distribution that shares its libraries
    for root in roots:
        if (root / "include/torch/csrc/stable/library.h").is_file():
            return root, ""
    return roots[0], f"PyTorch's C++ headers are missing from {roots[0]}: install a PyTorch build that includes them"


def _flags(root: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the compiler flags and the linker flags."""
    extra = _words("WBDIT_CXXFLAGS")
    libraries = root / "lib"
    if sys.platform == "darwin":
        link = ["-undefined", "dynamic_lookup", f"-Wl,-rpath,{libraries}", f"-L{libraries}", "-ltorch_cpu"]
    else:
        link = [f"-L{libraries}", "-Wl,--as-needed", "-ltorch_cpu"]
    return (*FLAGS.split(), TORCH_API, f"-I{root / 'include'}", *extra), (*link, *extra)


def _compiler() -> tuple[tuple[str, ...], str]:
    """Return the compiler command and the first line of its version; an empty command if none is found."""
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
    """Remove leftovers of interrupted builds after a day, and unused libraries after `KEEP_DAYS` days."""
    for pattern, days in ((f"{UNFINISHED}*", 1), (f"{PREFIX}*", KEEP_DAYS)):
        for path in folder.glob(pattern):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > days * DAY:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on the folder, so that one process builds at a time; it ends with the process."""
    import fcntl

    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with suppress(OSError):  # some network file systems lack locks: two builds are harmless, the last one stays
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# compiling and loading


def _make(spec: _BuildSpec, folder: Path) -> Path:
    """Compile the library into the folder, unless another process just did; raise OSError if it is not writable."""
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
                logger.warning(f"wbdit: compiling the CPU kernels into {folder} (once, about {seconds} seconds)")
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
    """Move the finished library into place atomically, with the read permissions of its folder."""
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
            "After fixing this, run `wbdit build` or start a new process.",
            RuntimeWarning,
            stacklevel=3,
        )
