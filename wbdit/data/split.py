"""Splits of cells into a training and a held-out set: by cell, by donor, or by label combination."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import anndata as ad
import numpy as np

from wbdit.data.expression import check_labels, label_text
from wbdit.data.labels import Labels
from wbdit.data.structure import check_matrices
from wbdit.errors import InputError

SHARE = 0.8
MARK = "wbdit_split"  # entry of uns, by which a file is known as one that a split wrote

logger = logging.getLogger("wbdit")


def split(
    adata: ad.AnnData,
    *,
    share: float | None = None,
    label: str | Sequence[str] | None = None,
    donor: str | None = None,
    hold_out: str | Sequence[str | tuple[str, ...]] | None = None,
    seed: int = 0,
) -> tuple[ad.AnnData, ad.AnnData]:
    """Split cells into a training and a held-out set.

    By default, cells are drawn at random. With `donor`, whole donors are held out, which tests a generator on people it
    has not seen. With `hold_out`, all cells with the named labels are held out, which tests combinations of labels that
    it has not seen. The logger "wbdit" reports the held-out donors, and labels that one of the two sets lacks.

    Parameters
    ----------
    adata
        The cells.
    share
        Share of the cells to train on, 0.8 by default. With `label`, the share of each label combination, rounded up to
        whole cells. With `donor`, the share of the donors, rounded up, with at least one donor held out.
    label
        Column of ``obs`` with the labels, or several.
    donor
        Column of ``obs`` with the donors, or with other groups that must stay together, such as batches.
    hold_out
        Labels to hold out, ``"NK"``. With several label columns, combinations: ``"NK/stim"`` or ``("NK", "stim")``;
        ``"NK/*"`` stands for any label in the open column. Such a split has no `share`.
    seed
        Seed of the random draw.

    Returns
    -------
    Copies of the training and of the held-out cells, in their original order, with ``X``, ``raw``, ``layers``, ``obs``,
    ``obsm``, ``obsp`` and ``uns``. ``uns["wbdit_split"]`` names the part and the seed.

    Raises
    ------
    InputError
        If there are fewer than two cells, a column is unknown or incomplete, `share` is not between 0 and 1, there is
        only one donor, no cell has a label to hold out, or one of the sets would be empty.

    Examples
    --------
    >>> train, heldout = wbdit.split(cells, label="bulk_labels", seed=0)
    >>> train.n_obs, heldout.n_obs
    (565, 135)
    >>> cells.obs["donor"] = [f"P{i % 7}" for i in range(cells.n_obs)]
    >>> train, heldout = wbdit.split(cells, donor="donor")
    >>> heldout.obs["donor"].unique().tolist()
    ['P1']
    >>> train, heldout = wbdit.split(cells, label=["bulk_labels", "donor"], hold_out="Dendritic/P2")
    >>> heldout.n_obs
    32
    """
    columns = [label] if isinstance(label, str) else list(label or ())
    for column in [*columns, *([donor] if donor is not None else [])]:
        check_labels(adata, column)
    check_matrices(adata)
    if adata.n_obs < 2:
        raise InputError(f"a split needs at least two cells, not {adata.n_obs}")
    if hold_out is not None:
        if donor is not None or share is not None:
            raise InputError("`hold_out` names the cells to hold out: give it without `share` and `donor`")
        training = ~_named(adata, columns, [hold_out] if isinstance(hold_out, str) else list(hold_out))
    else:
        share = SHARE if share is None else share
        if not 0 < share < 1:
            raise InputError(f"`share` must be between 0 and 1, not {share:g}")
        rng = np.random.default_rng(seed)
        training = _of_donors(adata, donor, share, rng) if donor else _of_cells(adata, columns, share, rng)
    if training.all() or not training.any():
        which = "held-out" if training.all() else "training"
        raise InputError(f"the {which} set would be empty: choose another `share` or `hold_out`")
    parts = adata[training].copy(), adata[~training].copy()
    for part, name in zip(parts, ("train", "test"), strict=True):
        part.uns[MARK] = {"part": name, "seed": seed}
    _report_absent(*parts, columns)
    return parts


def _of_cells(adata: ad.AnnData, columns: list[str], share: float, rng: np.random.Generator) -> np.ndarray:
    """Return a mask of training cells: a share of the cells with each combination of labels."""
    groups = [np.arange(adata.n_obs)]
    if columns:
        groups = list(adata.obs.groupby(columns[0] if len(columns) == 1 else columns, observed=True).indices.values())
    training = np.zeros(adata.n_obs, bool)
    for rows in groups:
        training[rng.permutation(rows)[: _part(len(rows), share)]] = True
    return training


def _of_donors(adata: ad.AnnData, donor: str, share: float, rng: np.random.Generator) -> np.ndarray:
    """Return a mask of training cells: all cells of a share of the donors."""
    donors = label_text(adata.obs[donor])
    names = np.unique(donors.to_numpy())
    if len(names) < 2:
        raise InputError(f"all cells have one {donor!r}, {names[0]}: split them by cell, without `donor`")
    kept = min(_part(len(names), share), len(names) - 1)
    held_out = sorted(rng.permutation(names)[kept:])
    logger.info(f"held out {len(held_out)} of {len(names)} donors: {', '.join(held_out)}")
    return ~donors.isin(held_out).to_numpy()


def _named(adata: ad.AnnData, columns: list[str], names: list[str | tuple[str, ...]]) -> np.ndarray:
    """Return a mask of the cells with the named combinations of labels."""
    if not columns:
        raise InputError("`hold_out` needs a label column: give its name as `label`")
    labels = Labels.fit(adata, columns)
    codes, named = labels.codes(adata), np.zeros(adata.n_obs, bool)
    for name in names:
        matching = labels.matching(codes, name)
        if not matching.any():
            raise InputError(f"no cell to hold out has the labels {name!r} in {', '.join(columns)}")
        named |= matching
    return named


def _part(n: int, share: float) -> int:
    # rounded first: 100 * 0.55 is 55.00000000000001
    return math.ceil(round(n * share, 9))


def _report_absent(train: ad.AnnData, test: ad.AnnData, columns: list[str]) -> None:
    """Log the labels that only one of the two sets has."""
    for column in columns:
        seen, unseen = (set(label_text(part.obs[column])) for part in (train, test))
        if absent := sorted(seen - unseen):
            logger.info(f"no held-out cell has these labels of {column!r}: {', '.join(absent)}")
        if absent := sorted(unseen - seen):
            logger.warning(
                f"no training cell has these labels of {column!r}: {', '.join(absent)}; "
                "a generator cannot make cells with labels it has not seen"
            )
