"""A resumed run continues as it began: other cells, labels, presets and the like are refused by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wbdit.data.matrix import Source
from wbdit.errors import InputError
from wbdit.generator import CellGenerator
from wbdit.training.config import PRESETS, Preset, Training

OWN_OF_A_RUN = ("precision", "validation", "early_stopping")  # of the training settings: arguments of `fit` too


def preset_name(preset: str | Preset) -> str:
    """Return the name of a preset, "custom" for one that is not among the named ones."""
    if isinstance(preset, str):
        return preset
    return next((name for name, known in PRESETS.items() if known == preset), "custom")


def reading_facts(
    max_genes: int | None, source: Source, genes: str | Sequence[str] | None, batch_key: str | None
) -> dict[str, Any]:
    """Return how a run was asked to read its cells, as plain values for its training state."""
    if genes is not None and not isinstance(genes, str):
        names = hashlib.sha256("\n".join(sorted(map(str, genes))).encode()).hexdigest()[:12]
        genes = f"{len(genes)} names ({names})"
    return {"max_genes": max_genes, "genes": genes, "batch_key": batch_key, **asdict(source)}


def check_reading(folder: Path, asked: Mapping[str, Any], began: Mapping[str, Any] | None) -> None:
    """Check how a resumed run is asked to read its cells; both are from :func:`reading_facts`.

    Parameters
    ----------
    folder
        RUN folder, for messages.
    asked
        What is asked now. What is not asked stays as it was.
    began
        What the run began with; None if it did not keep that, as in older versions.

    Raises
    ------
    InputError
        If something else is asked than the run began with.

    Examples
    --------
    >>> from pathlib import Path
    >>> from wbdit.data.matrix import Source
    >>> from wbdit.training.resume import check_reading, reading_facts
    >>> began = reading_facts(500, Source(), None, None)
    >>> check_reading(Path("run"), reading_facts(600, Source(), None, None), began)
    Traceback (most recent call last):
        ...
    wbdit.errors.InputError: run was trained with max_genes 500: resume it without `max_genes=600`
    """
    given = {name: value for name, value in asked.items() if value not in (None, False)}
    if given and began is None:
        raise InputError(f"a resumed run reads its cells as before: leave out `{next(iter(given))}`")
    for name, value in given.items():
        _check(folder, name, value, (began or {}).get(name))


def check_choices(
    folder: Path,
    kept: CellGenerator,
    *,
    label: str | Sequence[str] | None,
    continuous: str | Sequence[str] | None,
    preset: str | Preset | None,
    seed: int | None,
    precision: str,
    settings: Mapping[str, Any],
) -> None:
    """Check that the arguments of :func:`wbdit.fit` for a resumed run are those of the run, as far as they are given.

    Raises
    ------
    InputError
        If one is not; the message names both.
    """
    config, preprocessor = kept.config, kept.preprocessor
    if label:  # the command line gives an empty tuple for none
        _check(folder, "label", _columns(label), _columns(preprocessor.labels.columns))
    if continuous:
        _check(folder, "continuous", _columns(continuous), _columns(preprocessor.covariates.columns))
    if preset is not None:
        _check(folder, "preset", preset_name(preset), config.preset)
        if isinstance(preset, Preset) and not _is_of(preset, kept):
            raise InputError(f"{folder} was trained with other settings than `preset`: resume it without")
    if seed is not None:
        _check(folder, "seed", seed, config.seed)
    own = config.training.get("precision", Training.precision)
    if precision not in ("auto", own):
        raise InputError(f"{folder} was trained in {own}: resume it without `precision={precision!r}`")
    for name, value in settings.items():
        _check(folder, name, value, config.training.get(name, getattr(Training, name)))


def check_cells(folder: Path, now: Mapping[str, str], began: Mapping[str, str] | None) -> None:
    """Check that a resumed run gets its own cells, by :class:`wbdit.data.fingerprint.Fingerprint`.

    Raises
    ------
    InputError
        If it gets others; the message names what differs. Runs of older versions kept no fingerprint.
    """
    other = [name for name, digest in now.items() if (began or now).get(name) != digest]
    if other:
        raise InputError(
            f"{folder} was trained on other cells (they differ in {' and '.join(other)}): give the same cells in the "
            "same order, or start a new run"
        )


def _check(folder: Path, name: str, value: Any, own: Any) -> None:
    if value != own:
        shown = "none" if own is None else own
        raise InputError(f"{folder} was trained with {name} {shown}: resume it without `{name}={value}`")


def _columns(names: str | Sequence[str]) -> str:
    return ", ".join([names] if isinstance(names, str) else names) or "none"


def _is_of(preset: Preset, kept: CellGenerator) -> bool:
    """Return whether a run has the settings of a preset."""
    config = kept.config
    training = {name: value for name, value in asdict(preset.training).items() if name not in OWN_OF_A_RUN}
    own = {**config.training, "betas": tuple(config.training["betas"])}
    return (
        preset.denoiser == config.denoiser
        and preset.schedule == config.schedule["kind"]
        and all(config.model.get(name) == value for name, value in preset.model.items())
        and all(own.get(name, getattr(Training, name)) == value for name, value in training.items())
    )
