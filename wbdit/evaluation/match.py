"""Genes of several sets by one kind of name: symbols, or Ensembl ids."""

from __future__ import annotations

import re

import pandas as pd

ENOUGH = 0.5  # share of the smaller set's genes; with fewer in common, other columns are tried
VERSION = re.compile(r"^(ENS[A-Z]*\d{11})\.\d+$")  # "ENSG00000141510.18"
INDEX = "var_names"


def gene_names(tables: dict[str, pd.DataFrame], notes: list[str]) -> dict[str, pd.Index]:
    """Return names of the genes of each set, by which the sets share most genes.

    These are ``var_names`` if each set shares half of its genes or more with the real cells, or the smaller set does.
    Otherwise each column of text in ``var`` is tried, such as ``gene_ids`` or ``feature_name``. Versions of Ensembl ids
    are dropped in this case. What was done is noted.

    Parameters
    ----------
    tables
        ``var`` of each set; ``"real"`` comes first.
    notes
        Gets a sentence if a column is used.

    Returns
    -------
    One name per gene, without repetition: a name that a column repeats belongs to its first gene.

    Examples
    --------
    >>> symbols = pd.DataFrame({"gene_ids": ["ENSG01", "ENSG02"]}, index=["CD3D", "NKG7"])
    >>> ids, notes = pd.DataFrame(index=["ENSG02", "ENSG01"]), []
    >>> gene_names({"real": symbols, "synthetic": ids}, notes)["real"].tolist(), notes
    (['ENSG01', 'ENSG02'], ['genes are matched by var["gene_ids"] of the real cells'])
    """
    names = {name: table.index for name, table in tables.items()}
    if all(_share(names["real"], other) >= ENOUGH for other in names.values()):
        return names
    choices = {name: _columns(table) for name, table in tables.items()}
    best, most = names, min(_share(names["real"], other) for other in names.values())
    taken = dict.fromkeys(tables, INDEX)
    for column, real in choices["real"].items():
        found = {"real": (column, real)}
        for name in list(tables)[1:]:
            found[name] = max(choices[name].items(), key=lambda choice: _share(real, choice[1]))
        least = min(_share(real, other) for _, other in found.values())
        if least > most:
            most, best = least, {name: other for name, (_, other) in found.items()}
            taken = {name: own for name, (own, _) in found.items()}
    used = [f'var["{column}"] of the {name} cells' for name, column in taken.items() if column != INDEX]
    if used:
        notes.append(f"genes are matched by {' and '.join(used)}")
    elif best is not names:
        notes.append("genes are matched by their Ensembl ids, without versions")
    return best


def _columns(table: pd.DataFrame) -> dict[str, pd.Index]:
    """Return the columns that may name genes, ``var_names`` first: text, nearly all different."""
    columns = {INDEX: table.index.to_series(), **{str(name): table[name] for name in table.columns}}
    found = {}
    for name, column in columns.items():
        if not isinstance(column, pd.Series) or column.nunique() < 0.9 * len(column):
            continue
        text = column.astype(str) if column.dtype.kind in "OTU" or column.dtype.name in ("category", "string") else None
        if text is not None:
            found[name] = _unique([VERSION.sub(r"\1", value) for value in text])
    return found


def _unique(names: list[str]) -> pd.Index:
    index = pd.Index(names, dtype=object)
    repeated = index.duplicated()
    return pd.Index(
        [f"{name} (again, {i})" if again else name for i, (name, again) in enumerate(zip(names, repeated, strict=True))]
    )


def _share(a: pd.Index, b: pd.Index) -> float:
    """Return the number of common names over that of the smaller set."""
    return len(a.intersection(b)) / min(len(a), len(b))
