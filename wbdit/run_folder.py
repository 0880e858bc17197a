"""The RUN folder: one save at any moment, verified when it is read, with the save before it behind.

A save is a set of files with a manifest, which holds their SHA-256. The folder holds the newest save, and ``previous/``
holds the one before in the same layout. A new save is written so:

1. All files are written into ``.next.tmp/``, then flushed to the disk.
2. ``.next.tmp/`` is renamed to ``.next/``. This is the moment at which the new save counts.
3. The files of the folder, if they are a whole save, become ``previous/``.
4. Each file of ``.next/`` takes its place in the folder, the manifest last. Then ``.next/`` goes.

Steps 3 and 4 link files and remove none that is needed, so they can be repeated. If they are cut short, the next writer
does so. Readers take ``.next/`` if it is there, then the folder, then ``previous/``, and the first of them that is
undamaged. One process writes at a time; it holds a lock.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from wbdit._io import disk_error, file_sha256, sync
from wbdit._lock import FileLock, holder
from wbdit._outputs import MANIFEST, MARKS_OF_A_RUN, RUN_FILES, check_folder
from wbdit.checkpoint import CONFIG, MODEL, PREPROCESSOR, RESUME, read_config, read_json
from wbdit.errors import InputError
from wbdit.run_check import LONGEST_JSON

NEEDED = (CONFIG, MODEL, *PREPROCESSOR)  # to generate
DATA = (*NEEDED, RESUME)  # all but the files that only describe a run
PREVIOUS, NEXT, LOCK = "previous", ".next", ".lock"
STAGED, LINKED, OLD, DONE = ".next.tmp", ".previous.tmp", ".old.tmp", ".done.tmp"
ATTEMPTS = 5  # to read a run while others save it
CHUNK = 1 << 20  # bytes

T = TypeVar("T")

logger = logging.getLogger("wbdit")


def holds_run(run: Path) -> bool:
    """Return whether a folder holds a save, whole or damaged.

    Examples
    --------
    >>> from pathlib import Path
    >>> from wbdit.run_folder import holds_run
    >>> generator.save("run")
    >>> holds_run(Path("run")), holds_run(Path("elsewhere"))
    (True, False)
    """
    marks = (MANIFEST, PREPROCESSOR[0])  # other programs have a manifest.json too
    places = (run / NEXT, run, run / PREVIOUS)
    return _is_without_manifest(run) or any(all((place / name).is_file() for name in marks) for place in places)


def check_run_folder(run: Path, *, overwrite: bool = False) -> None:
    """Check early that a run can be saved into a folder; creates nothing.

    Raises
    ------
    InputError
        If it is a file, cannot be written, or holds files of others under names that a run has. With `overwrite`, such
        files may be replaced.

    Examples
    --------
    >>> from pathlib import Path
    >>> from wbdit.run_folder import check_run_folder
    >>> Path("project").mkdir()
    >>> _ = Path("project/README.md").write_text("my notes")
    >>> check_run_folder(Path("project"))
    Traceback (most recent call last):
        ...
    wbdit.errors.InputError: project holds a README.md that is not of a run: choose another folder, or give \
`overwrite=True`
    """
    if os.path.lexists(run) and not run.is_dir():
        raise InputError(f"cannot write {run}: it is not a folder")
    check_folder(run)
    if overwrite or holds_run(run) or (run / PREPROCESSOR[0]).is_file():  # of a save that an older version began
        return
    for name in (*RUN_FILES, MANIFEST):
        if os.path.lexists(run / name):
            raise InputError(
                f"{run} holds a {name} that is not of a run: choose another folder, or give `overwrite=True`"
            )


def read_newest(run: Path, names: Sequence[str], read: Callable[[Path], T]) -> T:
    """Read the newest undamaged save of a run; others may be saving it meanwhile.

    Parameters
    ----------
    run
        RUN folder.
    names
        Files that `read` needs. Each is compared with its SHA-256, except in runs of older versions, which have none.
    read
        Reads a save from the folder that it is given.

    Returns
    -------
    What `read` returns. If the newest save is damaged, the one before is read, and a warning names the damage.

    Raises
    ------
    InputError
        If there is no run, or no save of it is whole; and the errors of `read`.

    Examples
    --------
    >>> from pathlib import Path
    >>> from wbdit.run_folder import read_newest
    >>> generator.save("run")
    >>> read_newest(Path("run"), ["config.json"], lambda save: (save / "config.json").stat().st_size > 0)
    True
    """
    if not run.is_dir():
        raise InputError(f"no such run: {run} is not a folder")
    for _ in range(ATTEMPTS):
        before = _manifests(run)
        try:
            value, warning = _read_undamaged(run, names, read)
        except (InputError, OSError):
            if _manifests(run) == before:
                raise
        else:
            if _manifests(run) == before:  # no file was replaced between the first and the last look
                if warning:
                    logger.warning(warning)
                return value
    raise InputError(f"{run} changed whenever it was read: try again")


@contextmanager
def writing(run: Path) -> Iterator[RunWriter]:
    """Lock a RUN folder, which is created if necessary, and yield its writer.

    A save that was cut short is completed or removed first. A folder that was created and got no save is removed.

    Raises
    ------
    InputError
        If another process is writing into the folder, or it cannot be written.

    Examples
    --------
    >>> from pathlib import Path
    >>> from wbdit.run_folder import writing
    >>> with writing(Path("new")) as writer:
    ...     writer.save(lambda folder: (folder / "README.md").write_text("a run"))
    >>> sorted(path.name for path in Path("new").iterdir())
    ['README.md', 'manifest.json']
    """
    created = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock.take(run / LOCK)
    except OSError as error:
        raise disk_error(f"cannot write to {run}", error) from error
    if lock is None:
        raise InputError(f"{holder(run / LOCK)} is writing into {run}: wait until it ends, or choose another folder")
    if not lock.is_effective:
        logger.warning(f"the disk of {run} has no file locks: make sure that only one process trains into this folder")
    try:
        try:
            writer = RunWriter(run)
        except OSError as error:
            raise disk_error(f"cannot write to {run}", error) from error
        yield writer
    finally:
        lock.release()
        with suppress(OSError):  # not empty
            for folder in created:
                folder.rmdir()


class RunWriter:
    """The one writer of a RUN folder; :func:`writing` yields it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._own: bytes | None = None  # manifest of the save that this writer put in place, which is not read again
        self._recover()

    def save(self, write: Callable[[Path], object], carried: Sequence[str] = ()) -> None:
        """Save the files that `write` writes into the empty folder it is given.

        Parameters
        ----------
        write
            Writes the files.
        carried
            Files of the last save that belong to this one too.

        Raises
        ------
        InputError
            If they cannot be written, for one because the disk is full. The last save is then as before.
        """
        try:
            self._recover()  # the last save of this writer may have failed after it counted
            self._stage(write, carried)
            (self.run / STAGED).rename(self.run / NEXT)
            sync(self.run)
            self._put_in_place()
            self._retire_next()
        except OSError as error:
            raise InputError(f"{disk_error(f'cannot save {self.run}', error)}; {self._safe()}") from error
        finally:
            shutil.rmtree(self.run / STAGED, ignore_errors=True)

    def _safe(self) -> str:
        """Return what a message says is safe."""
        if not holds_run(self.run):
            return "nothing was saved"
        steps = read_newest(self.run, [CONFIG], read_config).trained.steps
        return f"the last save, of step {steps}, is intact: make space, then go on with `resume=True`"

    def _stage(self, write: Callable[[Path], object], carried: Sequence[str]) -> None:
        """Write a complete save into the folder for it, and to the disk."""
        folder = self.run / STAGED
        folder.mkdir()
        write(folder)
        for name in carried:
            (folder / name).parent.mkdir(exist_ok=True)
            _link(self.run / name, folder / name)
        files = {}
        for path in sorted(folder.rglob("*")):
            sync(path)
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        manifest = folder / MANIFEST
        manifest.write_text(json.dumps({"files": files}, indent=1) + "\n")
        sync(manifest)
        sync(folder)

    def _put_in_place(self) -> None:
        """Make the save in the folder previous, and the one in `NEXT` that of the folder."""
        run, source = self.run, self.run / NEXT
        manifest = (source / MANIFEST).read_bytes()
        held = _bytes(run / MANIFEST)
        if held is None:  # nothing, a save of an older version, or this one partly in place
            is_another = _is_without_manifest(run) and _bytes(run / CONFIG) != _bytes(source / CONFIG)
            is_whole = is_another and not (run / PREVIOUS).exists()
        else:
            is_whole = held != manifest and (held == self._own or _damage(run) is None)
        if is_whole:
            self._keep_as_previous()
        listed = _listed(source)
        names = [name for name in RUN_FILES if name in listed]
        for name in set(RUN_FILES) - set(names):
            (run / name).unlink(missing_ok=True)
        for name in (*names, MANIFEST):
            (run / name).parent.mkdir(exist_ok=True)
            temporary = (run / name).with_name(f".{Path(name).name}.tmp")
            temporary.unlink(missing_ok=True)
            _link(source / name, temporary)
            temporary.replace(run / name)
        for folder in {(run / name).parent for name in names} | {run}:
            sync(folder)
        self._own = manifest

    def _keep_as_previous(self) -> None:
        """Make the files in the folder the previous save."""
        run = self.run
        names = [name for name in (*RUN_FILES, MANIFEST) if (run / name).is_file()]
        for name in names:
            (run / LINKED / name).parent.mkdir(parents=True, exist_ok=True)
            _link(run / name, run / LINKED / name)
        for folder in {(run / LINKED / name).parent for name in names}:
            sync(folder)
        if (run / PREVIOUS).exists():
            (run / PREVIOUS).rename(run / OLD)
        (run / LINKED).rename(run / PREVIOUS)
        sync(run)
        shutil.rmtree(run / OLD, ignore_errors=True)

    def _recover(self) -> None:
        """Complete a save that was cut short after it counted, and remove one that was cut short before."""
        self._remove_leftovers()
        if (self.run / NEXT).exists():
            if _damage(self.run / NEXT) is None:
                self._put_in_place()
            self._retire_next()

    def _retire_next(self) -> None:
        """Remove `NEXT`, at once for readers."""
        (self.run / NEXT).rename(self.run / DONE)
        sync(self.run)
        shutil.rmtree(self.run / DONE)

    def _remove_leftovers(self) -> None:
        """Remove the temporaries of a killed process; none is alive while this one holds the lock."""
        for name in (STAGED, LINKED, OLD, DONE):
            shutil.rmtree(self.run / name, ignore_errors=True)
        for name in (*RUN_FILES, MANIFEST):
            stem, suffix = re.escape(Path(name).stem), re.escape(Path(name).suffix)
            leftover = re.compile(rf"\.{stem}{suffix}\.tmp|\.{stem}\.\w{{8}}{suffix}")  # the second of older versions
            folder = (self.run / name).parent
            for path in [*folder.iterdir()] if folder.is_dir() else []:
                if leftover.fullmatch(path.name):
                    path.unlink(missing_ok=True)


def _read_undamaged(run: Path, names: Sequence[str], read: Callable[[Path], T]) -> tuple[T, str | None]:
    """Read the first undamaged save; also return a warning if it is not the newest."""
    wrong: list[str] = []
    for place in (run / NEXT, run, run / PREVIOUS):
        if (place / MANIFEST).is_file():
            damage = _damage(place, names)
        elif _is_without_manifest(place) or (place == run and not wrong and not holds_run(run)):
            damage = None  # a run of an older version; or no run, and `read` says what is missing
        else:
            continue
        if damage is None:
            return read(place), f"{wrong[0]}: reading the save before it, in {place}" if wrong else None
        wrong.append(damage)
    raise InputError(f"{' and '.join(wrong) or f'{run} holds no whole save'}: is the run complete?")


def _damage(folder: Path, names: Sequence[str] | None = None) -> str | None:
    """Return what is wrong with the files of a save, None if nothing is; by default with those of `DATA` it has."""
    try:
        files = _listed(folder)
    except InputError as error:
        return str(error)
    for name in [name for name in DATA if name in files] if names is None else names:
        path, known = folder / name, files.get(name)
        if known is None:
            return f"{folder} has no {name}"
        try:
            if path.exists() and not path.is_file():
                return f"{path} is not a file"  # reading a pipe could take for ever
            size = path.stat().st_size
            if size != known["bytes"]:
                return f"{path} is damaged ({size} bytes in place of {known['bytes']})"
            if file_sha256(path) != known["sha256"]:
                return f"{path} is damaged (its SHA-256 is not the one in {MANIFEST})"
        except FileNotFoundError:
            return f"{folder} has no {name}"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return None


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the files in the manifest of a save, with their sizes and SHA-256."""
    try:
        files = read_json(folder / MANIFEST)["files"]
        if not all(name in RUN_FILES and {"bytes", "sha256"} <= known.keys() for name, known in files.items()):
            raise KeyError("files")
    except (InputError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{folder / MANIFEST} is damaged") from error
    return files


def _manifests(run: Path) -> list[bytes | None]:
    """Return the manifests in a RUN folder; they change whenever a file in it is replaced."""
    return [_bytes(run / place / MANIFEST) for place in (NEXT, "", PREVIOUS)]


def _bytes(path: Path) -> bytes | None:
    """Return the content of a small file; None for none, and for what is no file, such as a pipe."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return file.read(LONGEST_JSON + 1)
    except OSError:
        return None


def _is_without_manifest(folder: Path) -> bool:
    """Return whether a folder holds a save of an older version, without a manifest."""
    return not (folder / MANIFEST).exists() and all((folder / name).is_file() for name in MARKS_OF_A_RUN)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the disk has no hard links."""
    try:
        if source.is_symlink():  # of a cache, for example: a link to it may not hold in another folder
            raise OSError
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)
