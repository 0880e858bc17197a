"""The user's choice of genes: names, or a column of ``var`` that marks them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from wbdit._io import check_regular
from wbdit.errors import InputError

LONGEST_LIST = 10**8  # bytes


def read_gene_list(path: str | Path) -> list[str]:
    r"""Read gene names from a text file, one per line; empty lines are skipped.

    Raises
    ------
    InputError
        If the file cannot be read or names no gene.

    Examples
    --------
    >>> from pathlib import Path
    >>> from wbdit.data.genes import read_gene_list
    >>> _ = Path("genes.txt").write_text("CD3D\nNKG7\n")
    >>> read_gene_list("genes.txt")
    ['CD3D', 'NKG7']
    """
    try:
        check_regular(path)
    except InputError as error:
        raise InputError(f"cannot read the gene list {path} ({error})") from error
    if Path(path).stat().st_size > LONGEST_LIST:
        raise InputError(f"the gene list {path} is longer than {LONGEST_LIST:,} bytes: write one gene name per line")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the gene list {path} ({getattr(error, 'strerror', None) or error})") from error
    if "\0" in text:
        raise InputError(f"the gene list {path} is no text: it holds null characters; save it as UTF-8")
    names = [name for line in text.splitlines() if (name := line.strip())]
    if not names:
        raise InputError(f"the gene list {path} is empty: write one gene name per line")
    return names


def gene_columns(genes: str | Sequence[str], var: pd.DataFrame, adata: ad.AnnData) -> np.ndarray:
    """Return the columns of the chosen genes, in the order of the matrix.

    Parameters
    ----------
    genes
        Names of genes, or the name of a boolean column of ``var``.
    var
        Annotation of the genes of the matrix.
    adata
        The cells. If the matrix is ``raw.X``, the column may also be in their ``var``.

    Raises
    ------
    InputError
        If a gene or the column is unknown, a gene is named twice, or no gene is chosen.

    Examples
    --------
    >>> from wbdit.data.genes import gene_columns
    >>> gene_columns([cells.var_names[3], cells.var_names[0]], cells.var, cells)
    array([0, 3])
    """
    names = pd.Index(_marked(genes, var, adata) if isinstance(genes, str) else [str(name) for name in genes])
    if not len(names):
        raise InputError("`genes` chooses no gene: name at least one")
    if names.has_duplicates:
        raise InputError(f"`genes` names {names[names.duplicated()][0]!r} twice: name it once")
    columns = var.index.get_indexer(names)
    if (columns < 0).any():
        absent = names[columns < 0]
        raise InputError(
            f"{len(absent)} of {len(names)} `genes` are not among the names of the genes, {absent[0]!r} first"
            f"{_other_names(absent, var)}"
        )
    return np.sort(columns)


def _marked(column: str, var: pd.DataFrame, adata: ad.AnnData) -> pd.Index:
    """Return the names of the genes that a boolean column marks."""
    for table in (var, adata.var):
        if column in table:
            marks = table[column]
            if not pd.api.types.is_bool_dtype(marks) or marks.isna().any():
                raise InputError(f"column {column!r} of var holds {marks.dtype} values: `genes` needs True or False")
            return table.index[marks.to_numpy(bool)].astype(str)
    known = [str(name) for name in adata.var if pd.api.types.is_bool_dtype(adata.var[name])]
    raise InputError(
        f"no column {column!r} in var; the columns of True and False are: {', '.join(known) or 'none'} "
        "(`genes` also takes a list of names)"
    )


def _other_names(names: pd.Index, var: pd.DataFrame) -> str:
    """Return a hint if a column of ``var`` holds the names."""
    for column in var:
        if var[column].astype(str).isin(names).any():
            return f"; they are in var[{column!r}], but genes are named by var_names such as {var.index[0]!r}"
    return f"; names are such as {var.index[0]!r}"
