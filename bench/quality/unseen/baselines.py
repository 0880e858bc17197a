"""The change of other labels, put into the counts of the left-out label's own cells."""

from __future__ import annotations

import anndata as ad
import numpy as np
import scipy.sparse as sp

from bench.quality.unseen.cells import Change, LeftOut
from bench.quality.unseen.judge import log_values

TEMPERATURE = 0.1  # of the correlations between labels
LEAST_CELLS = 20
ROUNDS, BISECTIONS = 4, 14


def shifted(left_out: LeftOut, change: Change, how: str, seed: int) -> ad.AnnData:
    """Return the label's own cells, with the change of mean log expression that others show.

    Parameters
    ----------
    left_out, change
        The cells and the change.
    how
        "nearest": that of the label whose cells before are most correlated; "kernel": of all labels, weighted by
        ``exp(correlation / 0.1)``; "mean": of all alike.
    seed
        Random seed.
    """
    obs = left_out.train.obs
    label, condition = obs[change.column].to_numpy(str), obs[change.condition].to_numpy(str)
    profiles, changes = [], []
    for name in np.unique(label):
        before, after = (
            left_out.train[(label == name) & (condition == which)] for which in (change.before, change.after)
        )
        if name == left_out.name or min(before.n_obs, after.n_obs) < LEAST_CELLS:
            continue
        profiles.append(log_values(before).mean(0))
        changes.append(log_values(after).mean(0) - profiles[-1])
    own = log_values(left_out.own).mean(0)
    alike = np.array([np.corrcoef(profile, own)[0, 1] for profile in profiles])
    weights = {
        "nearest": (alike == alike.max()).astype(float),
        "kernel": np.exp((alike - alike.max()) / TEMPERATURE),
        "mean": np.ones(len(alike)),
    }[how]
    return moved(left_out.own, weights / weights.sum() @ np.array(changes), seed)


def thinned(cells: ad.AnnData, like: ad.AnnData, seed: int) -> ad.AnnData:
    """Return cells with the library sizes of others at the most, quantile by quantile: each count is kept or not."""
    counts, rng = cells.X.toarray().astype(np.int64), np.random.default_rng(seed)
    library = counts.sum(1)
    rank = (np.argsort(np.argsort(library, kind="stable")) + 0.5) / len(library)
    wanted = np.quantile(np.asarray(like.X.sum(1)).ravel(), rank)
    kept = rng.binomial(counts, np.minimum(wanted / np.maximum(library, 1), 1)[:, None])
    return ad.AnnData(sp.csr_matrix(kept, dtype=np.float32), var=cells.var)


def moved(cells: ad.AnnData, shift: np.ndarray, seed: int) -> ad.AnnData:
    """Return cells whose mean ln(1 + count per 10,000) is changed by `shift`, or zero where it would be negative.

    Counts are thinned where it falls; where it rises, Poisson counts in proportion to the library size are added.
    """
    counts = cells.X.toarray().astype(np.int64)
    library = np.maximum(counts.sum(1, keepdims=True), 1)
    wanted, up = np.maximum(log_values(cells).mean(0) + shift, 0), shift > 0
    made = counts
    for _ in range(ROUNDS):  # the totals change with the counts
        totals = np.maximum(made.sum(1, keepdims=True), 1)
        low, high = np.where(up, np.log(1e-9), 0.0), np.ones(len(up))  # log rate to add, or share to keep
        for _ in range(BISECTIONS):
            middle, rng = (low + high) / 2, np.random.default_rng(seed)
            made = counts.copy()
            made[:, up] += rng.poisson(library * np.exp(middle[up]))
            made[:, ~up] = rng.binomial(counts[:, ~up], middle[~up])
            below = np.log1p(1e4 * made / totals).mean(0) < wanted
            low, high = np.where(below, middle, low), np.where(below, high, middle)
    order = np.random.default_rng(seed).permutation(len(made))
    return ad.AnnData(sp.csr_matrix(made[order], dtype=np.float32), var=cells.var)
