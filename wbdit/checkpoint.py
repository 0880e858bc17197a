"""Reading and writing the files of a RUN folder: JSON and safetensors, never pickles."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wbdit import run_check
from wbdit.data.annotations import Annotations
from wbdit.data.covariates import Covariates
from wbdit.data.labels import Labels
from wbdit.data.matrix import Source
from wbdit.data.preprocessor import Preprocessor
from wbdit.errors import InputError
from wbdit.run_config import RunConfig

CONFIG, MODEL, METRICS, RESUME = "config.json", "model.safetensors", "metrics.jsonl", "resume/state.safetensors"
PREPROCESSOR = ("preprocessor.json", "preprocessor.safetensors")
PREPROCESSOR_FACTS = ("space", "values", "genes", "scale")
PREPROCESSOR_ARRAYS = ("center", "smallest", "library")
LABEL_FACTS = ("columns", "categories")
LABEL_ARRAYS = ("combinations", "sizes")
COVARIATE_ARRAYS = ("center", "scale", "values")

logger = logging.getLogger("wbdit")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run; content other than an object gives an empty dict.

    Raises
    ------
    InputError
        If the file is missing or damaged.
    """
    _must_exist(path)
    if path.stat().st_size > run_check.LONGEST_JSON:
        raise InputError(f"{path} is longer than {run_check.LONGEST_JSON:,} bytes: is it of a wbdit run?")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if "\\ud" in text.lower():  # an escaped half of a character: no file could be written with it
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: is the run complete?") from error
    return content if isinstance(content, dict) else {}


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any] | None = None) -> None:
    """Write a safetensors file, with `facts` as JSON in its header. Its folder is created if necessary."""
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(content, path, {"facts": json.dumps(facts or {})})
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        raise OSError(int(found[1]) if found else None, str(error)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; raises the errors of :func:`read_tensors_and_facts`."""
    return read_tensors_and_facts(path)[0]


def read_tensors_and_facts(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file and the facts in its header.

    Raises
    ------
    InputError
        If the file is missing, damaged, or a pickle (which is never opened).
    """
    run_check.check_tensor_file(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise InputError(f"{path} is not a valid safetensors file: is the run complete?") from error
    return tensors, facts if isinstance(facts, dict) else {}


def write_preprocessor(run: Path, preprocessor: Preprocessor) -> None:
    """Write ``preprocessor.json`` and ``preprocessor.safetensors``."""
    facts = _take(preprocessor, PREPROCESSOR_FACTS) | {"labels": _take(preprocessor.labels, LABEL_FACTS)}
    facts |= {"source": asdict(preprocessor.source), "found": preprocessor.found}
    facts |= {"annotations": preprocessor.annotations.to_dict()}
    arrays = _take(preprocessor, PREPROCESSOR_ARRAYS) | _take(preprocessor.labels, LABEL_ARRAYS)
    covariates = preprocessor.covariates
    if covariates.columns:
        facts["continuous"] = covariates.columns
        arrays |= {f"continuous.{name}": array for name, array in _take(covariates, COVARIATE_ARRAYS).items()}
    write_json(run / PREPROCESSOR[0], facts)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    write_tensors(run / PREPROCESSOR[1], tensors)


def read_preprocessor(run: Path) -> Preprocessor:
    """Read a run's preprocessor.

    Raises
    ------
    InputError
        If a file is missing or damaged, or its parts do not fit each other.
    """
    facts, tensors = read_json(run / PREPROCESSOR[0]), read_tensors(run / PREPROCESSOR[1])
    of_labels: dict[str, Any] = facts["labels"] if isinstance(facts.get("labels"), dict) else {}
    columns = facts.get("continuous", ())  # runs of earlier versions have none
    of_covariates = [f"continuous.{name}" for name in COVARIATE_ARRAYS] if columns else []
    needed: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        (PREPROCESSOR_FACTS, facts),
        (LABEL_FACTS, of_labels),
        ((*PREPROCESSOR_ARRAYS, *LABEL_ARRAYS, *of_covariates), dict(tensors)),
    ]
    for names, there in needed:
        lacking = [name for name in names if name not in there]
        if lacking:
            raise InputError(f"the preprocessor in {run} lacks {lacking[0]!r}: is the run complete?")
    try:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        run_check.check_preprocessor(facts, arrays)
    except (InputError, TypeError) as error:
        raise InputError(f"cannot use the preprocessor in {run}: {error}") from error
    kept = {**facts, **of_labels, **arrays}
    labels = Labels(
        tuple(kept["columns"]), tuple(map(tuple, kept["categories"])), **{name: kept[name] for name in LABEL_ARRAYS}
    )
    own = {name: kept[name] for name in (*PREPROCESSOR_FACTS, *PREPROCESSOR_ARRAYS)}
    covariates = Covariates(tuple(columns), *(kept[name] for name in of_covariates))
    return Preprocessor(
        **{**own, "genes": tuple(own["genes"])},
        labels=labels,
        covariates=covariates,
        source=Source(**kept.get("source", {})),  # runs of older versions lack these
        found=kept.get("found", ""),
        annotations=Annotations.from_dict(kept.get("annotations", {})),
    )


def read_config(run: Path) -> RunConfig:
    """Read a run's ``config.json``.

    Raises
    ------
    InputError
        If the folder or the file is missing or damaged, or was written by a newer wbdit.
    """
    if not run.is_dir():
        raise InputError(f"no such run: {run} is not a folder")
    content = read_json(run / CONFIG)
    try:
        config = RunConfig.from_dict(content)
        run_check.check_config(config)
        return config
    except InputError as error:
        raise InputError(f"cannot use {run / CONFIG}: {error}") from error


def write_history(run: Path, history: Sequence[dict[str, Any]]) -> None:
    """Write the training log, ``metrics.jsonl``."""
    (run / METRICS).write_text("".join(json.dumps(record) + "\n" for record in history), encoding="utf-8")


def read_history(run: Path) -> list[dict[str, Any]]:
    """Read the training log, ``metrics.jsonl``. It is not needed: broken lines are left out, with one warning."""
    if not (run / METRICS).is_file():  # reading a pipe could take for ever
        return []
    lines = (run / METRICS).read_bytes().splitlines()
    records, broken = [], 0
    for line in filter(None, map(bytes.strip, lines)):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError(line)
            records.append(record)
        except (ValueError, RecursionError):
            broken += 1
    if broken:
        logger.warning(f"{run / METRICS}: left out {broken} broken line{'s' if broken > 1 else ''} of the training log")
    return records


def _take(source: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


def state_hash(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 of a state dict's names, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name}{tuple(state[name].shape)}".encode())
        digest.update(state[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}: is the run complete?")
