"""The two trees: the working tree, and the base commit's files in a temporary folder."""

from __future__ import annotations

import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TreeError(RuntimeError):
    """A tree is not available; the message is one line."""


def git(root: Path, *arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)
    except OSError as error:
        raise TreeError(f"cannot run git: {error.strerror}") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["git failed"]
        raise TreeError(lines[0])
    return done.stdout


def resolve(root: Path, revision: str) -> str:
    """Return the hash of a commit; raise TreeError if it does not exist."""
    git(root, "rev-parse", "--git-dir")  # raises git's own message outside a repository
    if revision.startswith("-"):
        raise TreeError(f"no commit {revision}: give a hash, branch or tag")
    try:
        return git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").decode().strip()
    except TreeError as error:
        raise TreeError(f"no commit {revision} in this repository (a shallow clone may lack it)") from error


def name(root: Path, revision: str = "HEAD") -> str:
    """Return a commit's short hash, with a plus if the working tree differs from it."""
    short = git(root, "rev-parse", "--short=12", revision).decode().strip()
    return short + ("+" if revision == "HEAD" and git(root, "status", "--porcelain").strip() else "")


@contextmanager
def files_of(root: Path, commit: str) -> Iterator[Path]:
    """Yield a temporary folder with a commit's files; the repository is not changed."""
    place = root / "build" / "gate"
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{commit[:12]}-", dir=place, ignore_cleanup_errors=True) as folder:
        with tarfile.open(fileobj=io.BytesIO(git(root, "archive", "--format=tar", commit))) as files:
            files.extractall(folder, filter="data")
        yield Path(folder).resolve()
