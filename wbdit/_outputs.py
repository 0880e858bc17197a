"""What an output may replace: nothing that is not an output of wbdit, unless the user says so."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from wbdit.errors import InputError

MARK = '<meta name="generator" content="wbdit">'  # in the head of our pages
HEAD_BYTES = 4096  # in which the mark is looked for
SYSTEM = ("/proc", "/sys", "/dev/fd")

# Files of a run, in the order in which a save puts them in place. The last two describe it and are not needed.
RUN_FILES = (
    *("model.safetensors", "resume/state.safetensors", "preprocessor.safetensors", "preprocessor.json", "config.json"),
    *("metrics.jsonl", "README.md"),
)
MANIFEST = "manifest.json"
MARKS_OF_A_RUN = ("config.json", "preprocessor.json")  # together no other program writes them

IsOurs = Callable[[Path], bool]


def check_writable(path: str | Path, *, overwrite: bool = False, is_ours: IsOurs | None = None) -> None:
    """Check early that `path` can be written; creates no file or folder.

    Parameters
    ----------
    path
        File to write.
    overwrite
        Whether any file may be replaced, and a link: the link itself, never its target.
    is_ours
        Tells whether an existing file is such an output of wbdit, which may be replaced. Without it, only an empty file
        may be.

    Raises
    ------
    InputError
        If `path` is a folder (but a ``.zarr`` of ours may be replaced), a device or another special file, a file of a
        run, or an existing file that may not be replaced; or its nearest existing parent is not a writable folder.

    Examples
    --------
    >>> from pathlib import Path
    >>> from wbdit._outputs import check_writable
    >>> _ = Path("notes.h5ad").write_text("not an output of wbdit")
    >>> check_writable("notes.h5ad")
    Traceback (most recent call last):
        ...
    wbdit.errors.InputError: notes.h5ad is no such output of wbdit: choose another name, or give `overwrite=True`
    """
    path = Path(path)
    ours = is_ours is not None and (path.is_dir() or path.is_file()) and is_ours(path)
    if path.is_dir() and not (ours and path.suffix == ".zarr" and not path.is_symlink()):
        raise InputError(f"cannot write {path}: it is a folder, give a file name")
    check_folder(path.absolute().parent)
    if _is_special(path):
        raise InputError(f"cannot write {path}: it is a device or another special file, give a file name")
    if not os.path.lexists(path):
        return
    if is_part_of_run(path):
        raise InputError(f"cannot write {path}: it belongs to a run, choose another name")
    if path.is_symlink():
        if not overwrite:
            to = os.readlink(path)
            raise InputError(f"{path} is a link to {to}: give that name, or replace the link with `overwrite=True`")
    elif not (overwrite or ours or path.stat().st_size == 0):
        raise InputError(f"{path} is no such output of wbdit: choose another name, or give `overwrite=True`")


def check_folder(folder: Path) -> None:
    """Check early that files can be written into a folder, which need not exist; creates nothing.

    Raises
    ------
    InputError
        If its nearest existing parent, or the folder itself, is not a writable folder.
    """
    above = folder.absolute()
    while not above.exists() and above != above.parent:
        above = above.parent
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise InputError(f"cannot write to {above} ({error.strerror})") from error


def is_part_of_run(path: Path) -> bool:
    """Return whether a file is one of those that make up a run."""
    own = path.absolute()
    return any(
        str(own.relative_to(run)) in (*RUN_FILES, MANIFEST) and all((run / name).is_file() for name in MARKS_OF_A_RUN)
        for run in own.parents[:2]  # a run has files in its folder and in a folder of that
    )


def _is_special(path: Path) -> bool:
    """Return whether a path is a device, a pipe or a socket, or one of the system's links to what it has open."""
    folder = path.absolute().parent
    names = (folder, *folder.parents)
    is_other = path.exists() and not (path.is_file() or path.is_dir())
    return is_other or folder == Path("/dev") or any(Path(n) in names for n in SYSTEM)


def has_uns(key: str) -> IsOurs:
    """Return a function that tells whether an ``.h5ad`` or ``.zarr`` file has an entry `key` in ``uns``.

    Examples
    --------
    >>> from pathlib import Path
    >>> from wbdit._outputs import has_uns
    >>> cells[:5].copy().write_h5ad("real.h5ad")
    >>> generator.generate(2, calls=2).write_h5ad("synthetic.h5ad")
    >>> [has_uns("wbdit")(Path(name)) for name in ("real.h5ad", "synthetic.h5ad")]
    [False, True]
    """

    def look(path: Path) -> bool:
        import h5py

        if path.is_dir():
            return (path / "uns" / key).is_dir()
        try:
            with h5py.File(path) as file:
                return f"uns/{key}" in file
        except OSError:
            return False

    return look


def is_page(path: Path) -> bool:
    """Return whether a file is an HTML page of wbdit."""
    with suppress(OSError), path.open("rb") as file:
        return MARK.encode() in file.read(HEAD_BYTES)
    return False


def beside_page(page: str) -> IsOurs:
    """Return a function that tells whether a file is in the folder of a page of wbdit, or in a folder of that."""
    return lambda path: is_page(path.parent / page) or is_page(path.parent.parent / page)
