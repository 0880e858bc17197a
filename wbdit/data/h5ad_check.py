"""Check of an ``.h5ad`` file before it is read: what it claims to hold, and where its parts lie.

A few kilobytes can claim petabytes: HDF5 stores no chunk that is all zeros, and compresses the others a thousandfold.
Links and external storage can name other files. Only sizes and addresses are looked at here, no values.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from wbdit.data.capacity import physical_memory
from wbdit.errors import InputError

LARGE = 10**9  # bytes; smaller claims are never refused
MOST_COMPRESSED = 200  # bytes claimed per byte of the file; expression is compressed 10 to 60 times
DEEPEST, MOST_PARTS = 24, 100_000  # groups within groups, and parts of a file; .h5ad files have some 6, and hundreds
PER_NAME = 100  # bytes of memory per row or column of a table without names, which anndata numbers


def check_h5ad(path: Path, whole: bool = True) -> int:
    """Check the sizes and the links of an ``.h5ad`` file.

    Parameters
    ----------
    path
        The file.
    whole
        Whether it is to be read as a whole, and so must fit into memory.

    Returns
    -------
    How many bytes it holds in memory.

    Raises
    ------
    InputError
        If the file claims to hold far more than it does or than fits into memory, nests groups without end, or refers
        to other files.

    Examples
    --------
    >>> from pathlib import Path
    >>> from wbdit.data.h5ad_check import check_h5ad
    >>> cells.write_h5ad("cells.h5ad")
    >>> check_h5ad(Path("cells.h5ad")) > 1000
    True
    """
    with h5py.File(path, "r") as file:
        claimed = sum(_claims(name, part) for name, part in _parts(file, ""))
    check_claim(claimed, path.stat().st_size, whole)
    return claimed


def check_claim(claimed: int, stored: int, whole: bool = True) -> None:
    """Refuse to read `claimed` bytes from `stored` ones if that cannot be true, or the whole does not fit into memory.

    Raises
    ------
    InputError
        If so.

    Examples
    --------
    >>> from wbdit.data.h5ad_check import check_claim
    >>> check_claim(10**12, 4000)
    Traceback (most recent call last):
    wbdit.errors.InputError: its 4,000 bytes claim to hold 1,000.0 GB: the file is damaged, or made to fill the memory
    """
    if claimed > max(LARGE, MOST_COMPRESSED * stored):
        raise InputError(
            f"its {stored:,} bytes claim to hold {claimed / 1e9:,.1f} GB: the file is damaged, or made to fill the "
            "memory"
        )
    free = free_memory() if whole else None
    if free is not None and claimed > max(LARGE, free):
        raise InputError(
            f"it holds {claimed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB of memory are free: use a smaller file, or a "
            "machine with more memory"
        )


def free_memory() -> int | None:
    """Return the memory in bytes that can be had without swapping, else all memory; None if it is unknown.

    Examples
    --------
    >>> from wbdit.data.h5ad_check import free_memory
    >>> (free_memory() or 1) > 0
    True
    """
    try:
        with open("/proc/meminfo") as file:
            known = dict(line.split(":") for line in file)
        return 1024 * int(known["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return physical_memory()


def _parts(group: h5py.Group, path: str, seen: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield all groups and datasets of a file by path, depth first."""
    seen = (*seen, group)
    count = 0
    if len(seen) > DEEPEST:
        raise InputError(f"its groups lie in one another without end, at {path[:60]}: the file is damaged")
    for name in group:
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise InputError(f"{path}/{name} lies in another file, {link.filename!r}: copy it into this one")
        part = group[name]
        yield f"{path}/{name}", part
        count += 1
        if isinstance(part, h5py.Group):
            for below in _parts(part, f"{path}/{name}", seen):
                yield below
                count += 1
        if count > MOST_PARTS:
            raise InputError(f"it has more than {MOST_PARTS:,} groups and datasets: the file is damaged")


def _claims(name: str, part: Any) -> int:
    """Return how many bytes a part claims to hold."""
    if isinstance(part, h5py.Group):
        shape = part.attrs.get("shape", part.attrs.get("h5sparse_shape", ()))
        whole = np.ndim(shape) == 1 and np.asarray(shape).dtype.kind in "iu"
        return sum(PER_NAME * max(int(n), 0) for n in shape) if whole else 0
    if not isinstance(part, h5py.Dataset) or part.shape is None:
        return 0
    if part.is_virtual or part.external:
        raise InputError(f"{name} lies in another file: copy it into this one")
    entries = 1
    for n in part.shape:  # in Python's numbers, which do not overflow
        entries *= int(n)
    chunk = 1
    for n in part.chunks or ():
        chunk *= int(n)
    each = part.dtype.itemsize
    if part.dtype.kind in "SUO":  # text becomes Python objects
        each = max(each, PER_NAME)
    return each * max(entries, chunk)
