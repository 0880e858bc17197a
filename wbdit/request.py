"""Generation requests: cells per label, guidance weights, and interpolation toward other labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import torch

from wbdit import samplers
from wbdit.data.labels import Labels
from wbdit.errors import InputError

CellsPerLabel = Mapping[str | tuple[str, ...], int]


@dataclass(frozen=True)
class GenerationRequest:
    """The labels and guidance weights of the requested cells.

    Attributes
    ----------
    codes
        Labels ``(cells, C)`` int64, see :class:`wbdit.data.labels.Labels`.
    weights
        Guidance weight per label column, ``(C,)``.
    toward
        Second labels ``(cells, C)`` to interpolate the conditioning toward, or None.
    mix
        Interpolation weight of `toward`, 0 to 1.
    """

    codes: np.ndarray
    weights: Sequence[float]
    toward: np.ndarray | None = None
    mix: float = 0.0

    def model(self, denoiser: samplers.Model, rows: np.ndarray, device: torch.device) -> samplers.Model:
        """Return the denoiser conditioned on the labels of the cells with indices `rows`."""
        if not self.weights:
            return denoiser
        y = torch.from_numpy(self.codes[rows]).to(device)
        toward = None if self.toward is None else torch.from_numpy(self.toward[rows]).to(device)
        return samplers.GuidedModel(denoiser, y, self.weights, toward=toward, mix=self.mix)

    def unseen(self, labels: Labels) -> list[str]:
        """Return the names of the label combinations, of `codes` and `toward`, that no training cell has."""
        ends = [self.codes] if self.toward is None else [self.codes, self.toward]
        return labels.unseen(np.concatenate(ends))


def read_request(
    labels: Labels,
    n: int | None = None,
    like: ad.AnnData | None = None,
    n_per_label: CellsPerLabel | None = None,
    guidance: float | Mapping[str, float] = 1.0,
    toward: Mapping[str, str] | None = None,
    mix: float | None = None,
) -> GenerationRequest:
    """Check the arguments of a request and return it with labels as codes.

    Parameters
    ----------
    labels
        Label columns of the run.
    n, like, n_per_label, guidance, toward, mix
        As in :meth:`wbdit.CellGenerator.generate`.

    Raises
    ------
    InputError
        If an argument is invalid for this run.
    """
    codes = _codes(labels, n, like, n_per_label)
    weights = guidance_weights(labels, guidance)
    if (toward is None) != (mix is None):
        raise InputError("give `toward` and `mix` together: the labels to interpolate toward, and a weight from 0 to 1")
    if toward is None or mix is None:
        return GenerationRequest(codes, weights)
    if not 0 <= mix <= 1:
        raise InputError(f"`mix` must be between 0 and 1, not {mix:g}")
    taken = {"mix", *(f"{column}_toward" for column in labels.columns)}.intersection(labels.columns)
    if taken:
        raise InputError(
            f"a label column of this run is called {taken.pop()!r}, a name that `toward` needs in obs: train with the "
            "column renamed"
        )
    return GenerationRequest(codes, weights, labels.replace(codes, toward), mix)


def guidance_weights(labels: Labels, guidance: float | Mapping[str, float]) -> list[float]:
    """Return the guidance weight per label column: one number for all, or by name with a default of 1."""
    by_column = guidance if isinstance(guidance, Mapping) else dict.fromkeys(labels.columns, guidance)
    if not labels.columns and guidance != 1:
        raise InputError("`guidance` needs labels, but this run was trained without: leave it at 1")
    weights = [1.0] * len(labels.columns)
    for column, weight in by_column.items():
        if not math.isfinite(weight):
            raise InputError(f"a weight of `guidance` must be a finite number, not {weight}")
        weights[labels.position(column)] = float(weight)
    return weights


def guidance_fact(guidance: float | Mapping[str, float]) -> Any:
    """Return the guidance as stored in ``uns``: a number, or a dict of one number per column."""
    if isinstance(guidance, Mapping):
        return {column: float(weight) for column, weight in guidance.items()}
    return float(guidance)


def _codes(labels: Labels, n: int | None, like: ad.AnnData | None, n_per_label: CellsPerLabel | None) -> np.ndarray:
    """Return the labels of the requested cells, ``(cells, C)`` int64."""
    if n_per_label is not None:
        if n is not None or like is not None:
            raise InputError("give either `n_per_label`, or `n` and `like`, not both")
        if min(n_per_label.values(), default=0) < 0 or sum(n_per_label.values()) < 1:
            raise InputError("the numbers of `n_per_label` must be zero or more, with at least one cell in total")
        return labels.codes_from_counts(n_per_label)
    if like is not None and like.n_obs == 0:
        raise InputError("there are no cells to imitate: `like` must have at least one")
    if n is None:
        if like is None:
            raise InputError("how many cells? give `n`, `like` or `n_per_label`")
        n = like.n_obs
    elif n < 1:
        raise InputError(f"the number of cells `n` must be at least one, not {n}")
    if like is None:
        return labels.training_codes(n)
    codes = labels.codes(like)
    return codes if n == like.n_obs else labels.codes_like(codes, n)
