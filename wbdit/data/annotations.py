"""What travels from the training cells to the synthetic ones: gene annotation, order and colors of labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from wbdit.data.labels import Labels

STATISTICS = "highly_variable"  # columns of var that start with this are results, although they are not numbers


@dataclass(frozen=True)
class Annotations:
    """Annotation of genes and labels.

    Attributes
    ----------
    var
        Columns of ``var`` for the run's genes by name: text, categories, and True or False. Numbers are left out, as
        they are mostly statistics of the training cells, and so is ``highly_variable``.
    categories
        Labels of each label column in the order to show them: that of the categories, or numeric order.
    ordered
        Label columns whose categories are ordered.
    colors
        ``uns[f"{column}_colors"]`` of each label column that has them, in the order of `categories`.

    Examples
    --------
    >>> from wbdit.data.annotations import Annotations
    >>> from wbdit.data.labels import Labels
    >>> kept = Annotations.of(cells.var, cells, Labels.fit(cells, "bulk_labels"))
    >>> kept.categories["bulk_labels"][:3]
    ('CD4+/CD25 T Reg', 'CD4+/CD45RA+/CD25- Naive T', 'CD4+/CD45RO+ Memory')
    """

    var: dict[str, pd.Series] = field(default_factory=dict)
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ordered: tuple[str, ...] = ()
    colors: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, var: pd.DataFrame, adata: ad.AnnData, labels: Labels) -> Annotations:
        """Return the annotation of these genes, and of the label columns of training cells."""
        kept = {str(name): _kept(var[name]) for name in var if not str(name).startswith(STATISTICS)}
        colors = {name: _colors(adata, name) for name in labels.columns}
        return cls(
            var={name: column for name, column in kept.items() if column is not None},
            categories={name: _in_order(adata.obs[name]) for name in labels.columns},
            ordered=tuple(name for name in labels.columns if getattr(adata.obs[name].dtype, "ordered", False)),
            colors={name: found for name, found in colors.items() if found},
        )

    def table(self, genes: tuple[str, ...]) -> pd.DataFrame:
        """Return ``var`` of synthetic cells."""
        return pd.DataFrame({name: column.array for name, column in self.var.items()}, index=pd.Index(genes))

    def shown(self, labels: dict[str, pd.Categorical]) -> dict[str, pd.Categorical]:
        """Return label columns with their categories in the order to show them."""
        return {
            name: column.reorder_categories(list(self.categories[name]), ordered=name in self.ordered)
            if name in self.categories
            else column
            for name, column in labels.items()
        }

    def uns(self) -> dict[str, np.ndarray]:
        """Return the colors of the labels for ``uns``."""
        return {f"{name}_colors": np.array(colors, dtype=object) for name, colors in self.colors.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "var": {name: _plain(column) for name, column in self.var.items()},
            "categories": {name: list(labels) for name, labels in self.categories.items()},
            "ordered": list(self.ordered),
            "colors": {name: list(colors) for name, colors in self.colors.items()},
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Annotations:
        """Return the annotation from the dict of :meth:`to_dict`; empty for a run of an older wbdit."""
        return cls(
            var={name: _series(column) for name, column in content.get("var", {}).items()},
            categories={name: tuple(labels) for name, labels in content.get("categories", {}).items()},
            ordered=tuple(content.get("ordered", ())),
            colors={name: tuple(colors) for name, colors in content.get("colors", {}).items()},
        )


def _kept(column: pd.Series) -> pd.Series | None:
    """Return a column of text, categories of text, or True and False; None for others."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        text = all(isinstance(name, str) for name in column.cat.categories)
        return column.cat.remove_unused_categories() if text else None
    if pd.api.types.is_bool_dtype(column.dtype):
        return column.astype("boolean") if column.isna().any() else column.astype(bool)
    known = column.dropna()
    if len(known) and all(isinstance(value, str) for value in known):
        return column.astype(object).where(column.notna(), None)
    return None


def _in_order(column: pd.Series) -> tuple[str, ...]:
    """Return the labels of a column as text: by category, or sorted by value."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return tuple(map(str, column.cat.remove_unused_categories().cat.categories))
    values = pd.Index(column.unique())
    numeric = pd.api.types.is_numeric_dtype(column.dtype)
    return tuple(sorted(map(str, values)) if not numeric else map(str, sorted(values)))


def _colors(adata: ad.AnnData, name: str) -> tuple[str, ...]:
    """Return the colors of the labels that occur; none if they do not fit the categories."""
    column, colors = adata.obs[name], adata.uns.get(f"{name}_colors")
    if colors is None or not isinstance(column.dtype, pd.CategoricalDtype) or len(colors) != len(column.cat.categories):
        return ()
    used = set(column)
    return tuple(str(color) for label, color in zip(column.cat.categories, colors, strict=True) if label in used)


def _plain(column: pd.Series) -> dict[str, Any]:
    """Return a column as plain values."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return {
            "codes": column.cat.codes.tolist(),
            "categories": column.cat.categories.tolist(),
            "ordered": bool(column.cat.ordered),
        }
    return {"values": [None if pd.isna(value) else value for value in column.tolist()]}


def _series(content: dict[str, Any]) -> pd.Series:
    """Return the column from the dict of :func:`_plain`."""
    if "codes" in content:
        codes, categories, ordered = content["codes"], content["categories"], content["ordered"]
        return pd.Series(pd.Categorical.from_codes(codes, categories, ordered=ordered))
    values = content["values"]
    if all(isinstance(value, bool) for value in values):
        return pd.Series(values, dtype=bool)
    if all(value is None or isinstance(value, bool) for value in values):
        return pd.Series(values, dtype="boolean")
    return pd.Series(values, dtype=object)
