"""Conversion from AnnData to arrays and back: genes, labels, values, library sizes.

The model's input is ``(value - center) / scale``, per gene. The kind of values depends on the cells' expression space:

==========  ===========================================  =====================================================
space       values                                       decoding to cells
==========  ===========================================  =====================================================
counts      ``"log1p"``: ln(1 + count)                   drawn from a likelihood (:mod:`wbdit.counts.denoiser`)
counts      ``"lognorm"``: ln(1 + count per 10,000)      expression shares times the library size, rounded
            (as in the paper)
lognorm     ``"as is"``                                  values below half the gene's smallest become zero
scaled      ``"as is"``                                  unchanged
==========  ===========================================  =====================================================
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from wbdit.data.annotations import Annotations
from wbdit.data.cell_matrix import CellMatrix
from wbdit.data.cells import Cells
from wbdit.data.compact_matrix import CompactMatrix
from wbdit.data.covariates import Covariates
from wbdit.data.draws import Drawn, TrainingDraws
from wbdit.data.expression import check_cells, check_labels, label_text
from wbdit.data.genes import gene_columns
from wbdit.data.labels import Labels
from wbdit.data.matrix import Source, find_again, find_expression
from wbdit.data.normalize import TARGET_SUM, Values, transformed
from wbdit.data.space import LARGEST_LOG_VALUE, Space
from wbdit.data.statistics import Statistics, training_combinations, training_groups
from wbdit.data.variable_genes import variable_genes
from wbdit.errors import InputError

logger = logging.getLogger("wbdit")


@dataclass(frozen=True)
class Preprocessor:
    """Conversion of cells to the model's input, and of its output to cells.

    Attributes
    ----------
    space
        Expression space of the training cells.
    values
        Kind of values that the model is trained on; see the module's table.
    genes
        ``(G,)`` names, in the model's order.
    labels
        Label columns and their categories, in the model's order; no columns for a run without labels.
    center
        ``(G,)`` fp32, subtracted from the values.
    scale
        Divisor of the centered values.
    smallest
        ``(G,)`` fp32, each gene's smallest non-zero training value.
    library
        Library sizes of the training cells over `genes`, fp32. They are grouped by ``labels.combinations``, with
        ``labels.sizes`` cells per group, and sorted within each group; empty if the cells had no counts.
    covariates
        Continuous columns, and the training cells' values in the order of `library`; no columns for a run without.
    source
        The matrix that was used, and how it was read. Later cells are read in the same way.
    found
        A sentence that says which matrices were found and chosen.
    annotations
        Annotation of genes and labels for the synthetic cells.

    Examples
    --------
    >>> from wbdit.data.preprocessor import Preprocessor
    >>> preprocessor = Preprocessor.fit(cells, label="bulk_labels")
    >>> preprocessor.space, preprocessor.values
    ('counts', 'log1p')
    >>> preprocessor.encode(cells).shape
    (700, 765)
    """

    space: Space
    values: Values
    genes: tuple[str, ...]
    labels: Labels
    center: np.ndarray
    scale: float
    smallest: np.ndarray
    library: np.ndarray
    covariates: Covariates = field(default_factory=Covariates)
    source: Source = field(default_factory=Source)
    found: str = ""
    annotations: Annotations = field(default_factory=Annotations)

    @classmethod
    def fit(
        cls,
        adata: ad.AnnData | Cells,
        *,
        label: str | Sequence[str] | None = None,
        continuous: str | Sequence[str] | None = None,
        max_genes: int | None = 2000,
        lognorm: bool = False,
        centered: bool = True,
        source: Source | None = None,
        genes: str | Sequence[str] | None = None,
        batch_key: str | None = None,
    ) -> Preprocessor:
        """Learn genes, labels and values from training cells; arguments as in :meth:`fit_cells`."""
        return cls.fit_cells(
            adata,
            label=label,
            continuous=continuous,
            max_genes=max_genes,
            lognorm=lognorm,
            centered=centered,
            source=source,
            genes=genes,
            batch_key=batch_key,
        )[0]

    @classmethod
    def fit_cells(
        cls,
        adata: ad.AnnData | Cells,
        *,
        label: str | Sequence[str] | None = None,
        continuous: str | Sequence[str] | None = None,
        max_genes: int | None = 2000,
        lognorm: bool = False,
        centered: bool = True,
        source: Source | None = None,
        genes: str | Sequence[str] | None = None,
        batch_key: str | None = None,
    ) -> tuple[Preprocessor, CellMatrix, Statistics]:
        """Learn genes, labels and values from training cells.

        The logger "wbdit" reports the expression space and the selection of genes.

        Parameters
        ----------
        adata
            Cells by genes: counts in X, ``raw.X`` or a layer, or log-normalized or scaled values in X. See
            :func:`wbdit.data.matrix.find_expression`.
        label
            Column of ``obs`` to condition on, or several.
        continuous
            Numeric column of ``obs`` to condition on, or several.
        max_genes
            Maximum number of genes, None for all. If there are more, the most variable are kept.
        lognorm
            Normalize counts by library size before the logarithm.
        centered
            Center each gene and divide by one common scale; else the values are unchanged.
        source
            The matrix to use, if it is not to be found.
        genes
            Names of the genes to use, or the name of a boolean column of ``var``.
        batch_key
            Column of ``obs``: genes must be variable within its batches.

        Returns
        -------
        The preprocessor, the cells with its genes, see :meth:`cells`, and their statistics.

        Raises
        ------
        InputError
            If the cells cannot be used (:func:`wbdit.data.expression.check_cells`,
            :func:`wbdit.data.matrix.find_expression`, :meth:`wbdit.data.labels.Labels.fit`,
            :meth:`wbdit.data.covariates.Covariates.fit`).
        """
        adata = Cells.of(adata)
        check_cells(adata)
        labels = Labels.fit(adata, label)
        covariates = Covariates.fit(adata, continuous, labels.columns)
        batches = _batches(adata, batch_key)
        expression = find_expression(adata, source)
        said = [expression.found]  # once everything is checked: an error stands alone
        cells, space, var = expression.matrix, expression.space, expression.var
        if genes is not None:
            chosen = gene_columns(genes, var, adata)
            said.append(f"using the {len(chosen)} chosen of {len(var)} genes")
            cells, var = cells.select(genes=chosen), var.iloc[chosen]
        if max_genes is not None and len(var) > max_genes:
            keep = np.flatnonzero(variable_genes(cells, space, max_genes, batches))
            within = "" if batch_key is None else f", variable within {batch_key!r}"
            said.append(f"kept the {len(keep)} most variable of {len(var)} genes{within}")
            cells, var = cells.select(genes=keep), var.iloc[keep]
        elif batch_key is not None:
            said.append(f"all {len(var)} genes are kept, so `batch_key` has no effect")
        for line in said:
            logger.info(line)
        values: Values = ("lognorm" if lognorm else "log1p") if space == "counts" else "as is"
        cells = CompactMatrix.of(cells)
        codes = labels.codes(adata)
        scaled = covariates.encode(covariates.values) if covariates.columns else None
        groups = training_groups(codes, labels.label_sizes, scaled)
        combinations = training_combinations(codes, labels.label_sizes, len(var)) if values == "log1p" else None
        found = Statistics.of(cells, values, groups, combinations)
        scale = float(np.sqrt(found.variance.mean())) if centered else 1.0
        order = np.lexsort((found.totals, labels.combination_index(codes)))
        preprocessor = cls(
            space=space,
            values=values,
            genes=tuple(var.index),
            labels=labels,
            center=(found.mean if centered else np.zeros(len(var))).astype(np.float32),
            scale=scale if scale > 0 else 1.0,
            smallest=found.smallest,
            library=found.totals[order].astype(np.float32) if space == "counts" else np.zeros(0, np.float32),
            covariates=replace(covariates, values=covariates.values[order]),
            source=expression.source,
            found=expression.found,
            annotations=Annotations.of(var, adata, labels),
        )
        return preprocessor, cells, found

    def encode(self, adata: ad.AnnData | Cells) -> np.ndarray:
        """Return the model's input for cells, ``(cells, G)`` fp32.

        Raises
        ------
        InputError
            If genes are missing or the cells are in another space than the training cells.
        """
        return self.scaled(self.matrix(adata))

    def scaled(self, matrix: np.ndarray) -> np.ndarray:
        """Return the model's input for a :meth:`matrix` of expression, of the same shape."""
        return (transformed(matrix, self.values) - self.center) / np.float32(self.scale)

    def matrix(self, adata: ad.AnnData | Cells) -> np.ndarray:
        """Return the expression of the run's genes, ``(cells, G)`` fp32; raises the errors of :meth:`encode`."""
        cells = self.cells(adata)
        return cells.rows(np.arange(cells.shape[0])).toarray()

    def cells(self, adata: ad.AnnData | Cells) -> CellMatrix:
        """Return the cells with the run's genes, to be read by rows; raises the errors of :meth:`encode`."""
        adata = Cells.of(adata)
        check_cells(adata)
        expression = find_again(adata, self.source, self.space)
        if expression.name != (self.source.name or "X"):
            logger.info(expression.found)
        columns = expression.var.index.get_indexer(list(self.genes))
        if (columns < 0).any():
            missing = np.flatnonzero(columns < 0)
            raise InputError(
                f"{len(missing)} of the run's {len(self.genes)} genes are missing, {self.genes[missing[0]]!r} first"
            )
        return expression.matrix.select(genes=columns)

    def decode(self, x: np.ndarray, library: np.ndarray) -> ad.AnnData:
        """Convert a model's output to cells, without labels.

        Parameters
        ----------
        x
            ``(n, G)``: counts if :attr:`values` is "log1p", else the model's values.
        library
            Library sizes ``(n,)``; used only if :attr:`values` is "lognorm".

        Returns
        -------
        AnnData with counts in ``X`` (CSR fp32) and ``layers["lognorm"]`` if the training cells held counts. Otherwise
        ``X`` is in the training cells' space; log-normalized cells also have the layer.

        Raises
        ------
        InputError
            If a value is not finite or a count is negative.
        """
        _check_generated(x, self.values == "log1p")
        if self.values == "log1p":
            return self._as_counts(x)
        seen = x * np.float32(self.scale) + self.center
        _check_generated(seen)
        if self.space == "scaled":
            return self._cells(seen.astype(np.float32))
        seen = np.where(seen < self.smallest / 2, 0, seen)
        if self.space == "lognorm":
            X = sp.csr_matrix(seen.astype(np.float32))
            return self._cells(X, lognorm=X.copy())
        linear = np.expm1(np.minimum(seen.astype(np.float64), LARGEST_LOG_VALUE))
        linear *= (library / np.maximum(linear.sum(1), 1e-12))[:, None]
        return self._as_counts(np.rint(linear))

    def obs(
        self,
        codes: np.ndarray,
        toward: np.ndarray | None = None,
        mix: float = 0.0,
        covariates: np.ndarray | None = None,
    ) -> pd.DataFrame:
        """Return ``obs`` of cells with labels ``(n, C)`` and covariates ``(n, K)``.

        Each label column is categorical, each covariate fp64. With `toward`, ``obs`` also has ``f"{column}_toward"``
        and ``"mix"``.
        """
        obs = pd.DataFrame(index=[f"synthetic-{i}" for i in range(len(codes))]).assign(**self._label_columns(codes))
        if covariates is not None:
            obs = obs.assign(**dict(zip(self.covariates.columns, covariates.T, strict=True)))
        if toward is None:
            return obs
        return obs.assign(**{f"{name}_toward": labels for name, labels in self._label_columns(toward).items()}, mix=mix)

    def _label_columns(self, codes: np.ndarray) -> dict[str, pd.Categorical]:
        return self.annotations.shown(self.labels.obs(codes))

    def _as_counts(self, counts: np.ndarray) -> ad.AnnData:
        counts = counts.astype(np.float32)
        return self._cells(sp.csr_matrix(counts), lognorm=sp.csr_matrix(transformed(counts, "lognorm")))

    def _cells(self, X: Any, **layers: Any) -> ad.AnnData:
        obs = pd.DataFrame(index=[f"synthetic-{i}" for i in range(X.shape[0])])
        return ad.AnnData(X, obs=obs, var=self.annotations.table(self.genes), layers=layers)

    def facts(self) -> dict[str, Any]:
        """Return metadata for ``uns``: genes, labels, expression space and kind of values."""
        return {
            "trained_on": self.space,
            "source": self.source.name or "X",
            "found": self.found,
            "values": self.values,
            "target_sum": TARGET_SUM,
            "genes": np.array(self.genes, dtype=object),
            **self.labels.facts(),
            **({"continuous": np.array(self.covariates.columns, dtype=object)} if self.covariates.columns else {}),
        }

    def draw(self, codes: np.ndarray, at: np.ndarray, u: np.ndarray) -> Drawn:
        """Draw what a request leaves open from the training cells, see :meth:`wbdit.data.draws.TrainingDraws.draw`.

        Library sizes are ones if the training cells held no counts.

        Examples
        --------
        >>> from wbdit.data.preprocessor import Preprocessor
        >>> cells.obs["age"] = np.linspace(20, 60, 700)
        >>> preprocessor = Preprocessor.fit(cells, label="bulk_labels", continuous="age")
        >>> drawn = preprocessor.draw(np.array([[-1]]), np.array([[20.0]]), np.array([0.5]))
        >>> drawn.codes.shape, drawn.covariates.tolist(), drawn.library.shape
        ((1, 1), [[20.0]], (1,))
        """
        return TrainingDraws(self.labels, self.covariates, self.library).draw(codes, at, u)

    def beyond(self, at: np.ndarray, library: np.ndarray) -> list[str]:
        """Return one message per covariate, and one for library sizes, that exceed the range of the training cells."""
        found = self.covariates.beyond(at)
        if self.space == "counts":
            outside = int(((library < self.library.min()) | (library > self.library.max())).sum())
            if outside:
                span = f"{self.library.min():g} to {self.library.max():g}"
                found.append(f"the library sizes of {outside} of {len(library)} cells (training cells: {span})")
        return found


def _check_generated(values: np.ndarray, counts: bool = False) -> None:
    """Check what a model made: its weights may be numbers although their products are none."""
    if not np.isfinite(values).all() or (counts and values.size and values.min() < 0):
        raise InputError("the model generates values that are no expression: its weights are damaged, use another run")


def _batches(adata: ad.AnnData | Cells, batch_key: str | None) -> np.ndarray | None:
    """Return the batch of each cell, as text."""
    if batch_key is None:
        return None
    check_labels(adata, batch_key)
    return label_text(adata.obs[batch_key]).to_numpy()
