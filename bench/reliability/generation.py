"""Generation at length and over ranks, through the shipped command: memory, kills, and ranks against batches.

    python bench/reliability/generation.py kills RUN --cells 1000000 --kills 5     # peak memory, kills, equal files
    python bench/reliability/generation.py ranks RUN --cells 5000                  # 1, 2, 3 ranks x batch 7, 64

RUN is a folder of ``wbdit train``. `kills` generates the cells once undisturbed, and once with kill -9 at random
moments, each followed by --resume; it also generates a tenth of them, for the memory. `ranks` starts the ranks as
torchrun does, by environment variables, and joins their files. Both print one JSON line per result, and exit with 1 if
two files differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [sys.executable, "-c", "from wbdit.cli import run; run()"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["kills", "ranks"])
    parser.add_argument("run", type=Path)
    parser.add_argument("--cells", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--calls", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--folder", type=Path, help="for the files  [default: a temporary folder]")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return {"kills": kills, "ranks": ranks}[options.check](options, folder)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)


def kills(options: argparse.Namespace, folder: Path) -> int:
    few, _ = measured(options, folder / "few.h5ad", options.cells // 10)
    say(check="memory", cells=options.cells // 10, **few)
    whole, seconds = measured(options, folder / "whole.h5ad", options.cells)
    say(check="memory", cells=options.cells, **whole)
    chance, out, killed = random.Random(options.seed), folder / "killed.h5ad", 0
    while killed < options.kills:
        process = subprocess.Popen(command(options, out, options.cells, "--resume"), stderr=subprocess.DEVNULL)
        try:
            process.wait(chance.uniform(0.02, 0.5) * seconds)
            break  # it was finished before the kill
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            say(check="kill", number=killed, final_name=out.exists(), left=sorted(p.name for p in folder.iterdir()))
    if not out.exists():
        subprocess.run(command(options, out, options.cells, "--resume"), check=True, stderr=subprocess.DEVNULL)
    same = digest(out) == digest(folder / "whole.h5ad")
    say(check="kills", kills=killed, same=same, left=sorted(path.name for path in folder.iterdir()))
    return 0 if same else 1


def ranks(options: argparse.Namespace, folder: Path) -> int:
    found = set()
    for n in (1, 2, 3):
        for batch_size in (7, 64):
            out, began = folder / f"{n}-{batch_size}.h5ad", time.monotonic()
            given = command(options, out, options.cells, "--batch-size", batch_size)
            started = [
                subprocess.Popen(given, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(n)}, stderr=2)
                for rank in range(n)
            ]
            if sum(process.wait() for process in started):
                return 1
            if n > 1:
                parts = [str(folder / f"{out.stem}.rank{rank}-of-{n}.h5ad") for rank in range(n)]
                subprocess.run([*COMMAND, "join", *parts, "--out", str(out)], check=True)
            found.add(digest(out))
            say(ranks=n, batch_size=batch_size, sha256=digest(out)[:16], seconds=round(time.monotonic() - began))
    say(check="ranks", files=6, different=len(found))
    return 0 if len(found) == 1 else 1


def command(options: argparse.Namespace, out: Path, cells: int, *more: object) -> list[str]:
    given = ["generate", options.run, "--n", cells, "--calls", options.calls, "--out", out, *more]
    return [*COMMAND, *map(str, given)]


def measured(options: argparse.Namespace, out: Path, cells: int) -> tuple[dict, float]:
    """Generate cells, and return the peak memory of the process, the size of its file, and the seconds it took."""
    began = time.monotonic()
    process = subprocess.Popen(command(options, out, cells), stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("the command failed")
    seconds = time.monotonic() - began
    peak, size = usage.ru_maxrss / 2**20, out.stat().st_size / 2**20
    return {"peak_gib": round(peak, 3), "file_mib": round(size, 1), "seconds": round(seconds)}, seconds


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say(**record: object) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
