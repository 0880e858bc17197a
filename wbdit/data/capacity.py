"""Memory that this process may use: what the machine has, or less in a container or a job of a queue."""

from __future__ import annotations

import os
from pathlib import Path

SHARE = 1 / 32  # of the memory, that one copy of the training cells may take; the rest is for the model


def memory_limit() -> int:
    """Return the memory in bytes that this process may use; 8 GB if it is unknown.

    Examples
    --------
    >>> from wbdit.data.capacity import memory_limit
    >>> memory_limit() > 0
    True
    """
    return min([physical_memory() or 8 * 10**9, *_control_groups()])


def physical_memory() -> int | None:
    """Return the memory of the machine in bytes; None if it is unknown, as on Windows."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def fits(size: int) -> bool:
    """Return whether `size` bytes of training cells may be kept in memory.

    Examples
    --------
    >>> from wbdit.data.capacity import fits
    >>> fits(1000), fits(10**18)
    (True, False)
    """
    return size <= SHARE * memory_limit()


def in_words(size: int) -> str:
    """Return a number of bytes in MB or GB.

    Examples
    --------
    >>> from wbdit.data.capacity import in_words
    >>> in_words(3_400_000), in_words(1_260_000_000)
    ('4 MB', '1.3 GB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{-(-size // 10**6)} MB"


def _control_groups() -> list[int]:
    """Return the limits of the process's control groups on Linux, by which containers and Slurm limit the memory."""
    try:
        own = [line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    files = []
    for controllers, path in own:
        if controllers in ("", "memory"):
            root = Path("/sys/fs/cgroup") / controllers
            name = "memory.max" if controllers == "" else "memory.limit_in_bytes"
            here = root / path.lstrip("/")
            files += [above / name for above in (here, *here.parents) if above.is_relative_to(root)]
    return [int(text) for text in map(_text, files) if text.isdigit()]


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
