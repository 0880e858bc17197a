"""Settings of a preset by dotted names, such as ``training.learning_rate=3e-4``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, get_type_hints

from wbdit.errors import InputError
from wbdit.training.checks import describe, fits, model_settings
from wbdit.training.config import Likelihood, Preset, Training

SECTIONS = {"training": Training, "likelihood": Likelihood}
WHOLE = ("schedule", "lognorm", "centered", "max_genes", "most_patches")  # settings of the preset itself


def with_settings(preset: Preset, assignments: Iterable[str]) -> Preset:
    """Return a preset with some settings changed.

    Parameters
    ----------
    preset
        The preset to change.
    assignments
        Texts of the form ``NAME=VALUE``. :func:`setting_types` has the names.

    Raises
    ------
    InputError
        If a name is unknown, or a value has the wrong type or is out of range.

    Examples
    --------
    >>> from wbdit.training.settings import with_settings
    >>> small = wbdit.Preset.from_name("small")
    >>> preset = with_settings(small, ["training.learning_rate=3e-4", "model.hidden_size=128"])
    >>> preset.training.learning_rate, preset.model["hidden_size"]
    (0.0003, 128)
    """
    kinds = setting_types(preset)
    changes: dict[str, dict[str, Any]] = {"training": {}, "likelihood": {}, "model": {}, "": {}}
    for assignment in assignments:
        name, _, text = (part.strip() for part in assignment.partition("="))
        if not text:
            raise InputError(f"cannot read the setting {assignment!r}: write it as training.learning_rate=3e-4")
        if name not in kinds:
            raise InputError(f"unknown setting {name!r}: choose one of {', '.join(kinds)}")
        section, _, field = name.rpartition(".")
        changes[section][field] = _read(name, text, kinds[name])
    return replace(
        preset,
        training=replace(preset.training, **changes["training"]),
        likelihood=replace(preset.likelihood, **changes["likelihood"]),
        model={**preset.model, **changes["model"]},
        **changes[""],
    )


def setting_types(preset: Preset) -> dict[str, Any]:
    """Return the types of a preset's settings by dotted name."""
    kinds: dict[str, Any] = {}
    for section, cls in SECTIONS.items():
        kinds |= {f"{section}.{name}": kind for name, kind in get_type_hints(cls).items()}
    kinds |= {f"model.{name}": kind for name, kind in model_settings(preset.denoiser).items()}
    own = get_type_hints(Preset)
    return kinds | {name: own[name] for name in WHOLE}


def _read(name: str, text: str, kind: Any) -> Any:
    for value in _readings(text):
        if fits(value, kind):
            return value
    raise InputError(f"{name} must be {describe(kind)}, not {text!r}")


def _readings(text: str) -> Iterator[Any]:
    """Yield what a text may mean: a named constant, a whole number, a number, numbers with commas, or the text."""
    yield {"true": True, "false": False, "none": None}.get(text.lower(), text)
    for kind in (int, float):
        with suppress(ValueError):
            yield kind(text)
    with suppress(ValueError):
        yield tuple(map(float, text.split(",")))
    yield text
