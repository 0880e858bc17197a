"""Checks of settings: their names, types and ranges. Each error is one line that names the setting."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from wbdit.errors import InputError
from wbdit.generator import DENOISERS

# arguments of a denoiser that follow from the cells and the likelihood
FOLLOWING = {"input_size", "in_channels", "num_classes", "learn_sigma", "label_sizes", "n_outputs", "n_covariates"}
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "none"}


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise an InputError if a value is not among the choices."""
    if value not in (names := list(choices)):
        raise InputError(f"unknown {name} {value!r}: choose one of {', '.join(names)}")


def check_range(
    name: str,
    value: float | None,
    lowest: float,
    highest: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> None:
    """Raise an InputError if a number is out of range; `above` and `below` exclude the ends, None is no number."""
    if value is None:
        return
    if value < lowest or value > highest or (above and value == lowest) or (below and value == highest):
        least = f"{'above' if above else 'at least'} {lowest:g}"
        most = "" if highest == math.inf else f" and {'below' if below else 'at most'} {highest:g}"
        raise InputError(f"{name} must be {least}{most}, not {value:g}")


def check_types(prefix: str, values: Mapping[str, Any], kinds: type | Mapping[str, Any]) -> None:
    """Raise an InputError if a value does not have the type of its annotation.

    Parameters
    ----------
    prefix
        Text before the names in messages.
    values
        Settings by name.
    kinds
        Types by name, or a dataclass.
    """
    known = kinds if isinstance(kinds, Mapping) else get_type_hints(kinds)
    for name, value in values.items():
        if not fits(value, known[name]):
            raise InputError(f"{prefix}{name} must be {describe(known[name])}, not {value!r}")


def check_model(denoiser: str, model: Mapping[str, Any]) -> None:
    """Raise an InputError if a denoiser does not take the settings, or if its sizes do not fit each other."""
    kinds = model_settings(denoiser)
    for name in model:
        check_choice("setting of the model", name, kinds)
    check_types("model.", model, kinds)
    defaults = {name: p.default for name, p in inspect.signature(DENOISERS[denoiser]).parameters.items()}
    sizes = defaults | dict(model)
    for name in ("patch_size", "hidden_size", "depth", "num_heads"):
        check_range(f"model.{name}", sizes[name], 1)
    check_range("model.mlp_ratio", sizes["mlp_ratio"], 0, above=True)
    check_range("model.class_dropout_prob", sizes["class_dropout_prob"], 0, 1, below=True)
    width, heads = sizes["hidden_size"], sizes["num_heads"]
    if width % 4 or width % heads:
        raise InputError(f"model.hidden_size must be a multiple of 4 and of model.num_heads ({heads}), not {width}")


def model_settings(denoiser: str) -> dict[str, Any]:
    """Return the settings of a denoiser by name, with their types."""
    cls = DENOISERS[denoiser]
    hints = get_type_hints(cls.__init__)
    named = [name for name, p in inspect.signature(cls).parameters.items() if p.kind is not p.VAR_KEYWORD]
    return {name: hints[name] for name in named if name not in FOLLOWING}


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value has a type, given as in an annotation; whole numbers are numbers, and truths are not."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in parts
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(fits, value, parts))
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return isinstance(value, origin or kind)


def describe(kind: Any) -> str:
    """Return a type in words, such as "a number or none"."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    if origin in (Union, UnionType):
        return " or ".join(map(describe, parts))
    if origin is tuple:
        return f"{len(parts)} numbers with commas"
    return WORDS.get(kind, f"a {getattr(origin or kind, '__name__', kind)}")
