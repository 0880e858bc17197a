"""The user's folder for what is compiled or searched once. Code is loaded from there: nobody else may write to it."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def cache_folders() -> list[Path]:
    """Return the folders to look in: the user's cache, and for a home that cannot be written to a temporary one."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    default = Path(cache if Path(cache).is_absolute() else "~/.cache") / "wbdit"
    chosen = Path(os.path.expanduser(os.environ.get("WBDIT_CACHE") or default))
    temporary = Path(tempfile.gettempdir()).resolve() / f"wbdit-{os.geteuid()}"
    if chosen.parts[0] == "~":  # this user has no home
        return [temporary]
    return [chosen.resolve(), temporary]  # a link of the user's own is followed, one in the shared folder is not


def is_private(path: Path) -> bool:
    """Say whether it is there, no link, and nobody but this user (or root) can write to it."""
    try:
        facts = path.lstat()
    except OSError:
        return False
    return not stat.S_ISLNK(facts.st_mode) and facts.st_uid in (os.geteuid(), 0) and not facts.st_mode & 0o022
