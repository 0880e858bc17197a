"""Interface of a generator in the comparison: train within a time limit, then generate counts for labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

LABEL = "joined label"  # unlikely to be a column of the cells


class Fitted(ABC):
    """A trained peer.

    Attributes
    ----------
    parameters
        Number of learned parameters; None if the peer keeps the training cells themselves.
    facts
        Facts about the training, such as the number of epochs.
    """

    parameters: int | None = None

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    @abstractmethod
    def generate(self, obs: pd.DataFrame, seed: int) -> ad.AnnData:
        """Return one cell per row of `obs`, in order: counts ``(n, G)`` over the training genes.

        Parameters
        ----------
        obs
            Label columns of the requested cells.
        seed
            Seed of the generation.
        """


class Peer(ABC):
    """A method that generates synthetic cells.

    Attributes
    ----------
    name
        Name on the command line and in file names.
    title
        Title of its column in the table.
    requires
        Module and distribution of an optional package that it needs; None if it needs none.
    """

    name: str
    title: str
    requires: tuple[str, str] | None = None

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Settings that determine the cells, besides data, time and seed; a change invalidates kept results."""

    @abstractmethod
    def fit(self, train: ad.AnnData, labels: Sequence[str], minutes: float, seed: int) -> Fitted:
        """Train on cells.

        Parameters
        ----------
        train
            Raw counts of the genes to generate.
        labels
            Columns of ``obs`` to condition on; :func:`joined` combines several into one.
        minutes
            Wall-clock limit of the training alone, without work before and after it. Peers without training ignore it.
        seed
            Seed of all random numbers.
        """


def joined(obs: pd.DataFrame, labels: Sequence[str]) -> pd.Series:
    """Return one label per cell, joined from several columns, such as ``"B | stim"``."""
    return obs[list(labels)].astype(str).agg(" | ".join, axis=1)


def with_joined(cells: ad.AnnData, labels: Sequence[str]) -> ad.AnnData:
    """Return an AnnData with only the counts and the joined labels, in ``obs["joined label"]``."""
    obs = joined(cells.obs, labels).astype("category").to_frame(LABEL)
    return ad.AnnData(sp.csr_matrix(cells.X, dtype=np.float32), obs=obs, var=pd.DataFrame(index=cells.var_names))


def cells_of(counts: Any, obs: pd.DataFrame, genes: pd.Index) -> ad.AnnData:
    """Return counts ``(n, G)``, dense or sparse, as AnnData with these labels."""
    return ad.AnnData(sp.csr_matrix(counts, dtype=np.float32), obs=obs.copy(), var=pd.DataFrame(index=genes))


def rows_by_label(labels: Sequence[str] | pd.Series) -> dict[str, np.ndarray]:
    """Return the row numbers of each label."""
    values = pd.Series(np.asarray(labels, dtype=object))
    return dict(values.groupby(values).indices)
