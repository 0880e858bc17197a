"""Does the number of processes change a training? 1, 2 and 3 of them, the same batches of 64 cells, 50 steps.

    python bench/reliability/ranks.py                # a Markdown table: largest differences from one process
    python bench/reliability/ranks.py --steps 10     # the same, quicker

The cells are the 700 blood cells of the package. The models are the count model of the preset "small" (with labels,
and with labels and a covariate) and the value model of the preset "paper", all narrower. A batch of 64 cells divides
into 21, 21 and 22 cells among three processes. The table has the largest relative difference of a step's loss, and the
largest difference of a weight at the end.
"""

import argparse
import logging
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import wbdit
from wbdit.data.matrix import Source
from wbdit.training import distributed
from wbdit.training.config import Budget, Preset
from wbdit.training.distributed import Ranks
from wbdit.training.fit import TrainingRun
from wbdit.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
WORLDS = (1, 2, 3)
LABEL = "bulk_labels"
KINDS = {  # preset, label, continuous
    "counts, labels": ("small", LABEL, None),
    "counts, labels and a covariate": ("small", LABEL, "time"),
    "values, labels": ("paper", LABEL, None),
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.float32}
READING = {"source": Source(), "genes": None, "batch_key": None}


def train(kind, precision, steps, ranks, micro_batch=None):
    """Train in this process's part; return the losses of all steps and the weights, by name."""
    name, label, continuous = KINDS[kind]
    cells = wbdit.datasets.blood_cells()
    cells.obs["time"] = torch.linspace(0, 1, cells.n_obs).numpy()
    preset = Preset.from_name(name)
    training = replace(preset.training, batch_size=64, micro_batch=micro_batch, precision="fp32")
    model = {**preset.model, "hidden_size": 64, "depth": 2, "num_heads": 4}
    preset = replace(preset, model=model, training=training)
    device, budget = torch.device("cpu"), Budget(steps=steps)
    distributed._joined = ranks
    run = TrainingRun.start(cells, label, continuous, preset, name, budget, 500, 0, device, "fp32", READING)
    run.model.to(DTYPES[precision])  # in place: the loss has the same model
    batches = run.trainer.batches
    for part in ("x", "log_library", "covariates"):
        values = getattr(batches, part)
        if values is not None and values.is_floating_point():
            setattr(batches, part, values.to(DTYPES[precision]))
    training = replace(training, precision="bf16" if precision == "bf16" else "fp32")
    trainer = Trainer(run.trainer.loss_fn, batches, training, budget)
    losses, note = [], trainer.skipped.note

    def keep(step, rows, loss, is_finite):
        losses.append(loss.double())
        note(step, rows, loss, is_finite)

    trainer.skipped.note = keep
    trainer.train(bar=False)
    weights = {f"weights.{name}": p.detach().clone() for name, p in trainer.weights.items()}
    return {"losses": torch.stack(losses), **weights}


def work(out, worlds, kinds, precisions, steps):
    """Train with the first 1, 2 ... of the processes that were started, one after the other; the first one writes."""
    logging.getLogger("wbdit").setLevel(logging.ERROR)
    dist.init_process_group("gloo")
    for world in worlds:
        groups = [dist.new_group(range(world)) for _ in range(2)] if world > 1 else [None, None]
        if dist.get_rank() < world:
            ranks = Ranks(dist.get_rank(), world, *groups)
            for kind in kinds:
                for precision in precisions:
                    found = train(kind, precision, steps, ranks)
                    save_file(found, out / f"{kind}-{precision}-{world}-{ranks.rank}.safetensors")
        dist.barrier()
    dist.destroy_process_group()


def launch(processes, *arguments):
    """Start this file in several processes with the variables that torchrun sets; return their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    known = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [sys.executable, __file__, *map(str, arguments)],
            env=os.environ | known | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
        )
        for rank in range(processes)
    ]
    return [process.wait() for process in started]


def compare(out, kind, precision, world):
    """Return the largest differences of losses (relative) and weights from one process; whether all processes agree."""
    alone, *found = (
        load_file(out / f"{kind}-{precision}-{w}-{rank}.safetensors")
        for w, rank in [(1, 0), *((world, rank) for rank in range(world))]
    )
    agree = all(torch.equal(other[name], found[0][name]) for other in found for name in alone)
    apart = {name: (found[0][name].double() - alone[name].double()).abs() for name in alone}
    losses = float((apart.pop("losses") / alone["losses"].abs()).max())
    return losses, max(float(values.max()) for values in apart.values()), agree


def measure(out, worlds=WORLDS, kinds=tuple(KINDS), precisions=tuple(DTYPES), steps=50):
    """Train all and yield kind, precision, world and the differences from one process."""
    arguments = ["--steps", steps, "--worlds", *worlds, "--kinds", *kinds, "--precisions", *precisions, "--work", out]
    codes = launch(max(worlds), *arguments)
    if any(codes):
        raise SystemExit(f"a process failed: exit codes {codes}")
    for kind in kinds:
        for precision in precisions:
            for world in worlds:
                if world > 1:
                    yield kind, precision, world, *compare(out, kind, precision, world)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS)
    parser.add_argument("--kinds", nargs="+", default=tuple(KINDS))
    parser.add_argument("--precisions", nargs="+", default=tuple(DTYPES))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    options = given.worlds, given.kinds, given.precisions, given.steps
    if given.work is not None:
        work(given.work, *options)
        return
    print("| model | precision | processes | losses | weights | all processes equal |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for kind, precision, world, losses, weights, agree in measure(Path(folder), *options):
            print(f"| {kind} | {precision} | {world} | {losses:.1e} | {weights:.1e} | {'yes' if agree else 'no'} |")


if __name__ == "__main__":
    main()
