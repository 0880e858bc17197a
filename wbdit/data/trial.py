"""A trial of reading a file in a child process, for files that crash or hang the library that reads them.

HDF5's C library follows the pointers in a file. A damaged file can let it crash, or search in circles for ever; no
check from outside can tell. So the file is read by a child process first, where the system offers to fork.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import select
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import anndata as ad

from wbdit.data.h5ad_check import check_h5ad
from wbdit.errors import InputError

SECONDS = 3  # of the processor, to look at the parts of a file; a legitimate one takes milliseconds
BYTES_PER_SECOND = 2 * 10**7  # slowest reading that is not taken for a hang
WHOLE = 10**8  # bytes; of larger files only parts are read in the trial
MEMORY = 10**9  # bytes, to look at the parts of a file
OTHER = "\0"  # marks the message of an error that is no InputError
PATIENCE = 300.0  # seconds of the clock, for slow disks; then the trial ends without a verdict


def try_h5ad(path: Path, whole: bool = True) -> None:
    """Check an ``.h5ad`` file as :func:`wbdit.data.h5ad_check.check_h5ad` does, and read it once, in a child process.

    Raises
    ------
    InputError
        If the check fails, or the child process crashes or hangs.
    OSError
        If reading fails with any other error.

    Examples
    --------
    >>> from pathlib import Path
    >>> from wbdit.data.trial import try_h5ad
    >>> cells.write_h5ad("cells.h5ad")
    >>> try_h5ad(Path("cells.h5ad"))
    """
    if not sys.platform.startswith("linux"):
        check_h5ad(path, whole)
        return
    reading, writing = os.pipe()
    try:
        with warnings.catch_warnings():
            # of Python 3.12 on: other threads may hold locks. h5py keeps its own over a fork; the child uses no others.
            warnings.simplefilter("ignore")
            child = os.fork()
    except OSError:  # no memory for another process
        os.close(reading)
        os.close(writing)
        check_h5ad(path, whole)
        return
    if child == 0:
        _read_and_exit(path, writing, whole)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        if not select.select([pipe], [], [], PATIENCE)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return
        message = pipe.read().decode()
    with suppress(ChildProcessError):  # somebody else waited for it
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            hangs = os.WTERMSIG(status) == signal.SIGXCPU
            raise InputError(
                "reading it never ends: it is damaged" if hangs else "reading it crashes HDF5: it is damaged"
            )
    if message.startswith(OTHER):
        raise OSError(message.removeprefix(OTHER))
    if message:
        raise InputError(message)


def _read_and_exit(path: Path, writing: int, whole: bool) -> None:
    """Read the file, and write to a pipe why it cannot be read."""
    message = ""
    try:
        faulthandler.disable()  # a crash here is an answer, not an accident
        gc.disable()  # nothing of the parent is cleaned up here
        _limit_processor(SECONDS)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _limited_memory():
                claimed = check_h5ad(path, whole)
            _limit_processor(2 * SECONDS + claimed // BYTES_PER_SECOND)
            if claimed <= WHOLE:
                ad.read_h5ad(path)
    except InputError as error:
        message = str(error)
    except BaseException as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            message = "it asks for more memory than it can fill: it is damaged"
        else:  # what failed before the end was not tried to the end, so the parent must not read it
            message = OTHER + (str(error).strip() or type(error).__name__).splitlines()[0]
    finally:
        os.write(writing, message.encode("utf-8", "replace")[:2000])
        os._exit(0)


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Let this process take no more than :data:`MEMORY` bytes beyond what it has."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    if limits[0] == resource.RLIM_INFINITY or size < limits[0]:
        resource.setrlimit(resource.RLIMIT_AS, (size, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def _limit_processor(seconds: int) -> None:
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    if most == resource.RLIM_INFINITY or seconds < most:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
