"""Kill the shipped commands at random moments, and check what they leave.

    python bench/reliability/kills.py --kills 100 --generations 30

``wbdit train`` runs on 700 real blood cells with default settings, apart from ``--steps``. It is killed (SIGKILL) after
a random time, uniform over the duration of an undisturbed run, and started again: with ``--resume`` if the folder holds
a save, else afresh. After each kill the run must load as one save. Each run is killed a few times and then ends
undisturbed: its weights must equal those of the run that was never killed, bit by bit, and nothing but the files of two
saves may be left. ``wbdit generate`` is killed in the same way: its output is absent or whole, and equal in the end.

Prints one line of JSON. The exit status is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import wbdit
from wbdit._outputs import MANIFEST, RUN_FILES
from wbdit.errors import InputError
from wbdit.run_folder import PREVIOUS, holds_run

COMMAND = str(Path(sys.executable).parent / "wbdit")
KILLS_PER_RUN = 4
ONE_SAVE = {*RUN_FILES, MANIFEST}
WHOLE = ONE_SAVE | {f"{PREVIOUS}/{name}" for name in ONE_SAVE}


def run_or_kill(command: list[str], seconds: float | None) -> bool:
    """Run a command; kill it after some seconds. Return whether it ended by itself, which must be in order."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return False
        if process.returncode != 0:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed: {said.read().decode()[-500:]}")
        return True


def killed_repeatedly(
    start: Callable[[Path], list[str]],
    check: Callable[[Path, Counter], object],
    name: Callable[[int], Path],
    kills: int,
    duration: float,
    moments: random.Random,
    found: Counter,
) -> list[Path]:
    """Start a command again and again and kill it, `kills` times in all; return the outputs that were completed."""
    outputs: list[Path] = []
    while found["kills"] < kills:
        path = name(len(outputs))
        for _ in range(min(KILLS_PER_RUN, kills - found["kills"])):
            if run_or_kill(start(path), moments.uniform(0, duration)):
                break  # it was faster than the undisturbed one
            found["kills"] += 1
            check(path, found)
        else:
            run_or_kill(start(path), None)
        outputs.append(path)
    return outputs


def check_run(run: Path, found: Counter) -> None:
    """Count what a killed training left: no save, one that loads, or one that does not."""
    if not holds_run(run):
        found["before the first save"] += 1
        return
    try:
        found[f"at step {wbdit.load(run, device='cpu').config.trained.steps}"] += 1
    except InputError as error:
        found[f"wrong: {error}"] += 1


def training(folder: Path, kills: int, steps: int, moments: random.Random) -> tuple[Counter, Path]:
    """Kill trainings; return what was found, and a whole run."""
    cells = folder / "cells.h5ad"
    wbdit.datasets.blood_cells().write_h5ad(cells)

    def start(run: Path) -> list[str]:
        command = [COMMAND, "train", str(cells), "--label", "bulk_labels", "--steps", str(steps), "--out", str(run)]
        return [*command, "--resume"] if holds_run(run) else command

    began = time.monotonic()
    run_or_kill(start(folder / "undisturbed"), None)
    duration = time.monotonic() - began
    expected = wbdit.load(folder / "undisturbed", device="cpu").config.model_hash
    found: Counter = Counter()
    runs = killed_repeatedly(start, check_run, lambda i: folder / f"run-{i}", kills, duration, moments, found)
    for run in runs:
        found["runs"] += 1
        found["equal hashes"] += wbdit.load(run, device="cpu").config.model_hash == expected
        left = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
        found["runs without temporaries"] += left == WHOLE
    found["seconds undisturbed"] = round(duration)
    return found, folder / "undisturbed"


def generation(folder: Path, run: Path, kills: int, n: int, moments: random.Random) -> Counter:
    """Kill generations and return what was found."""

    def start(path: Path) -> list[str]:
        return [COMMAND, "generate", str(run), "--n", str(n), "--out", str(path), "--resume"]

    def check(path: Path, found: Counter) -> None:
        found[
            "without a file" if not path.exists() else "with a whole file" if digest(path) == expected else "wrong"
        ] += 1

    began = time.monotonic()
    undisturbed = folder / "undisturbed.h5ad"
    run_or_kill(start(undisturbed), None)
    duration = time.monotonic() - began
    expected = digest(undisturbed)
    found: Counter = Counter()
    into = folder / "generated"
    files = killed_repeatedly(start, check, lambda i: into / f"{i}.h5ad", kills, duration, moments, found)
    found["files"] = len(files)
    found["equal files"] = sum(digest(path) == expected for path in files)
    found["other files left"] = len(list(into.rglob("*"))) - len(files)
    return found


def digest(path: Path) -> str:
    """Return the SHA-256 of the cells of a file, which does not depend on how HDF5 lays them out."""
    import anndata as ad

    cells = ad.read_h5ad(path)
    parts = (cells.X.indptr, cells.X.indices, cells.X.data, cells.obs.to_csv().encode())
    return hashlib.sha256(b"".join(bytes(memoryview(part).cast("B")) for part in parts)).hexdigest()


def main() -> int:
    """Run the harness."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="kills of training")
    parser.add_argument("--generations", type=int, default=30, help="kills of generation")
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    parser.add_argument("--n", type=int, default=2000, help="cells to generate")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained, run = training(folder, options.kills, options.steps, moments)
        print(json.dumps({"training": trained}), flush=True)
        wrong = trained["equal hashes"] < trained["runs"] or trained["runs without temporaries"] < trained["runs"]
        wrong |= any(key.startswith("wrong") for key in trained)
        if options.generations:
            made = generation(folder, run, options.generations, options.n, moments)
            print(json.dumps({"generation": made}), flush=True)
            wrong |= made["equal files"] < made["files"] or made["other files left"] > 0 or made["wrong"] > 0
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
