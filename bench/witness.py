"""Check whether any number has changed: two trees compute the same records with one thread, and all are compared.

    python -m bench.witness BASE [--steps 50] [--bounds 0]

BASE is a commit, compared with the working tree. The records are the published outputs, gradients and sampling paths;
the loss of each fp32 training step and the trained weights, for two seeds on the demo's cells; counts and labels of the
generated cells; and the metrics of one evaluation. The exit status is 1 if any record differs by more than --bounds,
relative to the largest value. A run takes about six minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
SEEDS = (0, 1)
LABEL = "bulk_labels"

Record = dict[str, np.ndarray]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a commit, or the folder of another tree")
    parser.add_argument("--steps", type=int, default=50, help="training steps")
    parser.add_argument("--bounds", type=float, default=0.0, help="largest allowed relative difference")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)  # in the tree's own process
    options = parser.parse_args()
    if options.record:
        np.savez(options.record, **dict(record(Path(options.base), options.steps)))
        return 0
    from bench.gate import trees

    if Path(options.base).is_dir():
        base = recorded(Path(options.base).resolve(), options.steps)
    else:
        try:
            with trees.files_of(ROOT, trees.resolve(ROOT, options.base)) as tree:
                base = recorded(tree, options.steps)
        except trees.TreeError as error:
            parser.error(str(error))
    return report(base, recorded(ROOT, options.steps), options.bounds)


def recorded(tree: Path, steps: int) -> Record:
    """Return the records of a tree, computed in a separate process."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.npz"
        arguments = [str(tree), "--steps", str(steps), "--record", str(file)]
        subprocess.run([sys.executable, str(HERE), *arguments], cwd=tree, env=environment, check=True)
        with np.load(file) as arrays:
            return dict(arrays)


def report(base: Record, head: Record, bounds: float) -> int:
    """Print the records that differ; return the exit status."""
    failures = 0
    for name in sorted(base.keys() | head.keys()):
        difference = compare(base.get(name), head.get(name))
        if difference > bounds:
            failures += 1
            print(f"{name}: differs by {difference:.2g}" if np.isfinite(difference) else f"{name}: not comparable")
    print(f"{len(base)} records, {failures or 'none'} of them different")
    return 1 if failures else 0


def compare(base: np.ndarray | None, head: np.ndarray | None) -> float:
    """Return the largest difference relative to the largest value; infinite if shape or type differ."""
    if base is None or head is None or base.shape != head.shape or base.dtype != head.dtype:
        return np.inf
    if np.array_equal(base, head):
        return 0.0
    if not np.issubdtype(base.dtype, np.number):
        return np.inf
    base, head = base.astype(np.float64), head.astype(np.float64)
    difference = np.abs(base - head).max() / max(np.abs(base).max(), 1e-300)
    return np.inf if np.isnan(difference) else float(difference)


# in the tree's own process


def record(tree: Path, steps: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the records of a tree, by name."""
    use(tree)
    yield from published(tree)
    yield from trained(steps)


def use(tree: Path) -> None:
    """Import the package from the tree, even if it is also installed elsewhere."""
    sys.path.insert(0, str(tree))
    import wbdit

    if Path(wbdit.__file__).resolve().parent.parent != tree.resolve():
        raise SystemExit(f"wbdit was imported from {wbdit.__file__}, not from {tree}")
    wbdit.__path__.append(str(tree))  # the tree has kernels/ and csrc/ beside the package
    import torch

    torch.set_num_threads(1)


def published(tree: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield outputs, gradients and sampling paths at the recorded inputs."""
    import torch
    from safetensors import safe_open

    from wbdit import DiT, NoiseSchedule, WBDiT, samplers

    with safe_open(tree / "tests" / "data" / "paper_small.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    sizes = {key: config[key] for key in ("input_size", "patch_size", "hidden_size", "depth", "num_heads")}
    schedule = NoiseSchedule(config["noise_steps"])
    for name, kind in {"wbdit": WBDiT, "dit": DiT}.items():
        model, prefix = kind(**sizes), f"{name}.state."
        model.load_state_dict({k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)})
        out = model(golden[f"{name}.x"], golden[f"{name}.t"])
        torch.nn.functional.mse_loss(out, golden[f"{name}.target"]).backward()
        yield f"golden/{name}/out", out.detach().numpy()
        yield from ((f"golden/{name}/grad/{k}", p.grad.numpy()) for k, p in model.named_parameters() if p.requires_grad)
        path = samplers.ddpm(model.eval(), golden["ddpm.xT"], schedule, noise=golden["ddpm.noise"])
        yield f"golden/{name}/ddpm", path.numpy()


def trained(steps: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield losses, weights, cells and metrics of short runs on the demo's cells."""
    import wbdit

    try:
        from wbdit.datasets import blood_cells
    except ImportError:  # a tree older than that module
        from wbdit.demo import blood_cells

    cells = blood_cells()
    for seed in SEEDS:
        train, test = halves(cells, seed)
        with every_step_logged():
            generator = wbdit.fit(train, label=LABEL, steps=steps, seed=seed, precision="fp32", progress=False)
        yield f"fit/{seed}/loss", np.array([line["loss"] for line in generator.history])
        # sorted digests do not depend on the tensors' names
        digests = sorted(hashlib.sha256(v.numpy().tobytes()).hexdigest() for v in generator.model.state_dict().values())
        yield f"fit/{seed}/weights", np.array(digests)
        synthetic = generator.generate(like=test, seed=seed)
        for part in ("data", "indices", "indptr"):
            yield f"cells/{seed}/{part}", getattr(synthetic.X, part)
        yield f"cells/{seed}/lognorm", synthetic.layers["lognorm"].data
        yield f"cells/{seed}/labels", synthetic.obs[LABEL].astype(str).to_numpy().astype("U")
    metrics = evaluation(test, synthetic, train).to_dict()["metrics"]
    yield from ((f"metric/{name}", np.array(flat(value))) for name, value in metrics.items())


def halves(cells: Any, seed: int) -> tuple[Any, Any]:
    """Split cells into two random halves, stratified by label."""
    rng = np.random.default_rng(seed)
    first = np.zeros(cells.n_obs, bool)
    for rows in cells.obs.groupby(LABEL, observed=True).indices.values():
        first[rng.permutation(rows)[: (len(rows) + 1) // 2]] = True
    return cells[first].copy(), cells[~first].copy()


class every_step_logged:
    """Context in which training logs every step; finds the module that defines the interval."""

    def __enter__(self) -> None:
        import wbdit

        wbdit.fit  # noqa: B018 (imports the module)
        loaded = [module for name, module in list(sys.modules.items()) if name.startswith("wbdit.")]
        (self.module,) = [module for module in loaded if "LOG_SECONDS" in vars(module)]
        self.before, self.module.LOG_SECONDS = self.module.LOG_SECONDS, -1.0

    def __exit__(self, *_: object) -> None:
        self.module.LOG_SECONDS = self.before


def evaluation(real: Any, synthetic: Any, train: Any) -> Any:
    import wbdit

    try:
        evaluate = wbdit.evaluate
    except AttributeError:  # a tree older than wbdit.evaluate
        from wbdit.evaluation import evaluate
    return evaluate(real, synthetic, train=train, label=LABEL, bootstrap=50)


def flat(value: Any) -> list[float]:
    """Return the numbers of a nested structure, in its order."""
    if isinstance(value, dict):
        return [number for one in value.values() for number in flat(one)]
    if isinstance(value, list | tuple):
        return [number for one in value for number in flat(one)]
    return [float(value)] if isinstance(value, int | float) else []


if __name__ == "__main__":
    raise SystemExit(main())
