"""Files that are either the old one or the whole new one, never half of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata as ad

from wbdit.errors import InputError


def check_writable(path: str | Path) -> None:
    """Refuse, before any work, a file that could not be written; nothing is made yet.

    Raises
    ------
    InputError
        If it is a folder, or what stands above it is none or may not be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    above = path.absolute().parent
    while not above.exists() and above != above.parent:
        above = above.parent
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise InputError(f"cannot write to {above} ({error.strerror})") from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary file beside `path` that takes its place when the block ends well.

    Raises
    ------
    InputError
        If the place cannot be written to.
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
        temporary.chmod(0o666 & ~_umask())  # mkstemp keeps the file from everyone else
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write a whole file (text as UTF-8), or nothing.

    Raises
    ------
    InputError
        If the place cannot be written to.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_h5ad(cells: ad.AnnData, path: str | Path) -> None:
    """Write an ``.h5ad``, or nothing.

    Raises
    ------
    InputError
        If the place cannot be written to.
    """
    with replacing(path) as temporary:
        cells.write_h5ad(temporary, compression="gzip")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
