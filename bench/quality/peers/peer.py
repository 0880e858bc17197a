"""What a generator must do to stand in the table: learn within a time, and give counts for labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

LABEL = "joined label"  # unlike any column's name that the cells may bring


class Fitted(ABC):
    """A peer that has seen the training cells.

    Attributes
    ----------
    parameters
        How many numbers were learned; None where it keeps the training cells themselves.
    facts
        What is worth knowing of the training: epochs, why it ended.
    """

    parameters: int | None = None

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    @abstractmethod
    def generate(self, obs: pd.DataFrame, seed: int) -> ad.AnnData:
        """Return a cell for each row of `obs`, in order: counts ``(n, G)`` over the training genes.

        Parameters
        ----------
        obs
            The label columns of the cells that are asked for, and nothing else.
        seed
            Of the draw.
        """


class Peer(ABC):
    """A way to make synthetic cells.

    Attributes
    ----------
    name
        On the command line and in file names.
    title
        Over its column.
    """

    name: str
    title: str

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides the cells besides data, time and seed; a change of it makes a kept result stale."""

    @abstractmethod
    def fit(self, train: ad.AnnData, labels: Sequence[str], minutes: float, seed: int) -> Fitted:
        """Learn from training cells.

        Parameters
        ----------
        train
            Raw counts over the genes to generate.
        labels
            Columns of ``obs`` to condition on; :func:`joined` makes one of several.
        minutes
            Of training on the wall clock, what comes before and after it apart; what needs no training ignores it.
        seed
            Of everything random.
        """


def joined(obs: pd.DataFrame, labels: Sequence[str]) -> pd.Series:
    """Return one label a cell out of several columns, ``"B | stim"``."""
    return obs[list(labels)].astype(str).agg(" | ".join, axis=1)


def with_joined(cells: ad.AnnData, labels: Sequence[str]) -> ad.AnnData:
    """Return counts and the joined labels in ``obs["joined label"]``, nothing else."""
    obs = joined(cells.obs, labels).astype("category").to_frame(LABEL)
    return ad.AnnData(sp.csr_matrix(cells.X, dtype=np.float32), obs=obs, var=pd.DataFrame(index=cells.var_names))


def cells_of(counts: Any, obs: pd.DataFrame, genes: pd.Index) -> ad.AnnData:
    """Return counts ``(n, G)``, dense or sparse, as AnnData with these labels."""
    return ad.AnnData(sp.csr_matrix(counts, dtype=np.float32), obs=obs.copy(), var=pd.DataFrame(index=genes))


def rows_by_label(labels: Sequence[str] | pd.Series) -> dict[str, np.ndarray]:
    """Return the rows of each label."""
    values = pd.Series(np.asarray(labels, dtype=object))
    return dict(values.groupby(values).indices)
