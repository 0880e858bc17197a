"""The user's cache folders, for compiled CPU kernels and GPU tuning results.

Compiled code is loaded from these folders, so no other user may have write access.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def cache_folders() -> list[Path]:
    """Return the cache folders in order of preference.

    The first is ``WBDIT_CACHE``, or else ``wbdit`` in ``XDG_CACHE_HOME`` or ``~/.cache``. The second is a temporary
    folder, for users whose home is not writable.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    default = Path(cache if Path(cache).is_absolute() else "~/.cache") / "wbdit"
    chosen = Path(os.path.expanduser(os.environ.get("WBDIT_CACHE") or default))
    temporary = Path(tempfile.gettempdir()).resolve() / f"wbdit-{os.geteuid()}"
    if chosen.parts[0] == "~":  # the user has no home folder
        return [temporary]
    return [chosen.resolve(), temporary]  # follow the user's own symlinks, but none inside the shared temporary folder


def is_private(path: Path) -> bool:
    """Return whether `path` exists, is not a symlink, and is writable only by this user or root."""
    try:
        facts = path.lstat()
    except OSError:
        return False
    return not stat.S_ISLNK(facts.st_mode) and facts.st_uid in (os.geteuid(), 0) and not facts.st_mode & 0o022
