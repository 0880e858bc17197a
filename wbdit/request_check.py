"""Types of the arguments of a generation request, checked before they are used.

:mod:`wbdit.request` then checks their values against the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from wbdit.errors import InputError

MOST_CELLS = 10**9  # of one request


def check_types(
    n: Any, n_per_label: Any, guidance: Any, toward: Any, mix: Any, at: Any, library_size: Any, library_factor: Any
) -> None:
    """Check the types of the arguments of :func:`wbdit.request.read_request`, and the number of cells.

    Raises
    ------
    InputError
        If one has another type, or there are more than :data:`MOST_CELLS` cells.

    Examples
    --------
    >>> from wbdit.request_check import check_types
    >>> check_types(10, None, 1.0, None, None, {"age": [20, 30]}, None, None)
    >>> check_types("10", None, 1.0, None, None, None, None, None)
    Traceback (most recent call last):
    wbdit.errors.InputError: `n` must be a whole number, not '10'
    """
    asked = 0
    if n is not None:
        asked = whole("n", n)
    if n_per_label is not None:
        asked = sum(whole("n_per_label", number) for number in _by_label("n_per_label", n_per_label).values())
    if asked > MOST_CELLS:
        raise InputError(
            f"{asked:,} cells are more than {MOST_CELLS:,}: ask for fewer at once, with another `seed` each"
        )
    for name, value in (("guidance", guidance), ("library_size", library_size), ("library_factor", library_factor)):
        if isinstance(value, Mapping):
            numbers = list(_by_label(name, value).values())
        else:
            numbers = [] if value is None and name != "guidance" else [value]
        for number in numbers:
            _number(name, number, "a number, or numbers by name")
    if mix is not None:
        _number("mix", mix, "a number")
    if toward is not None:
        for column, label in _by_label("toward", toward).items():
            if not isinstance(column, str) or not isinstance(label, str):
                raise _must("toward", "a dict of one label per column", toward)
    if at is not None:
        for column, points in _by_label("at", at).items():
            if not isinstance(column, str) or not isinstance(points, (Real, Sequence, np.ndarray)):
                raise _must("at", "a dict of numbers by column", at)


def whole(name: str, value: Any) -> int:
    """Return a whole number; raise an InputError for anything else.

    Examples
    --------
    >>> from wbdit.request_check import whole
    >>> whole("seed", np.int64(3))
    3
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise _must(name, "a whole number", value)
    return int(value)


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise an InputError if a value is not among the choices.

    Examples
    --------
    >>> from wbdit.request_check import one_of
    >>> one_of("spacing", "even", ["uniform", "sqrt"])
    Traceback (most recent call last):
    wbdit.errors.InputError: unknown `spacing` 'even': choose one of uniform, sqrt
    """
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"unknown `{name}` {_short(value)}: choose one of {', '.join(choices)}")


def doses(steer: Any) -> dict[str, float]:
    """Return the numbers of `steer` by name; raise an InputError for anything else.

    Examples
    --------
    >>> from wbdit.request_check import doses
    >>> doses({"block-1-head-2": 2})
    {'block-1-head-2': 2.0}
    """
    wanted = "a dict of one finite number per head"
    if not isinstance(steer, Mapping) or not all(isinstance(head, str) for head in steer):
        raise _must("steer", wanted, steer)
    for dose in steer.values():
        _number("steer", dose, wanted)
        if not math.isfinite(dose):
            raise _must("steer", wanted, steer)
    return {head: float(dose) for head, dose in steer.items()}


def _by_label(name: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise _must(name, "a dict", value)
    for key in value:
        if not (isinstance(key, str) or (isinstance(key, tuple) and all(isinstance(part, str) for part in key))):
            raise _must(name, "a dict whose keys are text", value)
    return value


def _number(name: str, value: Any, what: str) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise _must(name, what, value)
    try:
        float(value)
    except OverflowError:
        raise _must(name, what, value) from None


def _must(name: str, what: str, value: Any) -> InputError:
    return InputError(f"`{name}` must be {what}, not {_short(value)}")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return type(value).__name__
    return text if len(text) <= 80 else f"{text[:80]}..."
