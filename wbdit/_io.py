"""Atomic file writes: a path holds either its old content or the complete new file."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import anndata as ad

from wbdit.errors import InputError


def check_writable(path: str | Path) -> None:
    """Check early that `path` can be written; creates no file or folder.

    Raises
    ------
    InputError
        If `path` is a folder, or its nearest existing parent is not a writable folder.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder, give a file name")
    above = path.absolute().parent
    while not above.exists() and above != above.parent:
        above = above.parent
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise InputError(f"cannot write to {above} ({error.strerror})") from error


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
    """Yield a temporary file in the folder of `path`, and rename it to `path` if the block succeeds.

    Raises
    ------
    InputError
        If the folder or the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    except OSError as error:
        raise InputError(f"cannot write to {path.parent} ({error.strerror})") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp lets only the owner read the file
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


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
    with ExitStack() as stack:
        for temporary, cells in [(stack.enter_context(replacing(path)), cells) for path, cells in sets.items()]:
            cells.write_h5ad(temporary, compression="gzip")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
