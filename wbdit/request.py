"""Generation requests: cells per label, covariates, guidance, library sizes, and interpolation toward other labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anndata as ad
import numpy as np
import torch

from wbdit import samplers
from wbdit.data.covariates import Covariates
from wbdit.data.labels import SEPARATOR, Labels, apportion
from wbdit.data.preprocessor import Preprocessor
from wbdit.errors import InputError
from wbdit.request_check import check_types

CellsPerLabel = Mapping[str | tuple[str, ...], int]
Points = Mapping[str, float | Sequence[float]]
PerLabel = float | Mapping[str | tuple[str, ...], float]
MOST_GUIDANCE = 1000  # far above any use, and products of all columns' weights stay finite in fp32
LARGEST_LIBRARY = 1e9  # counts per cell, and factor: far above any cell, and fp32 still holds the counts


@dataclass(frozen=True)
class GenerationRequest:
    """The labels, covariates, library sizes and guidance weights of the requested cells.

    Attributes
    ----------
    codes
        Labels ``(cells, C)`` int64, see :class:`wbdit.data.labels.Labels`; -1 for labels to draw.
    weights
        Guidance weight per label column, then per covariate, ``(C + K,)``.
    at
        Covariates ``(cells, K)`` fp64; NaN for values to draw.
    toward
        Second labels ``(cells, C)`` to interpolate the conditioning toward, or None.
    mix
        Interpolation weight of `toward`, 0 to 1.
    library_size, library_factor
        Library sizes in place of the drawn ones, and factors of the sizes: a number, or numbers by label.
    """

    codes: np.ndarray
    weights: Sequence[float]
    at: np.ndarray
    toward: np.ndarray | None = None
    mix: float = 0.0
    library_size: PerLabel = field(default_factory=dict)
    library_factor: PerLabel = 1.0

    def complete(self, preprocessor: Preprocessor, u: np.ndarray) -> tuple[GenerationRequest, np.ndarray]:
        """Draw the open labels and covariates, and the library sizes, from the training cells.

        Parameters
        ----------
        preprocessor
            Preprocessor of the run, which keeps labels, covariates and library sizes of the training cells.
        u
            Uniform numbers ``(cells,)`` in (0, 1).

        Returns
        -------
        The request without open labels and covariates, and library sizes ``(cells,)``.
        """
        drawn = preprocessor.draw(self.codes, self.at, u)
        library, toward = drawn.library, self.toward
        if toward is not None:
            toward = np.where(toward < 0, drawn.codes, toward)
            library = (1 - self.mix) * library + self.mix * preprocessor.draw(toward, self.at, u).library
        labels = preprocessor.labels
        library = _per_label(labels, drawn.codes, self.library_size, library)
        library = library * _per_label(labels, drawn.codes, self.library_factor, np.ones(len(library)))
        return replace(self, codes=drawn.codes, at=drawn.covariates, toward=toward), library

    def model(
        self, denoiser: samplers.Model, rows: np.ndarray, device: torch.device, covariates: Covariates
    ) -> samplers.Model:
        """Return the denoiser conditioned on the labels and covariates of the cells with indices `rows`."""
        if not self.weights:
            return denoiser
        y = torch.from_numpy(self.codes[rows]).to(device)
        toward = None if self.toward is None else torch.from_numpy(self.toward[rows]).to(device)
        at = torch.from_numpy(covariates.encode(self.at[rows])).to(device) if covariates.columns else None
        return samplers.GuidedModel(denoiser, y, self.weights, toward=toward, mix=self.mix, covariates=at)

    def training_cells(self, labels: Labels) -> dict[str, int]:
        """Return the number of training cells of each label combination in `codes` and `toward`, by its name."""
        ends = [self.codes] if self.toward is None else [self.codes, self.toward]
        return labels.training_cells(np.concatenate(ends))


def read_request(
    preprocessor: Preprocessor,
    n: int | None = None,
    like: ad.AnnData | None = None,
    n_per_label: CellsPerLabel | None = None,
    guidance: float | Mapping[str, float] = 1.0,
    toward: Mapping[str, str] | None = None,
    mix: float | None = None,
    at: Points | None = None,
    library_size: PerLabel | None = None,
    library_factor: PerLabel | None = None,
) -> GenerationRequest:
    """Check the arguments of a request and return it with labels as codes.

    Parameters
    ----------
    preprocessor
        Preprocessor of the run.
    n, like, n_per_label, guidance, toward, mix, at, library_size, library_factor
        As in :meth:`wbdit.CellGenerator.generate`.

    Raises
    ------
    InputError
        If an argument is invalid for this run.
    """
    check_types(n, n_per_label, guidance, toward, mix, at, library_size, library_factor)
    labels, covariates = preprocessor.labels, preprocessor.covariates
    points = _points(covariates, at or {})
    codes, rows, blocks = _codes(labels, n, like, n_per_label, keep_open=len(points) > 0)
    values = np.full((len(codes), len(covariates.columns)), np.nan)
    if like is not None and covariates.columns:
        values = covariates.read(like, but=tuple(at or ()))[rows]
    if len(points):
        placed = _place(points, blocks, like)
        values = np.where(np.isnan(placed), values, placed)
    sizes = _library_request(preprocessor, library_size, library_factor)
    weights = guidance_weights(labels, covariates, guidance)
    if (toward is None) != (mix is None):
        raise InputError("give `toward` and `mix` together: the labels to interpolate toward, and a weight from 0 to 1")
    if toward is None or mix is None:
        return GenerationRequest(codes, weights, values, **sizes)
    if not 0 <= mix <= 1:
        raise InputError(f"`mix` must be between 0 and 1, not {mix:g}")
    needed = {"mix", *(f"{column}_toward" for column in labels.columns)}
    for column in needed.intersection(labels.columns + covariates.columns):
        raise InputError(
            f"a column of this run is called {column!r}, a name that `toward` needs in obs: train with the "
            "column renamed"
        )
    return GenerationRequest(codes, weights, values, labels.replace(codes, toward), mix, **sizes)


def guidance_weights(labels: Labels, covariates: Covariates, guidance: float | Mapping[str, float]) -> list[float]:
    """Return the guidance weight per label column and covariate: one number for all, or by name with a default of 1."""
    columns = labels.columns + covariates.columns
    by_column = guidance if isinstance(guidance, Mapping) else dict.fromkeys(columns, guidance)
    if not columns and guidance != 1:
        raise InputError("`guidance` needs labels or covariates, but this run was trained without: leave it at 1")
    weights = [1.0] * len(columns)
    for column, weight in by_column.items():
        if not abs(weight) <= MOST_GUIDANCE:
            limits = f"between -{MOST_GUIDANCE} and {MOST_GUIDANCE}"
            raise InputError(f"a weight of `guidance` must lie {limits}, not {weight}")
        if covariates.columns and column not in columns:
            known = ", ".join(columns)
            raise InputError(f"{column!r} is no label or continuous column of this run, which has: {known}")
        position = columns.index(column) if column in covariates.columns else labels.position(column)
        weights[position] = float(weight)
    return weights


def guidance_fact(guidance: float | Mapping[str, float]) -> Any:
    """Return the guidance as stored in ``uns``: a number, or a dict of one number per column."""
    if isinstance(guidance, Mapping):
        return {column: float(weight) for column, weight in guidance.items()}
    return float(guidance)


def request_facts(at: Points | None, library_size: PerLabel | None, library_factor: PerLabel | None) -> dict[str, Any]:
    """Return the requested covariates and library sizes as stored in ``uns``; empty if none were requested.

    Numbers by label become two arrays, because a label may contain "/", which cannot be part of a key in a file.
    """
    facts: dict[str, Any] = {}
    if at:
        values = {name: np.asarray(asked, np.float64) for name, asked in at.items()}
        facts["at"] = {name: float(x) if x.ndim == 0 else x for name, x in values.items()}
    for name, asked in (("library_size", library_size), ("library_factor", library_factor)):
        if isinstance(asked, Mapping):
            names = [key if isinstance(key, str) else SEPARATOR.join(key) for key in asked]
            numbers = np.array(list(asked.values()), np.float64)
            facts[name] = {"labels": np.array(names, dtype=object), "values": numbers}
        elif asked is not None:
            facts[name] = float(asked)
    return facts


def _codes(
    labels: Labels, n: int | None, like: ad.AnnData | None, n_per_label: CellsPerLabel | None, keep_open: bool
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return the labels of the requested cells, the rows of `like`, and the sizes of the blocks of cells.

    Parameters
    ----------
    keep_open
        Return -1 for labels that the request leaves open, in place of the training proportions.

    Returns
    -------
    Labels ``(cells, C)`` int64, rows ``(cells,)`` or ``(0,)`` without `like`, and sizes that sum to the cells.
    """
    no_rows = np.zeros(0, np.int64)
    if n_per_label is not None:
        if n is not None or like is not None:
            raise InputError("give either `n_per_label`, or `n` and `like`, not both")
        if min(n_per_label.values(), default=0) < 0 or sum(n_per_label.values()) < 1:
            raise InputError("the numbers of `n_per_label` must be zero or more, with at least one cell in total")
        return labels.codes_from_counts(n_per_label, keep_open=keep_open), no_rows, list(n_per_label.values())
    if like is not None and like.n_obs == 0:
        raise InputError("there are no cells to imitate: `like` must have at least one")
    if n is None:
        if like is None:
            raise InputError("how many cells? give `n`, `like` or `n_per_label`")
        n = like.n_obs
    elif n < 1:
        raise InputError(f"the number of cells `n` must be at least one, not {n}")
    if like is None:
        codes = np.full((n, len(labels.columns)), -1) if keep_open else labels.training_codes(n)
        return codes, no_rows, [n]
    codes = labels.codes(like)
    rows = np.arange(n) if n == like.n_obs else labels.rows_like(codes, n)
    return codes[rows], rows, [n]


def _points(covariates: Covariates, at: Points) -> np.ndarray:
    """Return the requested points ``(P, K)`` fp64, NaN in columns that are not named; ``(0, K)`` without a request."""
    columns = {}
    for name, asked in at.items():
        covariates.position(name)
        try:
            values = np.asarray(asked, np.float64)
        except (TypeError, ValueError):
            values = np.array([np.nan])
        if values.ndim > 1 or values.size == 0 or not np.isfinite(values).all():
            raise InputError(f"`at` must give {name!r} a finite number, or a sequence of them, not {asked!r}")
        columns[name] = values
    lengths = {name: len(values) for name, values in columns.items() if values.ndim == 1}
    if len(set(lengths.values())) > 1:
        words = ", ".join(f"{n} of {name}" for name, n in lengths.items())
        raise InputError(f"`at` must give its columns equally many points, not {words}")
    points = np.full((max(lengths.values(), default=1) if at else 0, len(covariates.columns)), np.nan)
    for name, values in columns.items():
        points[:, covariates.position(name)] = values
    return points


def _place(points: np.ndarray, blocks: list[int], like: ad.AnnData | None) -> np.ndarray:
    """Return each cell's point ``(cells, K)``: within each block of cells, evenly and in order."""
    for n in blocks:
        if 0 < n < len(points):
            raise InputError(f"`at` names {len(points)} points for {n} cells: give each point at least one cell")
    if like is not None and len(points) not in (1, blocks[0]):
        raise InputError(f"with `like`, `at` must name one point, or one per cell ({blocks[0]}), not {len(points)}")
    return np.concatenate([points[apportion(np.ones(len(points)), n)] for n in blocks])


def _library_request(preprocessor: Preprocessor, size: PerLabel | None, factor: PerLabel | None) -> dict[str, Any]:
    """Check library sizes and factors; return them as arguments of :class:`GenerationRequest`."""
    asked = {name: value for name, value in (("library_size", size), ("library_factor", factor)) if value is not None}
    if asked and preprocessor.space != "counts":
        raise InputError(f"`{next(iter(asked))}` needs counts, but this run was trained on {preprocessor.space} values")
    for name, value in asked.items():
        numbers = list(value.values()) if isinstance(value, Mapping) else [value]
        wrong = [x for x in numbers if not (math.isfinite(x) and x > 0)]
        if wrong:
            raise InputError(f"`{name}` must be a positive number, not {wrong[0]:g}")
        if max(numbers, default=0) > LARGEST_LIBRARY:
            raise InputError(f"`{name}` must be at most {LARGEST_LIBRARY:g}, not {max(numbers):g}")
        if isinstance(value, Mapping):
            if not preprocessor.labels.columns:
                raise InputError(f"this run was trained without labels: give `{name}` one number")
            for key in value:
                preprocessor.labels.matching(np.zeros((0, len(preprocessor.labels.columns)), np.int64), key)
    return asked


def _per_label(labels: Labels, codes: np.ndarray, asked: PerLabel, default: np.ndarray) -> np.ndarray:
    """Return one number per cell, ``(cells,)``: as requested for all or by label, else the default."""
    if not isinstance(asked, Mapping):
        return np.full(len(codes), float(asked))
    numbers = default.copy()
    for name, number in asked.items():
        numbers[labels.matching(codes, name)] = number
    return numbers
