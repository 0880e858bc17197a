"""scVI (Lopez et al. 2018) from scvi-tools: a variational autoencoder with a count likelihood.

There are two ways to generate cells, each with the training that suits it best:

- *posterior predictive*: scVI as it is usually used, without labels. A training cell of the requested label is encoded,
  and its counts are redrawn at its own library size. Each cell is a redrawn training cell.
- *prior*: a conditional scVI with the label as a categorical covariate of encoder and decoder. It takes z ~ N(0, I),
  the requested label, and the library size of a random training cell of that label. Each cell is new, as with a
  diffusion model.

Both use the library's default sizes (128 hidden, 10 latent, one layer) and a negative binomial likelihood, which did
better than the zero-inflated default. Training stops early if its time runs out.

The posterior predictive uses the library's default training: 400 epochs, fewer for more than 20,000 cells, while the
weight of the KL divergence rises. At its end the model fits its training cells closely, which helps to redraw them. If
training stops where the evidence lower bound (ELBO) of held-out cells is best, the cells are easier to tell from real
ones.

For the prior, a tenth of the cells is held out. Training ends when their ELBO has not risen for 45 epochs (the
library's default patience), and the weights of the best epoch are kept. The weight of the KL divergence reaches 1
within 20 epochs instead of 400. Otherwise the best epoch would come before the prior has its full weight.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import torch

from bench.quality.peers.peer import LABEL, Fitted, Peer, cells_of, joined, rows_by_label, with_joined

HELD_OUT = "elbo_validation"
MODEL = {"gene_likelihood": "nb"}
KL_EPOCHS = 20
TITLES = {
    "posterior": "scVI, posterior predictive (sees the cells it redraws)",
    "prior": "scVI, prior (draws cells without seeing any)",
}
BATCH = 512  # cells generated at a time


class Scvi(Peer):
    """scVI, sampled from its posterior predictive or from its prior.

    Parameters
    ----------
    drawn_from
        "posterior" or "prior", see the module's docstring.
    """

    requires = ("scvi", "scvi-tools")

    def __init__(self, drawn_from: Literal["posterior", "prior"]) -> None:
        self.name = f"scvi-{drawn_from}"
        self.title = TITLES[drawn_from]
        self.conditional = drawn_from == "prior"

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "model": self._model,
            "training": {"kl_epochs": KL_EPOCHS} if self.conditional else "as shipped",
            "conditional": self.conditional,
            "scvi-tools": version("scvi-tools"),
        }

    @property
    def _model(self) -> dict[str, Any]:
        return MODEL | ({"encode_covariates": True} if self.conditional else {})

    def fit(self, train: ad.AnnData, labels: Sequence[str], minutes: float, seed: int) -> Fitted:
        cells = with_joined(train, labels)
        with _quiet() as scvi, tempfile.TemporaryDirectory() as scratch:
            scvi.settings.seed = seed
            scvi.model.SCVI.setup_anndata(cells, categorical_covariate_keys=[LABEL] if self.conditional else None)
            model = scvi.model.SCVI(cells, **self._model)
            common = {"max_time": timedelta(minutes=minutes), "enable_progress_bar": False, "default_root_dir": scratch}
            facts = _train_for_prior(model, **common) if self.conditional else _train_as_shipped(model, **common)
        model.module.eval()
        kind = _Prior if self.conditional else _Posterior
        fitted = kind(model, cells, tuple(labels))
        fitted.facts = facts
        return fitted


def _train_as_shipped(model: Any, **common: Any) -> dict[str, Any]:
    """Train with the library's default settings."""
    model.train(**common)
    return {"epochs": len(model.history["elbo_train"])}


def _train_for_prior(model: Any, **common: Any) -> dict[str, Any]:
    """Train until the ELBO of held-out cells stops rising, and keep the best epoch's weights."""
    best = _best_epoch()
    model.train(
        max_epochs=1_000_000,
        early_stopping=True,
        early_stopping_monitor=HELD_OUT,
        plan_kwargs={"n_epochs_kl_warmup": KL_EPOCHS},
        callbacks=[best],
        **common,
    )
    if best.state is not None:
        model.module.load_state_dict(best.state)
    return {"epochs": len(model.history.get(HELD_OUT, ())), "best_epoch": best.epoch, HELD_OUT: best.value}


class _Vae(Fitted):
    def __init__(self, model: Any, train: ad.AnnData, labels: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.train = train
        self.labels = labels
        self.rows = rows_by_label(train.obs[LABEL])
        self.parameters = sum(p.numel() for p in model.module.parameters() if p.requires_grad)

    def donors(self, wanted: pd.Series, seed: int) -> np.ndarray:
        """Return a random training cell per requested label; none repeats before all of its label are used."""
        rng = np.random.default_rng(seed)
        chosen = np.empty(len(wanted), int)
        for label, places in rows_by_label(wanted).items():
            rounds = -(-len(places) // len(self.rows[label]))
            chosen[places] = np.concatenate([rng.permutation(self.rows[label]) for _ in range(rounds)])[: len(places)]
        return chosen

    def generate(self, obs: pd.DataFrame, seed: int) -> ad.AnnData:
        donors = self.donors(joined(obs, self.labels), seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return cells_of(self.counts(donors), obs, self.train.var_names)

    def counts(self, donors: np.ndarray) -> Any:
        """Return counts ``(n, G)`` of new cells, one per training cell (row number) in `donors` ``(n,)``."""
        raise NotImplementedError


class _Posterior(_Vae):
    def counts(self, donors: np.ndarray) -> Any:
        return self.model.posterior_predictive_sample(indices=donors, batch_size=BATCH).to_scipy_sparse()


class _Prior(_Vae):
    @torch.inference_mode()
    def counts(self, donors: np.ndarray) -> Any:
        """Return counts of new cells; only the donors' labels and library sizes are used."""
        module = self.model.module
        registered = self.model.adata_manager.get_from_registry("extra_categorical_covs").to_numpy(np.int64)
        label = torch.as_tensor(registered[donors], device=module.device)
        library = np.log(np.asarray(self.train.X.sum(1)))[donors]
        parts = []
        for rows in np.array_split(np.arange(len(donors)), -(-len(donors) // BATCH)):
            drawn = module.generative(
                z=torch.randn(len(rows), module.n_latent, device=module.device),
                library=torch.as_tensor(library[rows], dtype=torch.float32, device=module.device),
                batch_index=torch.zeros(len(rows), 1, dtype=torch.long, device=module.device),
                cat_covs=label[rows],
            )
            parts.append(drawn["px"].sample().cpu().numpy())
        return np.concatenate(parts)


def _best_epoch() -> Any:
    """Return a callback that keeps the weights with the best ELBO on the held-out cells."""
    from lightning.pytorch.callbacks import Callback

    class BestEpoch(Callback):
        def __init__(self) -> None:
            self.value, self.epoch, self.state = None, None, None  # before the first epoch ends

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            value = float(trainer.callback_metrics[HELD_OUT])  # negative ELBO, in nats per cell
            if self.value is None or value < self.value:
                self.value, self.epoch = value, trainer.current_epoch
                self.state = copy.deepcopy(pl_module.module.state_dict())

    return BestEpoch()


@contextmanager
def _quiet() -> Iterator[Any]:
    """Yield the scvi module, with its warnings and log messages off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import scvi

        for name in ("lightning.pytorch", "lightning.fabric"):  # after the import, which sets the levels too
            logging.getLogger(name).setLevel(logging.ERROR)
        yield scvi
