"""A peer on randomly ordered genes: measures how much its cells depend on the order of genes in the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from bench.quality.peers.peer import Fitted, Peer


class Reordered(Peer):
    """Another peer, trained on genes in random order; generated cells have the original order again.

    Parameters
    ----------
    inner
        The peer to train.
    number
        Seed of the order, which is the same for all seeds of the comparison.
    """

    def __init__(self, inner: Peer, number: int) -> None:
        self.inner = inner
        self.number = number
        self.name = f"{inner.name}-order-{number}"
        self.title = f"{inner.title}, random gene order {number}"
        self.requires = inner.requires

    @property
    def settings(self) -> dict[str, Any]:
        return {"gene order": self.number, "of": self.inner.settings}

    def fit(self, train: ad.AnnData, labels: Sequence[str], minutes: float, seed: int) -> Fitted:
        order = np.random.default_rng(self.number).permutation(train.n_vars)
        return _Restored(self.inner.fit(train[:, order].copy(), labels, minutes, seed), order)


class _Restored(Fitted):
    def __init__(self, fitted: Fitted, order: np.ndarray) -> None:
        super().__init__()
        self.fitted = fitted
        self.place = np.argsort(order)  # of each original gene in the random order
        self.parameters = fitted.parameters
        self.facts = fitted.facts

    def generate(self, obs: pd.DataFrame, seed: int) -> ad.AnnData:
        return self.fitted.generate(obs, seed)[:, self.place].copy()
