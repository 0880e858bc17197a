"""Shared helpers: synthetic cells, small models with nonzero weights, the published model, the command line."""

import os
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import wbdit
from wbdit import DiT, WBDiT, cli
from wbdit.nn import conditioning, weight_cache
from wbdit.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "data" / "paper_small.safetensors"
GOLDEN_SIZES = ("input_size", "patch_size", "hidden_size", "depth", "num_heads")
SMALL = {"input_size": 40, "patch_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 4}


def make_cells(n_cells, n_genes, types=("B", "NK", "T"), seed=0):
    rng = np.random.default_rng(seed)
    profile = rng.gamma(1.0, 2.0, (len(types), n_genes))
    code = np.arange(n_cells) % len(types)
    depth = rng.lognormal(0, 0.3, (n_cells, 1))
    counts = rng.poisson(profile[code] * depth).astype(np.float32)
    adata = ad.AnnData(sp.csr_matrix(counts))
    adata.obs_names = [f"cell-{i}" for i in range(n_cells)]
    adata.var_names = [f"gene-{i}" for i in range(n_genes)]
    adata.obs["type"] = np.array(types)[code]
    return adata


def relative_error(value, expected):
    """Return the norm of the difference divided by the norm of the expected tensor."""
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm())


def stirred(model, seed=0):
    """Redraw all weights so that no path outputs zero; models of equal shapes get equal weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def simulate_gpu(monkeypatch):
    """Let CPU tensors take the ways of a GPU: weights are not read back, and one op runs a white-box model."""
    monkeypatch.setattr(weight_cache, "TRACKED", ("cpu",))
    for module in (weight_cache, conditioning):
        monkeypatch.setattr(module, "is_cheap_to_read", lambda t: False)
    monkeypatch.setattr(WBDiT, "_is_one_op", lambda self, x: not torch.is_grad_enabled())


class Launches(TorchDispatchMode):
    """A list of the ops that compute or copy something, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        # the schedule, whose levels are read as numbers, is always on a CPU
        if not op.is_view and str(op) not in ("aten.empty.memory_format", "aten._local_scalar_dense.default"):
            self.names.append(str(op).removesuffix(".default"))
        return op(*args, **(kwargs or {}))


def batch(input_size=40, channels=1, n=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, input_size, generator=generator), torch.tensor([1, 500, 999])[:n]


def published_model(name, golden):
    """Return the model "wbdit" or "dit" with the weights recorded from the published implementation."""
    tensors, config = golden
    model = {"wbdit": WBDiT, "dit": DiT}[name](**{key: config[key] for key in GOLDEN_SIZES})
    prefix = f"{name}.state."
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    model.load_state_dict(state, strict=True)
    return model


def exit_code(*arguments):
    """Run a command and return its exit code."""
    with pytest.raises(SystemExit) as exit_:
        cli.run([str(argument) for argument in arguments])
    return exit_.value.code


def tiny_preset(name="small", **training):
    """Return a preset with one narrow block, and some settings of the training changed."""
    preset = wbdit.Preset.from_name(name)
    model = {**preset.model, "hidden_size": 16, "depth": 1, "num_heads": 2}
    return replace(preset, model=model, training=replace(preset.training, **training))


@contextmanager
def interrupt_at(step):
    """Interrupt trainings during a step by SIGINT, even if the shell that runs the tests ignores that signal."""
    update = Trainer._update

    def pressed(trainer):
        if trainer.step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return update(trainer)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_update", pressed)
            yield
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def as_old_version(run):
    """Make a RUN folder one of an older version, whose files were not verified and can be changed here."""
    (run / "manifest.json").unlink()
    shutil.rmtree(run / "previous", ignore_errors=True)
    return run


def two_columns(n=120):
    """Return cells of three types, one with "/" in its name, under two conditions; T/reg never occurs under stim."""
    cells = make_cells(n, 30, types=("B", "NK", "T/reg"))
    code = np.arange(n)
    stim = (code % 2 == 1) & (code % 3 != 2)
    cells.obs["condition"] = np.where(stim, "stim", "ctrl")
    counts = cells.X.toarray()
    counts[stim, :5] += 20  # effect of the stimulus
    cells.X = counts
    return cells


def spreading(n, factor=1.0, seed=0, genes=60, labels=("a", "b"), code=None):
    """Return cells that vary along two directions within each label, with deviations scaled by `factor`."""
    rng = np.random.default_rng(seed)
    code = np.arange(n) % len(labels) if code is None else code
    directions = np.linalg.qr(np.random.default_rng(9).normal(size=(genes, 2)))[0].T * genes**0.5
    places = rng.normal(size=(n, 2)) * [0.2, 0.12] * factor
    rates = np.exp(3 + 0.5 * code[:, None] * np.sin(np.arange(genes)) + places @ directions)
    cells = ad.AnnData(rng.poisson(rates * rng.lognormal(0, 0.2, (n, 1))).astype(np.float32))
    cells.obs["type"] = np.array(labels)[code]
    return cells
