"""Agreement of the principal components with an exact decomposition, and their time.

    python bench/reliability/components.py DATA

The exact variances are the eigenvalues of the cells' matrix of inner products, so DATA should have few cells. Prints
the share of the exact leading variance that the axes miss.
"""

import sys
import time

import anndata as ad
import numpy as np
import scipy.sparse as sp

from wbdit.data.cell_matrix import MemoryMatrix
from wbdit.data.components import components_of

K = 64


def main(path: str) -> None:
    """Compare on the genes that at least three cells express."""
    counts = sp.csr_matrix(ad.read_h5ad(path).X, dtype=np.float32)
    counts = counts[:, np.asarray((counts > 0).sum(0)).ravel() >= 3]
    values = np.log1p(counts.toarray().astype(np.float64))
    values -= values.mean(0)
    exact = np.linalg.eigvalsh(values @ values.T)[::-1][:K].sum()

    print(f"{counts.shape[0]} x {counts.shape[1]} cells, {counts.nnz} nonzero values, {K} components", flush=True)
    began = time.process_time()
    axes = components_of(MemoryMatrix(counts), "log1p", K).axes
    seconds = time.process_time() - began
    missed = 1 - np.sum((values @ axes.T) ** 2) / exact
    print(f"misses {missed:.1e} of the leading variance; {seconds:.1f} processor s")


if __name__ == "__main__":
    main(sys.argv[1])
