"""Synthetic blood cells in seconds, from a small trained run that comes with the package."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import anndata as ad

from wbdit.generator import CellGenerator, load

FOLDER = Path(__file__).parent


def example(n: int = 1000, seed: int = 0) -> ad.AnnData:
    """Return synthetic blood cells, for teaching and for tests of other programs; works offline.

    The cells come from a small run in ``wbdit/example_run``, trained on cells of
    :func:`wbdit.datasets.blood_cells`. ``README.md`` in that folder holds its scores.

    Parameters
    ----------
    n
        Number of cells. Their cell types have the proportions of the training cells.
    seed
        Random seed. The same seed and `n` give the same cells.

    Returns
    -------
    AnnData of `n` cells by 765 genes: counts in ``X``, ``layers["lognorm"]``, and one of ten cell types in
    ``obs["bulk_labels"]``.

    Raises
    ------
    InputError
        If `n` is less than one.

    Examples
    --------
    >>> cells = wbdit.example(n=20)
    >>> cells.shape, cells.obs["bulk_labels"].nunique()
    ((20, 765), 8)
    """
    return example_generator().generate(n, seed=seed)


@cache
def example_generator() -> CellGenerator:
    """Return the generator of :func:`example`, which is loaded once.

    Examples
    --------
    >>> from wbdit.example_run import example_generator
    >>> rare = example_generator().generate(n_per_label={"CD34+": 5})
    >>> rare.n_obs
    5
    """
    return load(FOLDER, device="cpu")
