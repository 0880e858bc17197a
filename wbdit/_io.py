"""File writes: a path holds its old content or the complete new file, also after a kill, a crash or a full disk."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import anndata as ad

from wbdit._lock import FileLock
from wbdit.errors import InputError

TEMPORARY = ".wbdit-"  # prefix of the folders in which files are written before they get their names
LOCK = "lock"  # file in such a folder, locked by its process
GRACE_SECONDS = 60.0  # in which a process locks the folder that it made
FULL = {errno.ENOSPC, errno.EFBIG, *([errno.EDQUOT] if hasattr(errno, "EDQUOT") else [])}


def check_regular(path: str | Path) -> None:
    """Check that `path` is a regular file that can be read: not a folder, pipe or device, whose reading may never end.

    Raises
    ------
    InputError
        If it is missing or something else.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"no such file: {path}") from None
    except (OSError, ValueError) as error:  # a ring of links; a name that is too long or holds a null character
        raise InputError(f"cannot read {str(path)!r} ({getattr(error, 'strerror', None) or error})") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is a pipe or a device, not a file: copy its content to a file first")
    if not os.access(path, os.R_OK):
        raise InputError(f"cannot read {path} (Permission denied)")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path on the disk of `path`. If the block succeeds, what it wrote there is renamed to `path`.

    The file is on the disk before it gets its name. Temporaries that killed processes left in the folder are removed.

    Raises
    ------
    InputError
        If the folder or the file cannot be written, or the disk is full.

    Examples
    --------
    >>> from pathlib import Path
    >>> from wbdit._io import replacing
    >>> with replacing("table.txt") as temporary:
    ...     _ = temporary.write_text("all or nothing")
    >>> Path("table.txt").read_text()
    'all or nothing'
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent)
        folder, lock = _temporary_folder(path.parent)
    except OSError as error:
        raise InputError(f"cannot write to {path.parent} ({error.strerror})") from error
    try:
        yield folder / path.name
        sync(folder / path.name)
        (folder / path.name).replace(path)
        sync(path.parent)
    except OSError as error:
        raise disk_error(f"cannot write {path}", error) from error
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def disk_error(what: str, error: BaseException) -> InputError:
    """Return the error for a failed write; `what` begins the message. A full disk is named.

    Examples
    --------
    >>> from wbdit._io import disk_error
    >>> str(disk_error("cannot write x.h5ad", OSError(28, "No space left on device")))
    'cannot write x.h5ad: the disk is full (No space left on device)'
    """
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"os error (\d+)|errno = (\d+)", str(error))):  # safetensors, HDF5
        number = int(found[1] or found[2])
    text = os.strerror(number) if number else str(error)
    return InputError(f"{what}: the disk is full ({text})" if number in FULL else f"{what} ({text})")


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, from the system's memory to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_stale(folder: Path) -> None:
    """Remove the temporary folders of killed processes in a folder; those of live processes stay."""
    with os.scandir(folder) as entries:
        found = [Path(entry.path) for entry in entries if entry.name.startswith(TEMPORARY) and entry.is_dir()]
    for temporary in found:
        with suppress(OSError):
            if (temporary / LOCK).exists():
                lock = FileLock.take(temporary / LOCK)
                if lock is None or not lock.is_effective:
                    continue
                lock.release()
            elif time.time() - temporary.stat().st_mtime < GRACE_SECONDS:
                continue
            shutil.rmtree(temporary)


def _temporary_folder(parent: Path) -> tuple[Path, FileLock]:
    """Make a folder for a temporary file, locked for as long as this process uses it."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=TEMPORARY))
        with suppress(FileNotFoundError):  # another process took it for a stale one
            lock = FileLock.take(folder / LOCK)
            if lock is not None:
                return folder, lock


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write a file atomically; text is encoded as UTF-8.

    Raises
    ------
    InputError
        If the folder or the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_h5ad(cells: ad.AnnData, path: str | Path) -> None:
    """Write cells to a gzip-compressed ``.h5ad`` file atomically.

    Raises
    ------
    InputError
        If the folder or the file cannot be written.
    """
    write_h5ads({path: cells})


def write_h5ads(sets: Mapping[str | Path, ad.AnnData]) -> None:
    """Write sets of cells by path as :func:`write_h5ad`; no path is replaced before all sets are written."""
    from anndata.io import write_elem

    with ExitStack() as stack:
        for temporary, cells in [(stack.enter_context(replacing(path)), cells) for path, cells in sets.items()]:
            cells.strings_to_categoricals()
            with hdf5_file(temporary) as file:
                write_elem(file, "/", cells, dataset_kwargs={"compression": "gzip"})
                if cells.raw is None and "raw" in file:
                    del file["raw"]  # the mark of a missing part, which older versions of anndata cannot read


@contextmanager
def hdf5_file(path: Path) -> Iterator[Any]:
    """Create an HDF5 file and yield it as an ``h5py.File``. A failed write is raised when the file is closed.

    HDF5 cannot close a file that it cannot write, and then crashes when the process ends. So a file object takes its
    writes. After the first failed one it takes them without writing, so that HDF5 closes in order.

    Raises
    ------
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> from pathlib import Path
    >>> from wbdit._io import hdf5_file
    >>> with hdf5_file(Path("some.h5")) as file:
    ...     file["x"] = [1, 2]
    """
    import h5py

    with _ForgivingFile(path, "w+") as raw:
        try:
            with h5py.File(raw, "w") as file:
                yield file
        except Exception:
            if raw.error is None:
                raise
        if raw.error is not None:
            raise raw.error


class _ForgivingFile(io.FileIO):
    """A file whose writes never fail: the first error is kept, and later writes do nothing."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of the data."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while self.error is None and len(rest):
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Set the size of the file."""
        try:
            if self.error is None:
                return super().truncate(size)
        except OSError as error:
            self.error = error
        return size or 0

    def flush(self) -> None:
        """Do nothing: there is no buffer."""
