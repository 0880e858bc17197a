"""What the tests share: small cells, the published numbers, and memory that shows when it was not written."""

import json
import os
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from safetensors import safe_open

if os.environ.get("WBDIT_TEST_ENGINE") == "triton":  # with TRITON_INTERPRET=1: the GPU's kernels on CPU tensors
    import interpreter

    from wbdit.ops import triton as engine

    interpreter.install()
    engine.register("cpu")

GOLDEN = Path(__file__).parent / "data" / "paper_small.safetensors"


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """Fill fresh memory with NaN, so that an output nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def golden():
    """Return the tensors recorded from the published implementation, by name, and its configuration."""
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])
        return {name: file.get_tensor(name) for name in file.keys()}, config  # noqa: SIM118


@pytest.fixture(scope="session")
def cells():
    """Return 60 made-up cells by 30 genes: counts in X, three types in obs["type"]."""
    return make_cells(60, 30)


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
    """Return the norm of the difference over the norm of what is expected."""
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm())
