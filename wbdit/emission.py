"""Counts of cells under effects that another model predicts: control cells and log fold changes in, cells out.

A count is taken as Poisson with a rate that is gamma distributed over the cells of a label: a negative binomial with
mean ``m = library x share`` and size ``r``. Given its count c, a cell's rate is gamma with shape ``r + c`` and mean
``(r + c) / (r / m + 1)``. A factor f on the rate then gives a new count without drawing the old one again:

- f < 1: each of the c molecules is kept with probability f, since a thinned Poisson count is Poisson.
- f > 1: a Poisson number with mean ``(f - 1) rate`` is added, with the rate drawn given c.

So mean counts change by f whatever the counts' distribution is, genes stay correlated, and a factor of 1 changes
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from wbdit._progress import Show, progress_bar
from wbdit._version import __version__
from wbdit.cell_blocks import BLOCK
from wbdit.counts.denoiser import CountDenoiser
from wbdit.data.cell_matrix import CellMatrix, chunks
from wbdit.data.cells import Cells
from wbdit.data.expression import check_labels, label_text
from wbdit.data.matrix import find_expression
from wbdit.data.statistics import add_by_group
from wbdit.errors import InputError
from wbdit.generator import CellGenerator
from wbdit.request_check import whole
from wbdit.streaming import chunk_cells, generate_file

#: Columns with log fold changes, and the factor that makes them natural logarithms.
LOG_COLUMNS = {
    "log_fold_change": 1.0,
    "log2_fold_change": np.log(2),
    "logfoldchanges": np.log(2),  # scanpy
    "log2FoldChange": np.log(2),  # DESeq2
}
GENE_COLUMNS = ("gene", "names", "gene_name")
LABEL_COLUMN = "label"
PER = 1e4  # counts, of the pseudo-count
SIZES = (0.05, 50.0)  # range of the negative binomials' sizes
MOST_LOG = 15.0  # natural log fold change: a factor of three million


@dataclass(frozen=True)
class Effects:
    """Natural log fold changes by gene; `by_label` has those of some labels, which replace the others."""

    of_gene: pd.Series
    by_label: dict[str, pd.Series] = field(default_factory=dict)

    @classmethod
    def of(cls, table: Effects | pd.DataFrame | pd.Series | str | Path) -> Effects:
        """Read a table of effects.

        Parameters
        ----------
        table
            A CSV file or a table with a column of genes ("gene" or, as scanpy has it, "names") and one of log fold
            changes: "log_fold_change" (natural), "log2_fold_change", scanpy's "logfoldchanges" or DESeq2's
            "log2FoldChange" (base 2). A column "label" gives effects by label. Or a series of natural log fold changes
            by gene, or effects that were read before.

        Raises
        ------
        InputError
            If the file cannot be read, a column is missing, or an effect is not a number, too large or there twice.

        Examples
        --------
        >>> from wbdit.emission import Effects
        >>> Effects.of(pd.DataFrame({"gene": ["LYZ"], "log2_fold_change": [1.0]})).of_gene.round(3).to_dict()
        {'LYZ': 0.693}
        """
        if isinstance(table, Effects):
            return table
        if isinstance(table, pd.Series):
            table = pd.DataFrame({"gene": table.index, "log_fold_change": table.to_numpy()})
        elif not isinstance(table, pd.DataFrame):
            table = _read_csv(Path(table))
        gene = next((name for name in GENE_COLUMNS if name in table), None)
        values = [name for name in LOG_COLUMNS if name in table]
        if gene is None or len(values) != 1:
            raise InputError(
                "the table of effects needs a column 'gene' and one of 'log_fold_change' (natural) and "
                f"'log2_fold_change'; its columns are: {', '.join(map(str, table.columns))}"
            )
        changes = pd.to_numeric(table[values[0]], errors="coerce") * LOG_COLUMNS[values[0]]
        genes = table[gene].astype(str)
        if not (changes.abs() <= MOST_LOG).all():
            wrong = genes[~(changes.abs() <= MOST_LOG)].iloc[0]
            raise InputError(f"the effect on {wrong!r} is no number between {-MOST_LOG:g} and {MOST_LOG:g}")
        effects = pd.Series(changes.to_numpy(float), index=genes.to_numpy())
        labels = table[LABEL_COLUMN].astype(str).to_numpy() if LABEL_COLUMN in table else np.full(len(table), "")
        parts = {str(name): effects[labels == name] for name in np.unique(labels)}
        for part in parts.values():
            if part.index.has_duplicates:
                raise InputError(f"the effect on {part.index[part.index.duplicated()][0]!r} is given twice")
        return cls(parts.pop("", pd.Series(dtype=float)), parts)

    def matrix(self, genes: pd.Index, labels: Sequence[str]) -> np.ndarray:
        """Return natural log fold changes ``(labels, genes)``; 0 for genes without an effect.

        Raises
        ------
        InputError
            If a gene or a label is unknown.
        """
        if unknown := sorted(set(self.by_label) - set(labels)):
            known = ", ".join(labels) or "none, give `label`"
            raise InputError(f"the effects name the label {unknown[0]!r}; the labels of the cells are: {known}")
        found = np.zeros((max(len(labels), 1), len(genes)))
        for row, name in enumerate(labels or [""]):
            for part in (self.of_gene, self.by_label.get(name, self.of_gene[:0])):
                places = genes.get_indexer(part.index)
                if (places < 0).any():
                    missing = part.index[places < 0]
                    raise InputError(f"the cells lack {len(missing)} genes of the effects, {missing[0]!r} first")
                found[row, places] = part.to_numpy()
        return found


@dataclass(frozen=True)
class Emission:
    """Control cells, their effects and the count likelihood.

    Attributes
    ----------
    counts
        Control cells.
    obs, var
        Their annotation.
    group
        Label of each cell, ``(n,)``.
    library
        Total counts of each cell, ``(n,)``.
    share, size
        Mean share of the counts and size of the negative binomial, ``(labels, G)``.
    effects
        Natural log fold changes ``(labels, G)``.
    pseudo_count
        As in :func:`emit`.
    seed
        Seed.
    """

    counts: CellMatrix
    obs: pd.DataFrame
    var: pd.DataFrame
    group: np.ndarray
    library: np.ndarray
    share: np.ndarray
    size: np.ndarray
    effects: np.ndarray
    pseudo_count: float
    seed: int

    @classmethod
    def of(
        cls,
        cells: ad.AnnData | Cells,
        effects: Any,
        label: str | None,
        generator: CellGenerator | None,
        pseudo_count: float,
        seed: int,
    ) -> Emission:
        """Learn the likelihood from the control cells in one pass; see :func:`emit`."""
        if not (np.isfinite(pseudo_count) and pseudo_count >= 0):
            raise InputError(f"`pseudo_count` must be 0 or more, not {pseudo_count}")
        cells = Cells.of(cells)
        expression = find_expression(cells)
        if expression.space != "counts":
            raise InputError(f"effects are emitted from raw counts, but {expression.found}")
        if label is None:
            names, group = [], np.zeros(cells.n_obs, np.int64)
        else:
            check_labels(cells, label)
            names_found, group = np.unique(label_text(cells.obs[label]).to_numpy(dtype=str), return_inverse=True)
            names = [str(name) for name in names_found]
        genes = expression.var.index
        wanted = Effects.of(effects).matrix(genes, names)
        library, share, size = _likelihood(expression.matrix, group, len(wanted))
        if generator is not None:
            size = _with_run(size, generator, genes, label, names)
        return cls(
            expression.matrix, cells.obs, expression.var, group, library, share, size, wanted, pseudo_count, seed
        )

    def rows(self, rows: range) -> ad.AnnData:
        """Return emitted cells; those beyond the number of control cells are control cells drawn again."""
        starts = range(rows.start - rows.start % BLOCK, rows.stop, BLOCK)
        blocks = [self._block(start // BLOCK)[max(rows.start - start, 0) : rows.stop - start] for start in starts]
        places = np.arange(rows.start, rows.stop)
        obs = self.obs.iloc[places % len(self.obs)]
        again = places // len(self.obs)
        names = [f"{name}-{k}" if k else str(name) for name, k in zip(obs.index, again, strict=True)]
        return ad.AnnData(sp.vstack(blocks, format="csr"), obs=obs.set_axis(names), var=self.var)

    def _block(self, block: int) -> sp.csr_matrix:
        """Return a block of 64 cells ``(64, G)``, which depends on its number and the seed alone."""
        rng = np.random.default_rng([self.seed, block])
        places = np.arange(block * BLOCK, (block + 1) * BLOCK)
        cells, again = places % len(self.obs), places >= len(self.obs)
        X = self.counts.rows(cells).astype(np.float64)
        group = self.group[cells]
        changed = np.flatnonzero(self.effects.any(axis=0)) if not again.any() else np.arange(X.shape[1])
        before = X[:, changed].toarray()
        after = self._changed(before, cells, group, changed, again, rng)
        different = sp.csr_matrix(after - before)
        placed = sp.csr_matrix((different.data, changed[different.indices], different.indptr), shape=X.shape)
        found = (X + placed).astype(np.float32)
        found.eliminate_zeros()
        found.sort_indices()
        return found

    def _changed(
        self,
        counts: np.ndarray,
        cells: np.ndarray,
        group: np.ndarray,
        genes: np.ndarray,
        again: np.ndarray,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Return new counts ``(64, genes)``, given the old ones."""
        mean = np.maximum(self.library[cells, None] * self.share[group][:, genes], 1e-12)  # 0 in an empty cell
        extra = self.library[cells, None] * (self.pseudo_count / PER)
        size, factor = self.size[group][:, genes], np.exp(self.effects[group][:, genes])
        rate = rng.gamma(size + counts) / (size / mean + 1)
        silent = rng.gamma(size) / size * extra  # the rate that the pseudo-count stands for
        more = rng.poisson(np.maximum(factor - 1, 0) * (rate + silent))
        kept = np.clip(((mean + extra) * factor - extra) / mean, 0, 1)
        counts = np.where(again[:, None], rng.poisson(rate), counts)
        return rng.binomial(counts.astype(np.int64), kept) + more


def emit(
    cells: ad.AnnData,
    effects: Effects | pd.DataFrame | pd.Series | str | Path,
    *,
    label: str | None = None,
    generator: CellGenerator | None = None,
    n: int | None = None,
    pseudo_count: float = 0.01,
    seed: int = 0,
) -> ad.AnnData:
    """Return control cells under effects that another model predicts, as raw counts.

    Parameters
    ----------
    cells
        Control cells with raw counts.
    effects
        Log fold changes by gene, and by label if wanted, see :meth:`Effects.of`. Genes that are not named keep their
        counts.
    label
        Column of ``obs`` with the labels, such as the cell type: counts are dispersed within labels.
    generator
        A run: the dispersions of its genes and labels are taken in place of those of the cells.
    n
        Number of cells. The default is one per control cell, in order. Beyond it, control cells are drawn again: a new
        count given each rate, so that no cell is there twice.
    pseudo_count
        Counts per 10,000 that the effects were computed with: ``log((m + p) / (m_control + p))``. It lets genes turn on
        that are silent in control cells.
    seed
        Random seed.

    Returns
    -------
    AnnData with counts in ``X`` (CSR fp32), ``obs`` of the control cells, and facts in ``uns["wbdit"]``.

    Raises
    ------
    InputError
        If the cells hold no counts, or the effects cannot be read or name genes or labels that the cells lack.

    Examples
    --------
    >>> effects = pd.DataFrame({"gene": ["LYZ", "CST3"], "log2_fold_change": [1.0, -1.0]})
    >>> made = wbdit.emit(cells, effects, label="bulk_labels")
    >>> before, after = (x[:, cells.var_names.get_indexer(["LYZ", "CST3"])].sum(0).A1 for x in (cells.X, made.X))
    >>> (after / before).round(1).tolist()
    [2.0, 0.5]
    """
    job = Emission.of(cells, effects, label, generator, pseudo_count, whole("seed", seed))
    made = job.rows(range(_number(n, job)))
    made.uns["wbdit"] = _facts(job)
    return made


def emit_to(
    path: str | Path,
    cells: Cells | ad.AnnData,
    effects: Effects | pd.DataFrame | pd.Series | str | Path,
    *,
    label: str | None = None,
    generator: CellGenerator | None = None,
    n: int | None = None,
    pseudo_count: float = 0.01,
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Write the cells of :func:`emit` to a file, with memory for one chunk of them.

    Parameters
    ----------
    path
        File to write, ``.h5ad`` or ``.zarr``.
    progress
        Show a progress bar on stderr.
    cells, effects, label, generator, n, pseudo_count, seed
        As in :func:`emit`; `cells` may lie in a file.

    Returns
    -------
    The path of the file.

    Raises
    ------
    InputError
        As :func:`emit`, or if the file cannot be written.

    Examples
    --------
    >>> import anndata as ad
    >>> path = wbdit.emit_to("perturbed.h5ad", cells, pd.Series({"LYZ": 1.0}))
    >>> ad.read_h5ad(path, backed="r").shape
    (700, 765)
    """
    job, path = Emission.of(cells, effects, label, generator, pseudo_count, whole("seed", seed)), Path(path)

    def make(some: range, show: Show) -> ad.AnnData:
        found = job.rows(some)
        found.uns["wbdit"] = _facts(job)
        return found

    with progress_bar("emitting", progress) as show:
        generate_file(
            path, range(_number(n, job)), _facts(job), make, show, chunk=chunk_cells(len(job.var)), resume=False
        )
    return path


def _number(n: int | None, job: Emission) -> int:
    n = len(job.obs) if n is None else whole("n", n)
    if n < 1:
        raise InputError(f"the number of cells `n` must be at least one, not {n}")
    return n


def _facts(job: Emission) -> dict[str, Any]:
    changed = int(job.effects.any(axis=0).sum())
    return {"wbdit": __version__, "emitted": True, "seed": job.seed, "pseudo_count": job.pseudo_count, "genes": changed}


def _likelihood(matrix: CellMatrix, group: np.ndarray, labels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return library sizes ``(n,)``, and shares and sizes ``(labels, G)``, by the method of moments.

    With ``m = library x share``, ``E (c - m)^2 = m + m^2 / size``. A label's share is shrunk to that of all cells by
    the counts of one average cell, its size by those of ten.
    """
    n, genes = matrix.shape
    library = np.zeros(n)
    sums, squares, products = (np.zeros((labels, genes)) for _ in range(3))
    for part, X in chunks(matrix):
        X = X.astype(np.float64)
        library[part] = totals = np.asarray(X.sum(axis=1)).ravel()
        add_by_group(sums, group[part], X)
        add_by_group(squares, group[part], X.power(2))
        add_by_group(products, group[part], sp.csr_matrix(X.multiply(totals[:, None])))
    if not library.any():
        raise InputError("the control cells hold no counts")
    of_label, of_squares = (np.bincount(group, weights, labels)[:, None] for weights in (library, library**2))
    overall = (sums.sum(axis=0) + 0.5) / (library.sum() + 0.5 * genes)
    share = (sums + library.mean() * overall) / (of_label + library.mean())
    spread = squares - 2 * share * products + share**2 * of_squares
    means, squared_means = share * of_label, share**2 * of_squares
    excess, against = spread - means, squared_means
    pooled = excess.sum(axis=0) / against.sum(axis=0)
    prior = 10 * against / np.maximum(np.bincount(group, minlength=labels)[:, None], 1)
    inverse = (excess + prior * pooled) / (against + prior)
    size = np.clip(1 / np.maximum(inverse, 1 / SIZES[1]), *SIZES)
    return library, share, size


@torch.no_grad()
def _with_run(
    size: np.ndarray, generator: CellGenerator, genes: pd.Index, label: str | None, names: Sequence[str]
) -> np.ndarray:
    """Return the sizes, with a run's in place of those of its genes and labels."""
    model, known = generator.model, generator.preprocessor
    if not isinstance(model, CountDenoiser):
        raise InputError("effects need a run that was trained on counts")
    places = genes.get_indexer(list(known.genes))
    offset = torch.zeros(len(size), len(places))
    if label in known.labels.columns:
        column = known.labels.position(label)
        first = sum(count + 1 for count in model.label_sizes[:column])
        codes = pd.Index(known.labels.categories[column]).get_indexer(pd.Index(names))
        rows = np.where(codes < 0, model.label_sizes[column], codes) + first
        offset = model.label_dispersion[torch.from_numpy(rows)].cpu()
        if model.combinations is not None:
            for k, code in enumerate(codes):
                inside = known.labels.combinations[:, column] == code
                if inside.any():
                    offset[k] = _pooled_dispersion(model, known.labels.combinations[inside], known.labels.sizes[inside])
    likelihood = model.likelihood
    t = torch.full((len(size),), generator.schedule.noise_steps - 1, dtype=torch.float32)
    mixture = (likelihood.dispersion_at(t.to(likelihood.log_mean.device)).cpu() + offset).sigmoid()
    log_size = torch.lerp(likelihood.log_size[0].cpu(), likelihood.log_size[1].cpu(), mixture)
    found = size.copy()
    found[:, places[places >= 0]] = log_size.exp().numpy()[:, places >= 0].clip(*SIZES)
    return found


def _pooled_dispersion(model: CountDenoiser, codes: np.ndarray, cells: np.ndarray) -> torch.Tensor:
    """Return the mean offset of the dispersion at pure noise ``(G,)`` over the cells of combinations ``(M, C)``."""
    assert model.combinations is not None
    given = model.combinations(torch.from_numpy(codes).to(model.combinations.row_of.device)).mixture_logits
    offsets = (given - model.likelihood.dispersion_knots[-1]).cpu()
    weights = torch.from_numpy(cells / cells.sum()).to(offsets)
    return weights @ offsets


def _read_csv(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        return pd.read_csv(path)
    except (ValueError, OSError, UnicodeError) as error:
        raise InputError(f"cannot read {path} as CSV ({error})") from error
