"""scDesign3 (Song et al. 2024) by its Python port, scdesigner: negative binomial genes, tied by a Gaussian copula.

Each gene's counts follow a negative binomial distribution whose mean depends on the label. A Gaussian copula with one
correlation matrix per label ties the genes. New cells are drawn from the model alone, library sizes included.

Optimizer and early stopping are the package's defaults: AdamW with a learning rate of 0.005, at most 500 epochs, a
tenth of the cells held out. So is one dispersion per gene for all labels; on pbmc3k (300 genes) the held-out likelihood
was better so than with one dispersion per gene and label.

The package's default estimate of the correlations, the sample covariance, is refused when a label has fewer cells than
there are genes. A thousandth of the identity is mixed in, which makes it positive definite and is close to the original
R package: that one uses the sample correlation even if it is singular. The package also offers shrinkage by Ledoit and
Wolf. On pbmc3k (300 genes) it left nearly independent genes and library sizes that vary too little within a label.

The package has no time limit. When the time is up, the optimizer stops changing the weights, and early stopping ends
the training a few epochs later. Estimating the correlations afterwards is not limited.

The package orders the categories of a column by their frequency in the table it gets, so requested cells could be
matched with the parameters of another label. The labels are therefore passed as one indicator column per label.
"""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch

from bench.quality.peers.peer import Fitted, Peer, cells_of, joined
from wbdit.data.expression import to_dense

RIDGE = 1e-3


class ScDesigner(Peer):
    """Negative binomial marginals and a Gaussian copula, see the module's docstring."""

    name = "scdesigner"
    title = "scDesign3 (Python port)"
    requires = ("scdesigner", "scdesigner")

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "marginals": "negative binomial, mean by label",
            "copula": ["Gaussian, by label", RIDGE],
            "training": "as shipped",
            "scdesigner": version("scdesigner"),
        }

    def fit(self, train: ad.AnnData, labels: Sequence[str], minutes: float, seed: int) -> Fitted:
        wanted = joined(train.obs, labels)
        names = tuple(wanted.value_counts().index)
        obs = indicators(wanted, names)
        by_label = "~ " + " + ".join(obs.columns[1:]) if len(names) > 1 else "~ 1"
        groups = "~ " + " + ".join(obs.columns) if len(names) > 1 else "~ 1"
        cells = ad.AnnData(to_dense(train.X), obs=obs, var=pd.DataFrame(index=train.var_names))
        with _quiet(seed):
            from scdesigner.simulators import NegBinCopula

            model = NegBinCopula(by_label, copula_formula=groups, estimator=_ridged())
            optimizer = _until(time.monotonic() + 60 * minutes)
            model.fit(cells, validation_seed=seed, optimizer_class=optimizer, verbose=False)
        fitted = _Copula(model, tuple(labels), names)
        fitted.facts = {"epochs": len(model.marginal.fit_history), "best_epoch": model.marginal.best_epoch}
        return fitted


class _Copula(Fitted):
    def __init__(self, model: Any, labels: tuple[str, ...], names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.labels = labels
        self.names = names
        self.parameters = model.marginal.num_params() + model.copula.num_params()

    def generate(self, obs: pd.DataFrame, seed: int) -> ad.AnnData:
        wanted = indicators(joined(obs, self.labels), self.names)
        with _quiet(seed):
            # one batch, since each batch factorizes the correlation matrices anew
            cells = self.model.sample(wanted, batch_size=len(wanted))
        return cells_of(cells.X, obs, cells.var_names)


def indicators(labels: pd.Series, names: Sequence[str]) -> pd.DataFrame:
    """Return one column of zeros and ones per label in `names`."""
    values = labels.to_numpy()[:, None] == np.array(names, dtype=object)
    columns = [f"label{i}" for i in range(len(names))]
    return pd.DataFrame(values.astype(np.float64), index=labels.index, columns=columns)


def _until(deadline: float) -> type[torch.optim.Optimizer]:
    """Return AdamW that no longer changes the weights after `deadline`, in seconds of the monotonic clock."""

    class TimedAdamW(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure) if time.monotonic() < deadline else None

    return TimedAdamW


def _ridged() -> Any:
    """Return the package's sample covariance, mixed with a little of the identity."""
    from scdesigner.covariance.moments import SampleCovariance
    from scdesigner.covariance.shrinkage import shrink_covariance

    class RidgedCovariance(SampleCovariance):
        regularized = True

        def _finalize(self) -> np.ndarray:
            return shrink_covariance(super()._finalize(), RIDGE)

    return RidgedCovariance()


@contextmanager
def _quiet(seed: int) -> Iterator[None]:
    """Seed the global random numbers, which the package uses, and hide its progress bars and warnings."""
    state = np.random.get_state()  # noqa: NPY002
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002
