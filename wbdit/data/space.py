"""Recognition of expression values: raw counts, log-normalized or scaled values, or something that must be refused.

A normalized cell of counts keeps a structure that other values lack. Its linear values are whole multiples of one
unit, the value of a single count. So the values of a sample of cells are inverted by each candidate transform. The
first row that fits is the reading:

====================================================  ==============================================================
values                                                reading
====================================================  ==============================================================
integers, zero or more                                "counts", unless all are multiples of 5 or more
both signs, mostly nonzero                            "scaled"
expm1, 2^x - 1, 10^x - 1 or x^2 gives integers        refused: transformed counts without normalization
many of the values are integers                       refused as counts that are not integers; can be rounded
the values are multiples of one unit in each cell,    refused: normalized without a logarithm (also if there are
or have one total for all cells                       integers, but the unit is above one or the totals are equal)
expm1 of the values gives such values                 "lognorm"
2^x - 1 or 10^x - 1 gives such values                 refused: logarithm of another base
most values are near integers                         refused as counts that are not integers; can be rounded
anything else                                         refused as unclear; the user says what it is
====================================================  ==============================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from wbdit.data.cell_matrix import MemoryMatrix
from wbdit.data.contents import Contents
from wbdit.errors import InputError

Space = Literal["counts", "lognorm", "scaled"]
SPACES: tuple[Space, ...] = get_args(Space)

# ln(1 + x) of any sequenced cell is well below this; linear CPM or TPM is not
LARGEST_LOG_VALUE = 25.0
LARGEST_COUNT = 2**24  # fp32 holds every integer up to this

LARGEST_MULTIPLE = 12  # larger multiples say little: rounding errors grow with them
TOLERANCE = 0.05  # of a multiple, 1 in 10 of random values; values may have been rounded to three decimals
ENOUGH = 0.8  # share of values that must be multiples
FEWEST = 10  # values, for a share to mean something
EQUAL_TOTALS = 0.01  # relative deviation from the median; genes may have been filtered after normalization
INTEGERS = 0.1  # share of integers above which non-integer values are counts; log values have next to none
SUSPECT_UNIT = 5  # counts that are multiples of this: cells of one depth, normalized
NEAR_INTEGERS = 0.5  # the same for values close to integers


@dataclass(frozen=True)
class Reading:
    """What a matrix holds.

    Attributes
    ----------
    space
        Expression space, or None if the matrix must be refused.
    problem
        Why it is refused, as a predicate that says what to do; empty otherwise.
    may_be_counts
        Whether it can be rounded to counts if the user says so.
    may_be_log
        Whether it can be read as log values if the user says so.
    """

    space: Space | None
    problem: str = ""
    may_be_counts: bool = False
    may_be_log: bool = False


def describe(space: Space) -> str:
    """Return an expression space in words.

    Examples
    --------
    >>> from wbdit.data.space import describe
    >>> describe("lognorm")
    'log-normalized'
    """
    words = {"counts": "raw counts", "lognorm": "log-normalized", "scaled": "scaled (centered values of both signs)"}
    return words[space]


def detect_space(X: Any, name: str = "X") -> Space:
    """Detect from the values whether expression is raw counts, log-normalized or scaled.

    Parameters
    ----------
    X
        ``(cells, genes)`` dense or sparse.
    name
        Name of the matrix for the error.

    Returns
    -------
    The expression space, see the table of this module.

    Raises
    ------
    InputError
        For any other values.

    Examples
    --------
    >>> from wbdit.data.space import detect_space
    >>> counts = cells.X.toarray()
    >>> detect_space(counts), detect_space(np.log1p(1e4 * counts / counts.sum(1, keepdims=True)))
    ('counts', 'lognorm')
    """
    reading = read_values(Contents.of(MemoryMatrix(X)))
    if reading.space is None:
        raise InputError(f"{name} {reading.problem}")
    return reading.space


def read_values(contents: Contents) -> Reading:
    """Return what a matrix with these contents holds, without raising an error.

    Examples
    --------
    >>> from wbdit.data.cell_matrix import MemoryMatrix
    >>> from wbdit.data.contents import Contents
    >>> from wbdit.data.space import read_values
    >>> read_values(Contents.of(MemoryMatrix(cells.X))).space
    'counts'
    """
    if reading := _unusable(contents):
        return reading
    cells, lowest, highest = list(contents.cells), contents.lowest, contents.highest
    if not contents.fractional:
        return _integers(cells, lowest, highest)
    if lowest >= 0:
        return _positive(cells, highest)
    if contents.zeros > 0.5 * np.prod(contents.shape):
        return Reading(
            None,
            f"holds negative values (lowest {lowest:.4g}) although most entries are zero: neither counts, "
            'log-normalized nor scaled values; if they are scaled all the same, say `space="scaled"`',
        )
    return Reading("scaled")


def _unusable(contents: Contents) -> Reading | None:
    """Return the reading of values that are no numbers, not finite or all zero; None for others."""
    if contents.dtype == bool:
        return Reading(
            None, "holds True and False: give counts, or convert it to numbers (astype(float)) to use zeros and ones"
        )
    if not contents.holds_numbers:
        return Reading(None, f"holds {contents.dtype} values, not numbers")
    if contents.bad:
        return Reading(None, f"holds {contents.bad} NaN or infinite values: remove or replace them first")
    if not contents.nonzero:
        return Reading(None, "holds only zeros: give cells with nonzero expression")
    return None


def _integers(cells: list[np.ndarray], lowest: float, highest: float) -> Reading:
    if lowest < 0:
        return Reading(None, f"holds negative counts (lowest {lowest:g}): counts are zero or more")
    if highest > LARGEST_COUNT:
        return Reading(
            None,
            f"holds counts up to {highest:.4g}, and above {LARGEST_COUNT} fp32 cannot hold every integer: "
            "are these single cells?",
        )
    unit = int(np.gcd.reduce(np.unique(np.concatenate(cells)).astype(np.int64)))
    if unit >= SUSPECT_UNIT and len(cells) >= FEWEST:
        return Reading(
            None,
            f"holds multiples of {unit} only: are these normalized counts? give raw counts, or say `round_counts=True` "
            "if they are",
            may_be_counts=True,
        )
    return Reading("counts")


def _positive(cells: list[np.ndarray], highest: float) -> Reading:
    """Return the reading of values of one sign that are not all integers, from the nonzero values of sampled cells."""
    pooled = np.concatenate(cells)
    log = highest <= LARGEST_LOG_VALUE
    if name := _transformed_counts(pooled):
        return Reading(
            None,
            f"holds {name} of counts that are not normalized: give the raw counts (invert it and round)"
            + (', or say `space="lognorm"` to use the values as they are' if log else ""),
            may_be_log=log,
        )
    normalized = _is_normalized(cells)
    large_unit = np.median([cell.min() for cell in cells]) > 1.5  # a single count is worth more than one
    if np.mean(pooled == np.rint(pooled)) >= INTEGERS and not (normalized and (large_unit or _equal_totals(cells))):
        return _nearly_counts(log)
    if normalized:
        return Reading(
            None,
            f"holds values up to {highest:.4g} that are normalized but without a logarithm: give raw counts, or take "
            "the logarithm first (scanpy.pp.log1p)",
            may_be_log=log,
        )
    if log and _is_normalized([np.expm1(x) for x in cells], parts=3):
        return Reading("lognorm")
    near_integers = np.mean((np.abs(pooled - np.rint(pooled)) < TOLERANCE) & (pooled > 0.5)) >= NEAR_INTEGERS
    base = next((base for base in (2, 10) if log and _is_normalized([base**x - 1 for x in cells])), None)
    if base is not None and not near_integers:
        return Reading(
            None,
            f"holds logarithms of base {base}: give raw counts, or multiply it by np.log({base}) to make them natural",
            may_be_log=True,
        )
    if near_integers and base is None:
        return _nearly_counts(log)
    way = 'say `space="lognorm"` if they are log values, or ' if log else "take their logarithm (scanpy.pp.log1p), or "
    return Reading(
        None,
        f"holds non-integer values up to {highest:.4g} that are neither log-normalized counts nor nearly counts: give "
        f"raw counts, {way}`round_counts=True` if they are counts",
        may_be_counts=True,
        may_be_log=log,
    )


def _nearly_counts(log: bool) -> Reading:
    return Reading(
        None,
        "holds counts that are not integers (corrected for ambient RNA, or expected counts?): give raw counts, or "
        "round these with `round_counts=True`",
        may_be_counts=True,
        may_be_log=log,
    )


def _is_normalized(cells: list[np.ndarray], parts: int = 1) -> bool:
    """Return whether linear values are multiples of a unit in each cell, or add up to one total over the cells.

    Parameters
    ----------
    cells
        Nonzero values per cell.
    parts
        The unit is the smallest value of a cell, or a part of it, down to this fraction: deep cells lack single counts.
    """
    if _equal_totals(cells):
        return True
    found = [_multiples(cell, parts) for cell in cells]
    hits, tried = (sum(column) for column in zip(*found, strict=True))
    return tried >= FEWEST and hits >= ENOUGH * tried


def _equal_totals(cells: list[np.ndarray]) -> bool:
    """Return whether nearly all cells have one total."""
    totals = np.array([cell.sum() for cell in cells])
    equal = np.abs(totals / np.median(totals) - 1) < (EQUAL_TOTALS if len(cells) >= FEWEST else 1e-4)
    return len(cells) > 1 and bool(equal.mean() > 0.95)


def _multiples(cell: np.ndarray, parts: int) -> tuple[int, int]:
    """Return how many values are multiples of the unit, and how many could be: above one unit, and small enough."""
    ratios = cell / cell.min()
    ratios = ratios[ratios > 1 + TOLERANCE]  # values that equal the smallest say nothing about the transform
    best = (0, 0)
    for part in range(1, parts + 1):
        units = ratios[ratios * part < LARGEST_MULTIPLE + 0.5] * part
        hits = int((np.abs(units - np.rint(units)) < TOLERANCE).sum())
        if part == 1 or hits * best[1] > best[0] * units.size:
            best = (hits, units.size)
    return best


def _transformed_counts(values: np.ndarray) -> str:
    """Return the name of the transform whose inverse gives integers from one up, else an empty string."""
    values = values[np.abs(values - np.rint(values)) > 1e-3]  # integers stay integers under some of the inverses
    exponents = values[values <= LARGEST_LOG_VALUE]
    inverses = {
        "log1p": np.expm1(exponents),
        "log2(1 + x)": np.exp2(exponents) - 1,
        "log10(1 + x)": 10**exponents - 1,
        "the square root": values**2,
    }
    for name, linear in inverses.items():
        small = linear[linear < LARGEST_MULTIPLE + 0.5]
        if small.size < FEWEST or small.min() > 2.5:  # a unit larger than one: normalized
            continue
        if np.mean((np.abs(small - np.rint(small)) < 0.4 * TOLERANCE) & (small > 0.5)) > 0.95:
            return name
    return ""
