"""Generation of more cells than memory holds: in chunks that are kept on disk, joined at the end, over any processes.

Finished chunks lie beside the result, in a folder ``.NAME.partial``, as small ``.h5ad`` files with their SHA-256. A
kill at any moment loses the chunk in work. The result is written in that folder too, and renamed when it is complete.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd

from wbdit._io import disk_error, file_sha256, sync
from wbdit._lock import FileLock, holder
from wbdit._outputs import has_uns
from wbdit._progress import Show
from wbdit.cell_blocks import BLOCK, n_blocks
from wbdit.cell_files import Rows, check_format, read_rows, reading, write_rows
from wbdit.errors import InputError

CHUNK_BYTES = 2**26  # of a dense chunk in fp32
MOST_CELLS = 2**16  # per chunk
PART = "part"  # entry of ``uns["wbdit"]`` in the file of one rank

logger = logging.getLogger("wbdit")


def chunk_cells(genes: int) -> int:
    """Return the default number of cells per chunk: whole blocks, of which a dense matrix takes at most 64 MiB.

    Examples
    --------
    >>> from wbdit.streaming import chunk_cells
    >>> chunk_cells(200), chunk_cells(2000)
    (65536, 8384)
    """
    return min(MOST_CELLS, max(1, CHUNK_BYTES // (4 * genes * BLOCK)) * BLOCK)


def share_of(n: int, rank: int, ranks: int) -> range:
    """Return the indices of the cells that one of several processes generates: whole blocks, one after the other.

    Raises
    ------
    InputError
        If there is no such process, or there are fewer blocks than processes.

    Examples
    --------
    >>> from wbdit.streaming import share_of
    >>> [share_of(200, rank, 3) for rank in range(3)]
    [range(0, 64), range(64, 128), range(128, 200)]
    """
    blocks = n_blocks(n)
    if ranks < 1 or not 0 <= rank < ranks:
        raise InputError(f"`rank` must be from 0 to {ranks - 1}, the number of `ranks` less one, not {rank}")
    if ranks > blocks:
        raise InputError(f"{n} cells are {blocks} blocks of {BLOCK}: use at most {blocks} `ranks`, not {ranks}")
    first, last = (blocks * r // ranks * BLOCK for r in (rank, rank + 1))
    return range(first, min(last, n))


def part_path(path: Path, rank: int, ranks: int) -> Path:
    """Return the path of one rank's file.

    Examples
    --------
    >>> from pathlib import Path
    >>> from wbdit.streaming import part_path
    >>> part_path(Path("cells.h5ad"), 0, 3).name, part_path(Path("cells.h5ad"), 0, 1).name
    ('cells.rank0-of-3.h5ad', 'cells.h5ad')
    """
    return path if ranks == 1 else path.with_name(f"{path.stem}.rank{rank}-of-{ranks}{path.suffix}")


class PartialFile:
    """The finished chunks of a file of cells; :func:`unfinished` makes one.

    Parameters
    ----------
    folder
        Folder of the chunks.
    path
        The result.
    """

    def __init__(self, folder: Path, path: Path) -> None:
        self.folder = folder
        self.path = path

    def has(self, rows: range) -> bool:
        """Return whether these cells are finished, and their file is as it was written."""
        file, record = self._names(rows)
        try:
            return json.loads(record.read_text())["sha256"] == file_sha256(file)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def add(self, rows: range, cells: ad.AnnData) -> None:
        """Write a chunk."""
        file, record = self._names(rows)
        temporary = self.folder / "temporary.h5ad"
        write_rows(temporary, [Rows.of(cells)], cells.var[[]], {})
        digest = file_sha256(temporary)
        temporary.replace(file)
        _write_json(record, {"sha256": digest})

    def finish(self, chunks: Sequence[range], var: pd.DataFrame, uns: dict[str, Any]) -> None:
        """Join the chunks to the result, and remove them."""

        def rows() -> Iterator[Rows]:
            for chunk in chunks:
                with reading(self._names(chunk)[0]) as root:
                    yield from read_rows(root, chunk.start)

        _write_and_rename(self.folder / f"joined{self.path.suffix}", self.path, rows(), var, uns)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def n_finished(self) -> int:
        """Number of finished chunks."""
        return len(list(self.folder.glob("[0-9]*.json")))

    def _names(self, rows: range) -> tuple[Path, Path]:
        return self.folder / f"{rows.start}.h5ad", self.folder / f"{rows.start}.json"


def partial_folder(path: Path) -> Path:
    """Return the folder that keeps the finished chunks of a file."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def unfinished(path: Path, facts: dict[str, Any], resume: bool) -> Iterator[PartialFile]:
    """Yield the finished chunks of a file: none, or with `resume` those of an earlier process.

    Parameters
    ----------
    path
        The result.
    facts
        What the cells depend on; it must be the same after a resume.
    resume
        Whether to go on with what is there.

    Raises
    ------
    InputError
        If chunks are there and `resume` is False, they are of another request, or another process makes them.
    """
    folder = partial_folder(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock.take(folder / "lock")
    except OSError as error:
        raise disk_error(f"cannot write to {path.parent}", error) from error
    if lock is None:
        raise InputError(f"{path} is being generated by {holder(folder / 'lock')}")
    partial = PartialFile(folder, path)
    try:
        if partial.n_finished:
            _check_same(folder, facts, resume)
        else:
            _write_json(folder / "request.json", facts)
        yield partial
    except OSError as error:
        raise disk_error(f"cannot write {path}", error) from error
    finally:
        lock.release()
        if folder.exists() and not partial.n_finished:
            shutil.rmtree(folder, ignore_errors=True)


def _check_same(folder: Path, facts: dict[str, Any], resume: bool) -> None:
    """Refuse to go on with the chunks of another request."""
    if not resume:
        raise InputError(f"{folder} keeps cells of an unfinished file: go on with `resume=True`, or remove it")
    try:
        own = json.loads((folder / "request.json").read_text())
    except (OSError, ValueError):
        own = {}
    other = [name for name in facts if not isinstance(own, dict) or own.get(name) != facts[name]]
    if other:
        raise InputError(
            f"the cells in {folder} are not of this request (another {other[0]}): repeat the first command, or remove "
            "the folder"
        )


def generate_file(
    path: Path,
    rows: range,
    facts: dict[str, Any],
    make: Callable[[range, Show], ad.AnnData],
    show: Show,
    *,
    chunk: int,
    resume: bool,
) -> None:
    """Generate cells chunk by chunk into a file.

    Parameters
    ----------
    path
        File to write, ``.h5ad`` or ``.zarr``.
    rows
        Indices of the cells.
    facts
        As in :func:`unfinished`.
    make
        Returns the cells with some of the indices; shows the progress of that.
    show
        Shows the progress of all.
    chunk
        Cells per chunk, a multiple of :data:`wbdit.cell_blocks.BLOCK`.
    resume
        As in :func:`unfinished`.

    Raises
    ------
    InputError
        If the file cannot be written, or the chunks that are there cannot be used.
    """
    check_format(path)
    _check_folder(path)
    if resume and path.exists() and not PartialFile(partial_folder(path), path).n_finished:
        _check_complete(path, facts)
        logger.info(f"{path} is complete: nothing is left to generate")
        return
    chunks = [range(start, min(start + chunk, rows.stop)) for start in range(rows.start, rows.stop, chunk)]
    with unfinished(path, {**facts, "chunk": chunk}, resume) as partial:
        done = [one for one in chunks if partial.has(one)]
        if done:
            logger.info(f"{path}: going on after {sum(map(len, done))} of {len(rows)} cells")
        clock = _Clock(sum(map(len, done)), len(rows), show)
        description = None
        for one in chunks:
            if one in done:
                continue
            cells = make(one, clock.part(len(one)))
            clock.add(len(one))
            partial.add(one, cells)
            description = cells
        if description is None:
            description = make(range(rows.start, rows.start + 1), lambda share, text: None)
        partial.finish(chunks, description.var, dict(description.uns))


def _check_complete(path: Path, facts: dict[str, Any]) -> None:
    """Refuse to take a finished file for the result of another request."""
    from anndata.io import read_elem

    with reading(path) as root:
        try:
            own = read_elem(root["uns/wbdit"])
            other = [name for name, fact in facts.items() if own[name] != fact]
        except (KeyError, TypeError):
            other = ["request"]
    if other:
        raise InputError(
            f"{path} holds cells of another {other[0]}: give another name, or replace them without `resume=True`"
        )


class _Clock:
    """Shows how many cells are finished, at what speed, and how long the rest takes."""

    def __init__(self, before: int, total: int, show: Show) -> None:
        self.before, self.made, self.total = before, 0, total
        self.began = time.monotonic()
        self._show = show

    def show(self, cells: float) -> None:
        done = self.made + cells
        speed = done / max(time.monotonic() - self.began, 1e-9)
        left = self.total - self.before - done
        text = f"{speed:.0f} cells/s, {_duration(left / speed)} left" if speed > 0 and left > 0 else ""
        self._show((self.before + done) / self.total, text)

    def part(self, cells: int) -> Show:
        """Return a function that shows the progress of a chunk."""
        return lambda share, text: self.show(share * cells)

    def add(self, cells: int) -> None:
        self.made += cells


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def join(parts: Sequence[str | Path], out: str | Path) -> Path:
    """Join the files of all ranks to one, which equals the file of a single process byte by byte.

    Parameters
    ----------
    parts
        The files that ``wbdit generate`` wrote over several ranks, in any order.
    out
        File to write, in the same format.

    Returns
    -------
    The path of the file.

    Raises
    ------
    InputError
        If the parts do not belong together, one is missing, or a file cannot be read or written.

    Examples
    --------
    >>> parts = [generator.generate_to("cells.h5ad", 200, calls=2, rank=rank, ranks=2) for rank in range(2)]
    >>> [part.name for part in parts]
    ['cells.rank0-of-2.h5ad', 'cells.rank1-of-2.h5ad']
    >>> wbdit.join(parts, "cells.h5ad").name
    'cells.h5ad'
    """
    from anndata.io import read_elem

    out, paths = Path(out), [Path(part) for part in parts]
    check_format(out)
    if out.resolve() in [path.resolve() for path in paths]:
        raise InputError(f"cannot write {out}: it is one of the parts")
    found: dict[int, tuple[Path, str, dict[str, Any]]] = {}
    for path in paths:
        with reading(path) as root:
            own = _part_of(root)
            if own is None:
                raise InputError(f"{path} is not the file of one rank, as `wbdit generate` writes over several")
            key = json.dumps({name: own[name] for name in ("request", "model", "ranks", "n")}, sort_keys=True)
            if found and key != next(iter(found.values()))[1]:
                raise InputError(f"{path} and {paths[0]} are not of the same request")
            if own["rank"] in found:
                raise InputError(f"{path} and {found[own['rank']][0]} are of the same rank, {own['rank']}")
            found[own["rank"]] = path, key, own
    if not found:
        raise InputError("give the files to join")
    first = next(iter(found.values()))[2]
    missing = [rank for rank in range(first["ranks"]) if rank not in found]
    if missing:
        raise InputError(f"the file of rank {missing[0]} of {first['ranks']} is missing")

    def rows() -> Iterator[Rows]:
        for rank in range(first["ranks"]):
            path, _, own = found[rank]
            share = share_of(own["n"], rank, own["ranks"])
            with reading(path) as root:
                n = 0
                for some in read_rows(root, share.start):
                    n += len(some.obs)
                    yield some
            if n != len(share):
                raise InputError(f"{path} has {n} cells, not {len(share)}: is it complete?")

    with reading(found[0][0]) as root:
        var, uns = read_elem(root["var"]), read_elem(root["uns"])
    uns["wbdit"].pop(PART)
    temporary = out.with_name(f".{out.name}.joining{out.suffix}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write_and_rename(temporary, out, rows(), var, uns)
    finally:
        _remove(temporary)
    return out


def _part_of(root: Any) -> dict[str, Any] | None:
    """Return which part of which request a file holds; None if it is no part."""
    from anndata.io import read_elem

    try:
        made = read_elem(root["uns/wbdit"])
        own = made[PART]
        numbers = {name: int(own[name]) for name in ("rank", "ranks", "n")}
        return {**numbers, "request": str(made["request"]), "model": str(made["model_hash"])}
    except (KeyError, TypeError, ValueError):
        return None


def _write_and_rename(
    temporary: Path, path: Path, rows: Iterator[Rows], var: pd.DataFrame, uns: dict[str, Any]
) -> None:
    _check_folder(path)
    _remove(temporary)
    write_rows(temporary, rows, var, uns)
    aside = temporary.with_name(f".{temporary.name}.old")
    try:
        if path.is_dir():  # a rename replaces no folder
            path.rename(aside)
        temporary.replace(path)
        sync(path.parent)
        _remove(aside)
    except OSError as error:
        raise disk_error(f"cannot write {path}", error) from error


def _check_folder(path: Path) -> None:
    """Refuse to replace a folder that is no ``.zarr`` of ours."""
    if path.is_dir() and not has_uns("wbdit")(path):
        raise InputError(f"{path} is a folder without cells of wbdit: choose another name, or remove it")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".new")
    with temporary.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
