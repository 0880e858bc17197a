"""Locks on files, which the operating system releases when their process ends."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class FileLock:
    """An exclusive lock on a file. It ends with :meth:`release` or with the process, however that ends.

    :meth:`take` returns one. The file names the process that holds the lock, and is removed on release.

    Attributes
    ----------
    is_effective
        False if the file system or the platform has no such locks: then nothing is locked. Network file systems have
        them if their lock service runs; a folder mounted with ``nolock`` is locked on one machine only.
    """

    def __init__(self, path: Path, descriptor: int, is_effective: bool) -> None:
        self.path = path
        self.descriptor = descriptor
        self.is_effective = is_effective

    @classmethod
    def take(cls, path: Path) -> FileLock | None:
        """Lock the file, which is created if necessary; None if another process holds the lock.

        Raises
        ------
        OSError
            If the file cannot be opened for writing.

        Examples
        --------
        >>> from pathlib import Path
        >>> from wbdit._lock import FileLock
        >>> lock = FileLock.take(Path("some.lock"))
        >>> FileLock.take(Path("some.lock")) is None  # held already
        True
        >>> lock.release()
        >>> Path("some.lock").exists()
        False
        """
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            try:
                is_effective = _lock(descriptor)
                if is_effective is not None and _is_same_file(descriptor, path):
                    os.ftruncate(descriptor, 0)
                    with suppress(OSError):  # a full disk: the lock holds without the name
                        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                    return cls(path, descriptor, is_effective)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            if is_effective is None:
                return None
            # another process released the lock, and so removed the file, after it was opened here: open the new one

    def release(self) -> None:
        """Remove the file and release the lock."""
        with suppress(OSError):
            self.path.unlink()
        os.close(self.descriptor)


def holder(path: Path) -> str:
    """Return who holds the lock on a file, such as "process 12 on laptop"."""
    try:
        return path.read_text().strip() or "another process"
    except (OSError, ValueError):
        return "another process"


def _lock(descriptor: int) -> bool | None:
    """Lock an open file; True if locked, None if another process holds the lock, False if there are no locks here."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError:
        return False
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
