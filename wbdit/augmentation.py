"""Augmentation: real cells, and synthetic ones for labels with few cells."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from wbdit.data.expression import check_cells, check_labels, label_text
from wbdit.data.labels import OPEN
from wbdit.data.normalize import transformed
from wbdit.data.preprocessor import Preprocessor
from wbdit.errors import InputError
from wbdit.generator import CellGenerator
from wbdit.training.fit import fit

SYNTHETIC = "synthetic"  # column of obs

logger = logging.getLogger("wbdit")


def augment(
    adata: ad.AnnData,
    *,
    label: str,
    min_cells: int = 200,
    generator: CellGenerator | None = None,
    seed: int = 0,
    **training: Any,
) -> ad.AnnData:
    """Add synthetic cells to each label that has fewer than `min_cells` cells.

    The result suits the training of a classifier on balanced labels. It does not suit statistics such as differential
    expression: synthetic cells are no independent observations, so the number of observations does not increase.

    Parameters
    ----------
    adata
        Real cells.
    label
        Column of ``obs`` with the labels.
    min_cells
        Number of cells that each label has at least in the result.
    generator
        A generator trained with `label` as a label column. With several label columns, the other labels of the
        synthetic cells have the proportions of the training cells. Without a generator, one is trained on `adata`.
    seed
        Seed of the synthetic cells, and of the training.
    training
        Further arguments of :func:`wbdit.fit` for the training, such as ``minutes=3``.

    Returns
    -------
    The real cells, then the synthetic ones, over the generator's genes; by default these are at most the 2,000 most
    variable ones. ``X`` holds the kind of values that the generator was trained on. Counts and log-normalized values
    come with ``layers["lognorm"]``, computed over these genes. ``obs`` keeps its columns, which are empty for synthetic
    cells except the labels and covariates; the new column ``obs["synthetic"]`` (bool) tells the two apart. ``var`` and
    ``uns`` are kept, and ``uns["wbdit"]`` says how the synthetic cells were made. ``raw``, other layers, ``obsm``,
    ``obsp`` and ``varm`` are dropped, because synthetic cells have none.

    Raises
    ------
    InputError
        If the cells or the generator cannot be used, ``obs`` has a column "synthetic" already, or no label has fewer
        than `min_cells` cells.

    Examples
    --------
    >>> few = cells[cells.obs["bulk_labels"].isin(["Dendritic", "CD19+ B"])]
    >>> few.obs["bulk_labels"].value_counts().to_dict()
    {'Dendritic': 240, 'CD19+ B': 95}
    >>> augmented = wbdit.augment(few, label="bulk_labels", min_cells=100, generator=generator)
    >>> augmented.obs[["bulk_labels", "synthetic"]].value_counts().to_dict()
    {('Dendritic', False): 240, ('CD19+ B', False): 95, ('CD19+ B', True): 5}
    """
    missing = missing_cells(adata, label, min_cells)
    if generator is None:
        generator = fit(adata, label=label, seed=seed, **training)
    elif training:
        raise InputError(f"`{next(iter(training))}` is for a new training: leave it out, or leave out `generator`")
    preprocessor = generator.preprocessor
    place = preprocessor.labels.position(label)
    real = _real(adata, preprocessor)
    asked: dict[str | tuple[str, ...], int] = {
        tuple(name if column == place else OPEN for column in range(len(preprocessor.labels.columns))): n
        for name, n in missing.items()
    }
    synthetic = generator.generate(n_per_label=asked, seed=seed)
    logger.info(
        f"added {synthetic.n_obs} synthetic to {real.n_obs} real cells, over the generator's {real.n_vars} of "
        f"{adata.n_vars} genes: {', '.join(f'{n} {name}' for name, n in missing.items())}"
    )
    logger.info(
        "use them to balance a classifier, not for statistics such as differential expression: synthetic cells do not "
        "increase n"
    )
    return _joined(real, synthetic, adata.uns)


def missing_cells(adata: ad.AnnData, label: str, min_cells: int) -> dict[str, int]:
    """Return how many cells each label lacks to have `min_cells`, for labels that lack any.

    Raises
    ------
    InputError
        If the cells or the column cannot be used, or no label lacks cells.

    Examples
    --------
    >>> from wbdit.augmentation import missing_cells
    >>> missing_cells(cells, "bulk_labels", 20)
    {'CD34+': 7, 'CD4+/CD45RA+/CD25- Naive T': 12, 'CD4+/CD45RO+ Memory': 1}
    """
    check_cells(adata)
    check_labels(adata, label)
    if SYNTHETIC in adata.obs.columns:
        raise InputError(f"obs has a column {SYNTHETIC!r} already: give real cells only, and rename or drop the column")
    sizes = label_text(adata.obs[label]).value_counts().sort_index()
    missing = {str(name): int(min_cells - n) for name, n in sizes.items() if n < min_cells}
    if not missing:
        rarest = sizes.idxmin()
        raise InputError(
            f"nothing to add: the rarest label, {rarest!r}, has {sizes[rarest]} cells; choose `min_cells` above that"
        )
    return missing


def _real(adata: ad.AnnData, preprocessor: Preprocessor) -> ad.AnnData:
    """Return the real cells over the generator's genes, with the layers and the kind of labels of synthetic cells."""
    matrix = preprocessor.matrix(adata)
    cells = ad.AnnData(matrix, obs=adata.obs.copy(), var=adata.var.loc[list(preprocessor.genes)])
    if preprocessor.space != "scaled":
        cells.X = sp.csr_matrix(matrix)
        values = transformed(matrix, "lognorm") if preprocessor.space == "counts" else matrix
        cells.layers["lognorm"] = sp.csr_matrix(values)
    for column in cells.obs.columns.intersection(preprocessor.labels.columns):
        cells.obs[column] = label_text(cells.obs[column]).astype("category")  # they may be numbers, such as clusters
    for column in cells.obs.columns.intersection(preprocessor.covariates.columns):
        cells.obs[column] = cells.obs[column].astype(np.float64)  # as for synthetic cells; they may be True and False
    return cells


def _joined(real: ad.AnnData, synthetic: ad.AnnData, uns: Mapping[str, Any]) -> ad.AnnData:
    """Return the real and the synthetic cells together."""
    while synthetic.obs_names.isin(real.obs_names).any():
        synthetic.obs_names = "new-" + synthetic.obs_names
    cells = ad.concat([real, synthetic], merge="first")
    real.obs[SYNTHETIC], synthetic.obs[SYNTHETIC] = False, True
    obs = pd.concat([real.obs, synthetic.obs])[real.obs.columns]
    for column, before in real.obs.dtypes.items():
        if isinstance(before, pd.CategoricalDtype):
            known = [*before.categories, *obs[column].dropna().unique()]
            obs[column] = pd.Categorical(obs[column], categories=list(dict.fromkeys(known)), ordered=before.ordered)
        elif pd.api.types.is_bool_dtype(before) and obs[column].isna().any():
            obs[column] = obs[column].astype("boolean")  # .h5ad has no column of True, False and NaN
    cells.obs = obs
    cells.uns = {**uns, "wbdit": synthetic.uns["wbdit"]}
    return cells
