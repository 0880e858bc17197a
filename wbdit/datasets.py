"""Real cells shipped with the package, for the demo, the examples and a first try."""

from __future__ import annotations

from importlib.resources import files

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

LABEL = "bulk_labels"


def blood_cells() -> ad.AnnData:
    """Return 700 human blood cells with raw counts and cell types.

    The cells are from 10x Genomics (Zheng et al. 2017), CC BY 4.0, in the subset of
    ``scanpy.datasets.pbmc68k_reduced``. ``blood_cells.md`` beside this module gives the source and the license.

    Returns
    -------
    AnnData of 700 cells by 765 genes. ``X`` holds integer counts as a sparse fp32 matrix. ``obs["bulk_labels"]`` holds
    one of ten cell types per cell.

    Examples
    --------
    >>> cells = wbdit.datasets.blood_cells()
    >>> cells.shape, cells.obs["bulk_labels"].nunique()
    ((700, 765), 10)
    """
    with files("wbdit").joinpath("blood_cells.npz").open("rb") as file, np.load(file) as kept:
        shape = len(kept["barcodes"]), len(kept["genes"])
        parts = ("counts", np.float32), ("genes_of_counts", np.int32), ("cell_starts", np.int32)
        counts = sp.csr_matrix(tuple(kept[name].astype(dtype) for name, dtype in parts), shape=shape)
        labels = pd.Categorical.from_codes(kept["labels"], kept["label_names"])
        obs = pd.DataFrame({LABEL: labels}, index=kept["barcodes"].astype(object))
        var = pd.DataFrame(index=kept["genes"].astype(object))
    return ad.AnnData(counts, obs=obs, var=var)
