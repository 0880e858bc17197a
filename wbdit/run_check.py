"""Check of a RUN folder from anywhere: every file against itself and the others, before anything large is built.

The numbers of a run decide how much memory a model takes and where a kernel reads. So types and ranges are checked
first, then the sizes that the files share, then the shapes in the header of the weights' file, and at last the values.
No path in a file is followed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wbdit.data.expression import is_text
from wbdit.data.normalize import Values
from wbdit.data.preprocessor import Preprocessor
from wbdit.data.space import SPACES
from wbdit.data.statistics import MOST_COMBINATIONS
from wbdit.errors import InputError
from wbdit.run_config import ForetoldFacts, LikelihoodConfig, RunConfig, Trained

LONGEST_JSON = 5 * 10**7  # bytes; 60,000 genes with their annotation take 13 MB
LARGEST = 2**53  # of whole numbers
SEEDS = (-(2**63), 2**64 - 1)  # that PyTorch takes
MOST_TIMESTEPS = 100_000
MOST_BINS = 64  # of counts, the limit of the kernels
MOST_CELLS = 5 * 10**7  # training cells of a run that keeps nothing of each
LARGEST_VALUE = 1e30  # of a weight or table; squares of larger ones overflow in fp32
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8"}
# largest absolute values of a count model's tables: logarithms of counts, rates and sizes, directions and factors
LOGARITHMS = {
    "likelihood.log_mean": 100.0,
    "likelihood.log_size": 100.0,
    "label_rates": 100.0,
    "log_library_scale": 100.0,
    "noise_axes": 1.1,
    "noise_factors": 1000.0,
}
# the same of the tables of label combinations
TABLES = {"rates": 100.0, "rate_offset": 100.0, "mixture_logits": 100.0, "profiles": 1e6, "foretold_log_means": 100.0}
# the same of the Gaussians that sampling starts from
GAUSSIANS = {"axes": 1.1, "roots": 1e6, "variances": 1e6, "places.coordinates": 1e6, "places.log_library": 100.0}
MOST_PLACES = 2**20
LARGEST_OUTPUT = 100.0  # the same of the denoiser's output at pure noise: a log rate
RESERVED = ("_index",)  # a column that .h5ad keeps for itself
PREDICTIONS = ("epsilon", "v", "x0")
ONE = (1, 1)  # the only size

MODEL_SIZES = {
    "input_size": (1, LARGEST),
    "patch_size": (1, LARGEST),
    "hidden_size": (4, LARGEST),
    "depth": (1, LARGEST),
    "num_heads": (1, LARGEST),
    "num_classes": (0, LARGEST),
    "n_covariates": (0, LARGEST),
    "in_channels": ONE,
}
MODEL_TRUTHS = ("shared_patches", "cell_token", "tie_out")


def check_config(config: RunConfig) -> None:
    """Check the types and ranges of a run's configuration.

    Raises
    ------
    InputError
        If a value has another type or is out of range.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from wbdit.run_check import check_config
    >>> check_config(generator.config)
    >>> check_config(replace(generator.config, seed="0"))
    Traceback (most recent call last):
    wbdit.errors.InputError: seed must be a whole number from -9223372036854775808 to 18446744073709551615, not '0'
    """
    for name in ("preset", "denoiser", "model_hash", "wbdit", "torch"):
        _text(name, getattr(config, name))
    _whole("seed", config.seed, *SEEDS)
    _model(_mapping("model", config.model))
    _schedule(_mapping("schedule", config.schedule))
    for section in ("training", "budget"):
        for name, value in _mapping(section, getattr(config, section)).items():
            for one in value if isinstance(value, (list, tuple)) and len(value) <= 8 else [value]:
                if not (one is None or isinstance(one, (bool, str))):
                    _number(f"{section}.{name}", one)
    if config.likelihood is not None:
        _likelihood(config.likelihood, config.schedule.get("noise_steps", 1000))
    if config.foretold is not None:
        _foretold(config.foretold)
    _trained(config.trained)


def check_preprocessor(facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Check the content of ``preprocessor.json`` and ``preprocessor.safetensors``, which has all its parts.

    Parameters
    ----------
    facts
        Content of the JSON file.
    arrays
        Arrays of the safetensors file.

    Raises
    ------
    InputError
        If a part has another type, size or range, or does not fit the others.
    """
    if facts["space"] not in SPACES or not isinstance(facts["space"], str):
        raise _must("space", f"one of {', '.join(SPACES)}", facts["space"])
    values = ("log1p", "lognorm") if facts["space"] == "counts" else ("as is",)
    if facts["values"] not in get_args(Values) or facts["values"] not in values:
        raise _must("values", f"one of {', '.join(values)} for {facts['space']}", facts["values"])
    genes = _names("genes", facts["genes"])
    _number("scale", facts["scale"], above=0)
    _text("found", facts.get("found", ""))
    labels = _mapping("labels", facts["labels"])
    columns = _names("labels.columns", labels["columns"], empty=True)
    categories = _sequence("labels.categories", labels["categories"], len(columns))
    for column, known in zip(columns, categories, strict=True):
        _names(f"the labels of {column!r}", known)
    n = _combinations(arrays["combinations"], arrays["sizes"], [len(known) for known in categories])
    counts = facts["space"] == "counts"
    _array("center", arrays["center"], np.float32, (len(genes),))
    _array("smallest", arrays["smallest"], np.float32, (len(genes),), lowest=0, infinite=True)
    _array("library", arrays["library"], np.float32, (n if counts else 0,), lowest=0)
    continuous = _names("continuous", facts.get("continuous", ()), empty=True)
    if continuous:
        _array("continuous.center", arrays["continuous.center"], np.float64, (len(continuous),))
        _array("continuous.scale", arrays["continuous.scale"], np.float64, (len(continuous),), lowest=1e-300)
        _array("continuous.values", arrays["continuous.values"], np.float64, (n, len(continuous)))
    if not counts and not continuous and n > MOST_CELLS:
        raise _must("sizes", f"of at most {MOST_CELLS} cells", n)
    if common := set(columns) & set(continuous):
        raise InputError(f"{min(common)!r} is both a label and a continuous column")
    _source(_mapping("source", facts.get("source", {})))
    _annotations(
        _mapping("annotations", facts.get("annotations", {})), len(genes), dict(zip(columns, categories, strict=True))
    )


def check_tensor_file(path: Path) -> None:
    """Check that a safetensors file is there and is no pickle.

    Raises
    ------
    InputError
        If it is missing, is no file, or is a pickle (which is never opened).
    """
    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}: is the run complete?")
    with path.open("rb") as file:
        start = file.read(9)
    # safetensors start with an 8-byte length, which can equal the first bytes of a pickle, followed by JSON
    if start[8:] != b"{" and start.startswith((b"PK", b"\x80")):
        raise InputError(f"{path} is a pickle (torch.save), not safetensors: wbdit does not open pickles")


def read_weights(
    path: Path, config: RunConfig, preprocessor: Preprocessor, make_model: Callable[[RunConfig], nn.Module]
) -> dict[str, Tensor]:
    """Read a run's weights, if its files fit each other.

    The model is built without memory first, and compared with the header of the file.

    Parameters
    ----------
    path
        The safetensors file.
    config, preprocessor
        The other files of the run.
    make_model
        Function that builds the model of a configuration.

    Returns
    -------
    The state dict of the model, all values finite.

    Raises
    ------
    InputError
        If something does not fit.
    """
    check_tensor_file(path)
    try:
        _fit(config, preprocessor)
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            parts = {name: file.get_slice(name) for name in names}
            header = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
            _implied_sizes(config, header)
            with torch.device("meta"):
                wanted = make_model(config).state_dict()
            _same_shapes({name: (tuple(t.shape), DTYPES[t.dtype]) for name, t in wanted.items()}, header)
            state = {name: file.get_tensor(name) for name in names}
        _finite(state)
        _tables(state)
        _gaussians(state, config)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a valid safetensors file: is the run complete?") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # InputError too
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path} and config.json do not fit each other ({reason}): are both from the same run?"
        ) from error
    return state


def check_state(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], weights: Mapping[str, Tensor], cells: int, averaged: bool
) -> None:
    """Check the saved state of a training against the model and the number of cells that it goes on with.

    Parameters
    ----------
    tensors, facts
        From :meth:`wbdit.training.trainer.Trainer.state`.
    weights
        The model's weights by name.
    cells
        Number of training cells.
    averaged
        Whether the training averages its weights.

    Raises
    ------
    InputError
        If a part is missing, has another type, shape or range, or is not finite.
    """
    for name in ("step", "epoch", "position"):
        _whole(name, facts.get(name), 0, LARGEST)
    _whole("skipped", facts.get("skipped", 0), 0, LARGEST)  # runs of earlier versions count none
    _number("seconds", facts.get("seconds"), lowest=0)
    for name in ("validation_loss", "best_loss", "best_step"):
        if facts.get(name) is not None:
            _number(name, facts[name])
    for name in ("stopped_early", "has_best"):
        _truth(name, facts.get(name, False))
    kinds = ["weights.{}", *(["average.{}"] if averaged else []), *(["best.{}"] if facts.get("has_best") else [])]
    if facts["step"] > 0:  # the optimizer has no state before its first step
        kinds += ["optimizer.{}.exp_avg", "optimizer.{}.exp_avg_sq"]
    wanted = {kind.format(name): (p.shape, p.dtype) for kind in kinds for name, p in weights.items()}
    if facts["step"] > 0:
        wanted |= {f"optimizer.{name}.step": (torch.Size(), torch.float32) for name in weights}
    if "order" in tensors:
        wanted["order"] = (torch.Size([cells]), torch.int64)
        if facts["position"] > cells:
            raise _must("position", f"at most {cells}", facts["position"])
    wanted["random.cpu"] = (torch.get_rng_state().shape, torch.uint8)
    for name, (shape, dtype) in wanted.items():
        if name not in tensors:
            raise InputError(f"{name!r} is missing")
        if tensors[name].shape != shape or tensors[name].dtype != dtype:
            raise _must(name, f"of shape {list(shape)}", list(tensors[name].shape))
    _finite({name: tensors[name] for name in wanted})
    if "order" in tensors and (tensors["order"].sort().values != torch.arange(cells)).any():
        raise InputError("the order of the cells does not hold each cell once")


def _model(model: Mapping[str, Any]) -> None:
    for name, value in model.items():
        if name in MODEL_SIZES:
            _whole(f"model.{name}", value, *MODEL_SIZES[name])
        elif name in MODEL_TRUTHS:
            _truth(f"model.{name}", value)
        elif name == "mlp_ratio":
            _number("model.mlp_ratio", value, above=0)
        elif name == "class_dropout_prob":
            _number("model.class_dropout_prob", value, lowest=0, highest=1)
        elif name == "prediction":
            if value not in PREDICTIONS:
                raise _must("model.prediction", f"one of {', '.join(PREDICTIONS)}", value)
        elif name == "label_sizes":
            for size in _sequence("model.label_sizes", value):
                _whole("model.label_sizes", size, 1, LARGEST)
        else:
            raise InputError(f"unknown setting of the model {_short(name)}: update wbdit")


def _schedule(schedule: Mapping[str, Any]) -> None:
    for name, value in schedule.items():
        if name == "noise_steps":
            _whole("schedule.noise_steps", value, 2, MOST_TIMESTEPS)
        elif name in ("beta_start", "beta_end"):
            _number(f"schedule.{name}", value, above=0, highest=0.999)
        elif name != "kind" or value not in ("linear", "cosine"):
            raise _must(
                f"schedule.{_short(name)}",
                'one of noise_steps, beta_start, beta_end, or kind "linear", "cosine"',
                value,
            )


def _likelihood(likelihood: LikelihoodConfig, noise_steps: int) -> None:
    _whole("likelihood.n_bins", likelihood.n_bins, 1, MOST_BINS)
    _whole("likelihood.stop", likelihood.stop, 1, noise_steps - 2)
    _number("likelihood.input_dropout", likelihood.input_dropout, lowest=0, highest=1)
    _truth("likelihood.learned_dispersion", likelihood.learned_dispersion)
    _number("likelihood.rate_prior", likelihood.rate_prior, lowest=0)
    if likelihood.combinations is not None:
        for name, value in likelihood.combinations._asdict().items():
            _whole(f"likelihood.combinations.{name}", value, 0, MOST_COMBINATIONS)
    if likelihood.gaussians is not None:
        _whole("likelihood.gaussians", likelihood.gaussians, 0, MOST_COMBINATIONS)
    _whole("likelihood.places", likelihood.places, 0, MOST_PLACES)
    _truth("likelihood.noise_table", likelihood.noise_table)
    if likelihood.noise_table and not likelihood.gaussians:
        raise InputError("a table of outputs at pure noise goes with Gaussians")


def _foretold(facts: ForetoldFacts) -> None:
    for name, r2 in facts.left_out.items():
        _text("foretold.left_out", name)
        _number(f"foretold.left_out.{_short(name)}", r2)
    for name, (donor, similarity) in facts.nearest.items():
        _text("foretold.nearest", name)
        _text(f"foretold.nearest.{_short(name)}", donor)
        _number(f"foretold.nearest.{_short(name)}", similarity)


def _trained(trained: Trained) -> None:
    for name, value in vars(trained).items():
        if name in ("steps", "cells"):
            _whole(f"trained.{name}", value, 0, LARGEST)
        elif value is not None:
            _number(f"trained.{name}", value)
        elif name in ("seconds", "epochs", "total_seconds"):
            raise _must(f"trained.{name}", "a number", value)


def _combinations(combinations: np.ndarray, sizes: np.ndarray, label_sizes: list[int]) -> int:
    """Check the label combinations ``(M, C)`` and their numbers of cells ``(M,)``; return the number of cells."""
    _array("sizes", sizes, np.int64, (len(sizes),) if sizes.ndim == 1 else (0,), lowest=1, highest=LARGEST)
    _array("combinations", combinations, np.int64, (len(sizes), len(label_sizes)), lowest=0)
    if len(sizes) == 0:
        raise InputError("combinations must name at least one")
    if len(label_sizes) and (combinations >= np.array(label_sizes)).any():
        raise InputError("combinations name a label that the run does not have")
    if len(np.unique(combinations, axis=0) if len(label_sizes) else [()]) != len(sizes):
        raise InputError("combinations name one twice")
    ordered = np.lexsort(combinations.T[::-1]) if len(label_sizes) else np.arange(1)
    if (ordered != np.arange(len(sizes))).any():
        raise InputError("combinations must be in order")
    return sum(map(int, sizes))


def _source(source: Mapping[str, Any]) -> None:
    for name, value in source.items():
        if name in ("use_raw", "round_counts"):
            _truth(f"source.{name}", value)
        elif name not in ("layer", "space"):
            raise InputError(f"unknown part of source {_short(name)}: update wbdit")
        elif value is not None:
            _text(f"source.{name}", value)


def _annotations(content: Mapping[str, Any], genes: int, labels: Mapping[str, Sequence[str]]) -> None:
    for name, column in _mapping("annotations.var", content.get("var", {})).items():
        _column_name("annotations.var", name)
        _gene_column(f"annotations.var[{_short(name)}]", _mapping("annotations.var", column), genes)
    for part in ("categories", "colors"):
        for name, shown in _mapping(f"annotations.{part}", content.get(part, {})).items():
            if name not in labels:
                raise InputError(f"annotations.{part} name {_short(name)}, which is no label column")
            named = _names(f"annotations.{part}", shown, unique=part == "categories")
            if sorted(named) != sorted(labels[name]) if part == "categories" else len(named) != len(labels[name]):
                raise InputError(f"annotations.{part} of {_short(name)} are not those of its labels")
    for name in _names("annotations.ordered", content.get("ordered", ()), empty=True):
        if name not in labels:
            raise InputError(f"annotations.ordered names {_short(name)}, which is no label column")


def _gene_column(name: str, column: Mapping[str, Any], genes: int) -> None:
    """Check a column of ``var``: categories and codes, or text, or truths."""
    if "codes" in column:
        known = _names(f"{name}.categories", column.get("categories"), empty=True)
        for code in _sequence(f"{name}.codes", column["codes"], genes):
            _whole(f"{name}.codes", code, -1, len(known) - 1)
        _truth(f"{name}.ordered", column.get("ordered"))
        return
    values = _sequence(f"{name}.values", column.get("values"), genes)
    known = [value for value in values if value is not None]
    if not all(isinstance(value, bool) for value in known):
        for value in known:
            _text(f"{name}.values", value)


def _fit(config: RunConfig, preprocessor: Preprocessor) -> None:
    """Check the sizes that the configuration and the preprocessor share."""
    model, labels = config.model, preprocessor.labels
    shared = {
        "genes": (model.get("input_size", 2000), len(preprocessor.genes)),
        "labels": (list(model.get("label_sizes", ())), list(labels.label_sizes)),
        "covariates": (model.get("n_covariates", 0), len(preprocessor.covariates.columns)),
    }
    for name, (own, other) in shared.items():
        if own != other:
            raise InputError(f"the model has {_short(own)} {name}, and the preprocessor {_short(other)}")
    if (config.likelihood is not None) != (preprocessor.values == "log1p"):
        raise InputError("a count likelihood goes with counts, and only with them")
    if (
        config.likelihood is None
        and config.schedule.get("kind") == "cosine"
        and model.get("prediction", "epsilon") == "epsilon"
    ):
        raise InputError('prediction "epsilon" needs the schedule "linear"')


def _implied_sizes(config: RunConfig, header: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """Check that the file holds at least the largest weights that the configuration implies.

    Even a model without memory takes time and Python objects, one per block.
    """
    model, stored = config.model, sum(math.prod(shape) for shape, _ in header.values())
    width, genes = model.get("hidden_size", 768), model.get("input_size", 2000)
    implied = {
        "hidden_size": width * width,
        "input_size": genes,
        "patch_size": model.get("patch_size", 10) * width,
        "num_heads": model.get("num_heads", 8),
        "depth": model.get("depth", 1) * width * width,
        "label_sizes": (sum(model.get("label_sizes", ())) + len(model.get("label_sizes", ()))) * width,
        "n_covariates": model.get("n_covariates", 0) * width,
        "mlp_ratio": model.get("mlp_ratio", 4.0) * width if config.denoiser == "dit" else 0,
    }
    for name, least in implied.items():
        if least > stored:
            raise InputError(
                f"model.{name} {_short(model.get(name))} needs more weights than the {stored:,} of the file"
            )


def _same_shapes(wanted: Mapping[str, tuple[Any, ...]], header: Mapping[str, tuple[Any, ...]]) -> None:
    lacking = [name for name in wanted if name not in header]
    if lacking:
        raise InputError(f"the weights lack {lacking[0]!r}")
    for name, own in header.items():
        if name not in wanted:
            raise InputError(f"the weights have {_short(name)}, which the model has not")
        if own != wanted[name]:
            (shape, dtype), (other, kind) = own, wanted[name]
            raise InputError(f"{name!r} has shape {list(shape)} in {dtype}, the model needs {list(other)} in {kind}")


def _finite(state: Mapping[str, Tensor]) -> None:
    for name, values in state.items():
        if values.is_floating_point() and values.numel():
            low, high = (float(x) for x in values.aminmax())
            if not -LARGEST_VALUE <= low <= high <= LARGEST_VALUE:  # not true of NaN either
                raise InputError(f"{name!r} holds values that are not finite")


def _tables(state: Mapping[str, Tensor]) -> None:
    """Check the tables that a count model computes with: they are no weights, and index or divide."""
    if "likelihood.lowest" in state:
        lowest, highest, levels = (state[f"likelihood.{name}"].long() for name in ("lowest", "highest", "n_levels"))
        gaps = (lowest[1:] != highest[:-1] + 1).any() or (highest < lowest).any()
        if gaps or lowest[0] != 0 or (levels < 1).any() or (levels > len(lowest)).any():
            raise InputError("the bins of counts do not follow each other")
        for name, largest in LOGARITHMS.items():
            if state[name].numel() and not float(state[name].abs().max()) <= largest:
                raise InputError(f"{name!r} holds values above {largest:g}")
        if state["log_library_scale"][1] <= 0 or (state["noise_factors"] < 0).any():
            raise InputError("the scale of the library sizes, or of the noise, is not positive")
    if "combinations.rates" in state:
        n = len(state["combinations.rates"])
        for name, largest in {"row_of": n - 1, "held_out_row": n - 1, **TABLES}.items():
            table = state.get(f"combinations.{name}")  # without the prior on rates, there is no rate offset
            if table is not None and table.numel() and not float(table.abs().max()) <= largest:
                raise InputError(f"'combinations.{name}' holds values above {largest:g}")
        if min(int(state[f"combinations.{name}"].min()) for name in ("row_of", "held_out_row")) < 0:
            raise InputError("the rows of combinations are negative")
    if "trend.knots" in state:
        knots, limits = state["trend.knots"], state["trend.limits"]
        if (knots[:, 1:] <= knots[:, :-1]).any() or (limits[:, 0] > limits[:, 1]).any():
            raise InputError("the knots of a covariate's trend do not follow each other")


def _gaussians(state: Mapping[str, Tensor], config: RunConfig) -> None:
    """Check the Gaussians that sampling starts from."""
    if "gaussians.axes" not in state or config.likelihood is None:
        return
    for name, largest in GAUSSIANS.items():
        table = state.get(f"gaussians.{name}")  # runs of older versions have no places
        if table is not None and table.numel() and not float(table.abs().max()) <= largest:
            raise InputError(f"'gaussians.{name}' holds values above {largest:g}")
    if (state["gaussians.variances"] < 0).any():
        raise InputError("the variances of the Gaussians are negative")
    if "gaussians.places.ends" in state:
        ends = state["gaussians.places.ends"]
        if int(ends[0]) or (ends.diff() < 0).any() or int(ends[-1]) > len(state["gaussians.places.coordinates"]):
            raise InputError("the places of the Gaussians' training cells are not sorted by combination")
    timestep, stop = int(state["gaussians.timestep"]), config.likelihood.stop
    highest = config.schedule.get("noise_steps", 1000) - 1
    if timestep and not stop < timestep <= highest:
        raise InputError(f"the Gaussians' timestep must be above {stop} and at most {highest}, not {timestep}")
    if "noise_table.knots" in state:
        knots = state["noise_table.knots"]
        if (knots[:, 1:] < knots[:, :-1]).any():
            raise InputError("the knots of the table of outputs at pure noise do not ascend")
        for name, table in (("knots", knots), ("outputs", state["noise_table.outputs"])):
            if table.numel() and not float(table.abs().max()) <= LARGEST_OUTPUT:
                raise InputError(f"'noise_table.{name}' holds values above {LARGEST_OUTPUT:g}")


def _array(
    name: str,
    array: np.ndarray,
    dtype: type,
    shape: tuple[int, ...],
    lowest: float | None = None,
    highest: float | None = None,
    infinite: bool = False,
) -> None:
    if array.dtype != dtype or array.shape != shape:
        wanted = f"{np.dtype(dtype).name} of shape {list(shape)}"
        raise InputError(f"{name} must be {wanted}, not {array.dtype} of shape {list(array.shape)}")
    wrong = np.isnan(array).any() or not (infinite or np.isfinite(array).all())
    if lowest is not None:
        wrong |= (array < lowest).any()
    if highest is not None:
        wrong |= (array > highest).any()
    if array.dtype.kind == "f" and not infinite:
        wrong |= (np.abs(array) > LARGEST_VALUE).any()
    if wrong:
        raise InputError(f"{name} holds values that are not finite or out of range")


def _names(name: str, value: Any, *, empty: bool = False, unique: bool = True) -> list[str]:
    """Return a list of text: not empty, and without repetition."""
    names = _sequence(name, value)
    if not names and not empty:
        raise InputError(f"{name} must not be empty")
    for one in names:
        _column_name(name, one)
    if unique and len(set(names)) != len(names):
        twice = next(one for i, one in enumerate(names) if one in names[:i])
        raise InputError(f"{name} name {_short(twice)} twice")
    return names


def _column_name(name: str, value: Any) -> None:
    _text(name, value)
    if not value or value in RESERVED:
        raise _must(name, "names", value)


def _sequence(name: str, value: Any, length: int | None = None) -> list[Any]:
    if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
        raise _must(name, "a list" if length is None else f"a list of {length}", value)
    return list(value)


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _must(name, "an object", value)
    return value


def _text(name: str, value: Any) -> None:
    """Check text that files and terminals can hold: no null character, no half of a character."""
    if not (isinstance(value, str) and is_text(value)):
        raise _must(name, "text", value)


def _truth(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _must(name, "true or false", value)


def _whole(name: str, value: Any, lowest: int, highest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise _must(name, f"{lowest}" if lowest == highest else f"a whole number from {lowest} to {highest}", value)


def _number(
    name: str, value: Any, lowest: float = -LARGEST_VALUE, highest: float = LARGEST_VALUE, above: float | None = None
) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not lowest <= value <= highest or (above is not None and value <= above):
        raise _must(name, "a finite number in its range", value)


def _must(name: str, what: str, value: object) -> InputError:
    return InputError(f"{name} must be {what}, not {_short(value)}")


def _short(value: object) -> str:
    """Return a value as text of one line, whatever it is; deep or long ones are cut."""
    if isinstance(value, (dict, list, tuple)) and len(value) > 8:
        return f"{type(value).__name__} of {len(value)}"
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # nested deeply; a whole number of too many digits
        return f"this {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."
