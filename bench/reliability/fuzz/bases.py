"""Small whole files and runs, which the fuzzer damages."""

import warnings
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

import wbdit

N, G = 12, 9


def cells(kind="csr", seed=0):
    """Return 12 cells by 9 genes of two types."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(1.0, 4.0, (2, G))[np.arange(N) % 2]).astype(np.float32)
    counts[:, 0] += 1
    X = {"csr": sp.csr_matrix, "csc": sp.csc_matrix}.get(kind, np.asarray)(counts)
    if kind == "log":
        X = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    adata = ad.AnnData(X)
    adata.obs_names, adata.var_names = [f"cell-{i}" for i in range(N)], [f"gene-{i}" for i in range(G)]
    adata.obs["type"] = pd.Categorical(np.array(["B", "NK"])[np.arange(N) % 2])
    adata.obs["condition"] = np.array(["ctrl", "stim"])[np.arange(N) // 2 % 2]
    adata.obs["age"] = np.linspace(20, 60, N)
    if kind in ("csr", "csc"):
        adata.obs["flag"] = pd.array([True, None] * (N // 2), "boolean")
        adata.var["marker"] = np.arange(G) % 2 == 0
    if kind == "csc":
        adata.raw = ad.AnnData(sp.csr_matrix(counts), obs=adata.obs, var=adata.var)
        adata.X = sp.csr_matrix(np.log1p(counts / counts.sum(1, keepdims=True) * 1e4))
        adata.layers["counts"] = sp.csc_matrix(counts)
    if kind == "dense":
        adata.obsm["X_pca"] = counts[:, :2]
        adata.obsp["near"] = sp.csr_matrix(np.eye(N))
        adata.uns["wbdit"] = {"trained_on": "counts", "seed": 0, "guidance": {"type": 2.0}}
        adata.uns["type_colors"] = np.array(["#111111", "#222222"], dtype=object)
    return adata


def files(folder):
    """Return the content of ``.h5ad`` files by kind."""
    found = {}
    for kind in ("csr", "csc", "dense", "log"):
        path = Path(folder) / f"{kind}.h5ad"
        cells(kind).write_h5ad(path, compression="gzip" if kind == "csr" else None)
        found[kind] = path.read_bytes()
    return found


def preset(name="small", **changes):
    own = wbdit.Preset.from_name(name)
    model = {**own.model, "hidden_size": 8, "depth": 1, "num_heads": 2, "patch_size": 4}
    return replace(own, model=model, training=replace(own.training, batch_size=4), **changes)


def runs(folder):
    """Return the files of RUN folders by kind: ``{kind: {path: content}}``."""
    kinds = {
        "one": ("csr", {"label": "type"}, preset()),
        "two": ("csr", {"label": ["type", "condition"], "continuous": "age"}, preset()),
        "paper": ("csr", {"label": "type"}, preset("paper")),
        "log": ("log", {}, preset("dit")),
    }
    found = {}
    for kind, (of, given, chosen) in kinds.items():
        run = Path(folder) / f"run-{kind}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wbdit.fit(cells(of), preset=chosen, steps=2, out=run, device="cpu", progress=False, **given)
        found[kind] = {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    return found


def tensors(content):
    """Return the tensors of a safetensors file as numpy arrays, and its metadata."""
    from safetensors.numpy import load

    size = int.from_bytes(content[:8], "little")
    import json

    return dict(load(content)), json.loads(content[8 : 8 + size]).get("__metadata__")


def saved(arrays, metadata):
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata)


__all__ = ["cells", "files", "runs", "saved", "tensors"]
