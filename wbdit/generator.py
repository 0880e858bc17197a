"""Train on cells, generate cells: what people with an AnnData use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import torch
from tqdm import tqdm

from wbdit import checkpoint, ops, samplers
from wbdit.batches import Batches
from wbdit.cells import check_labels
from wbdit.checkpoint import CONFIG, FORMAT, METRICS, MODEL, RESUME
from wbdit.errors import InputError
from wbdit.model import WBDiT
from wbdit.presets import Budget, Training, find_preset
from wbdit.recipe import Recipe, apportion
from wbdit.schedule import NoiseSchedule
from wbdit.trainer import Trainer

Sampler = Literal["ddim", "ddpm"]
SAMPLERS: tuple[Sampler, ...] = ("ddim", "ddpm")
LIBRARY_DRAW = 2**32 - 1  # the counter of the library sizes' noise, out of reach of any sampler's step


class CellGenerator:
    """A trained denoiser with all that turns its output into cells.

    Made by :func:`fit` or :func:`load`.

    Attributes
    ----------
    model
        The denoiser, in evaluation mode.
    schedule
        Its noise schedule.
    recipe
        Genes, labels and values.
    config
        What goes into ``config.json``.
    history
        One record for each line of ``metrics.jsonl``.
    """

    def __init__(
        self, model: WBDiT, schedule: NoiseSchedule, recipe: Recipe, config: dict[str, Any], history: list[dict]
    ) -> None:
        self.model = model.eval()
        self.schedule = schedule
        self.recipe = recipe
        self.config = config
        self.history = history

    def generate(
        self,
        n: int | None = None,
        *,
        like: ad.AnnData | None = None,
        counts: Mapping[str, int] | None = None,
        sampler: Sampler = "ddim",
        steps: int | None = None,
        guidance: float = 1.0,
        seed: int = 0,
        batch_size: int = 256,
        progress: bool = False,
    ) -> ad.AnnData:
        """Generate synthetic cells.

        The cells depend on the seed, their place in the result and their label, not on the batch size.

        Parameters
        ----------
        n
            Number of cells, composed of labels as the training cells were, or as `like` is.
        like
            Cells to imitate the labels of: one synthetic cell for each of them, in their order, or `n` in their
            proportions.
        counts
            Number of cells of each label, in place of `n` and `like`.
        sampler
            "ddim" with eta = 1, or "ddpm"; see :mod:`wbdit.samplers`.
        steps
            Calls of the model; 50 for "ddim" and every timestep for "ddpm" by default.
        guidance
            Weight of classifier-free guidance; 1 for none.
        seed
            64 bits.
        batch_size
            Cells at a time.
        progress
            Show a progress bar on stderr.

        Returns
        -------
        AnnData with ``X`` = counts (CSR fp32) and ``layers["lognorm"]`` (ln(1 + counts per 10,000)) where the training
        cells held counts, else ``X`` in their own space; ``obs[label]``; ``uns["wbdit"]`` with versions, seed, sampler
        and model hash.

        Raises
        ------
        InputError
            If the request makes no sense for this run: no or too few cells, unknown labels, unknown sampler.
        """
        codes = self._labels(n, like, counts)
        if sampler not in SAMPLERS:
            raise InputError(f"no sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
        if guidance != 1 and not self.recipe.categories:
            raise InputError("guidance needs labels, and this run was trained without")
        if batch_size < 1:
            raise InputError(f"the batch size must be at least 1, not {batch_size}")
        longest = self.schedule.noise_steps - 1
        steps = steps if steps is not None else {"ddim": 50, "ddpm": longest}[sampler]
        if not 1 <= steps <= longest:
            raise InputError(f"steps must be between 1 and {longest}, not {steps}")
        parts = [
            self._sample(rows, codes[rows], sampler, steps, guidance, seed, update)
            for rows, update in _batches(len(codes), batch_size, steps, progress)
        ]
        device = next(self.model.parameters()).device
        draws = ops.normal(seed, torch.arange(len(codes), device=device), LIBRARY_DRAW, 1)[:, 0]
        cells = self.recipe.decode(np.concatenate(parts), codes, torch.special.ndtr(draws.double()).cpu().numpy())
        cells.uns["wbdit"] = {
            "wbdit": self.config["wbdit"],
            "torch": str(torch.__version__),
            "model_hash": self.config["model_hash"],
            "trained_on": self.recipe.space,
            "seed": seed,
            "sampler": sampler,
            "steps": steps,
            "guidance": float(guidance),
        }
        if self.recipe.label is not None:
            cells.uns["wbdit"]["label"] = self.recipe.label
        return cells

    def save(self, run: str | Path) -> None:
        """Write a RUN folder: ``config.json``, ``model.safetensors``, ``recipe.*``, ``metrics.jsonl``.

        Raises
        ------
        InputError
            If it cannot be written.
        """
        run = Path(run)
        checkpoint.write_recipe(run, self.recipe)
        lines = "".join(json.dumps(record) + "\n" for record in self.history)
        checkpoint.write_atomically(run / METRICS, lines.encode())
        checkpoint.write_tensors(run / MODEL, dict(self.model.state_dict()))
        checkpoint.write_json(run / CONFIG, self.config)

    def _labels(self, n: int | None, like: ad.AnnData | None, counts: Mapping[str, int] | None) -> np.ndarray:
        """Return the label of each cell that is asked for, ``(cells,)`` int64."""
        if counts is not None:
            if n is not None or like is not None:
                raise InputError("give counts, or n and like, not both")
            if min(counts.values(), default=0) < 0 or sum(counts.values()) < 1:
                raise InputError("counts must be zero or more, with at least one cell in all")
            return np.repeat(self.recipe.codes(list(counts)), list(counts.values()))
        if n is None and like is None:
            raise InputError("say how many cells: give n, like or counts")
        if n is not None and n < 1:
            raise InputError(f"at least one cell must be asked for, not {n}")
        if like is not None and self.recipe.label is not None:
            check_labels(like, self.recipe.label)
            codes = self.recipe.codes(like.obs[self.recipe.label].astype(str))
            return codes if n is None else apportion(np.bincount(codes), n)
        return self.recipe.composition(like.n_obs if n is None and like is not None else n or 0)

    def _sample(
        self,
        rows: np.ndarray,
        codes: np.ndarray,
        sampler: Sampler,
        steps: int,
        guidance: float,
        seed: int,
        update: Callable[..., object],
    ) -> np.ndarray:
        """Sample one batch of cells as the model gives them, ``(B, G)``."""
        device = next(self.model.parameters()).device
        noise = samplers.philox_noise(seed, torch.from_numpy(rows).to(device), (1, len(self.recipe.genes)))
        model: samplers.Model = self.model
        if self.recipe.categories:
            model = samplers.Guided(self.model, torch.from_numpy(codes).to(device), guidance)
        walk = {"ddim": samplers.ddim, "ddpm": samplers.ddpm}[sampler]
        x = walk(
            model,
            noise(-1),
            self.schedule,
            samplers.spaced_timesteps(self.schedule, steps),
            clamp_min=None,
            noise=noise,
            callback=update,
        )
        return x[:, 0].cpu().numpy()


def fit(
    adata: ad.AnnData,
    *,
    label: str | None = None,
    preset: str = "small",
    minutes: float | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    max_genes: int | None = None,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], object] = lambda line: None,
) -> CellGenerator:
    """Train a White-Box Diffusion Transformer on cells.

    Parameters
    ----------
    adata
        Cells by genes; raw counts in ``X`` (or ``layers["counts"]``) are best, log-normalised and scaled values work.
    label
        Column of ``obs`` to condition on, such as the cell type.
    preset
        "small" (two cores, minutes), "base" (one GPU) or "paper" (as published).
    minutes, epochs, steps
        Training budget, one of the three; the preset's by default. With steps or epochs, the same seed gives the same
        model.
    max_genes
        Where there are more genes, this many variable ones are kept; the preset's number by default.
    seed
        Of weights, order, timesteps and noise.
    device
        "auto", "cpu" or "cuda".
    out
        RUN folder to write while training; Ctrl-C then ends the training with the run saved.
    resume
        Go on with the run in `out`, trained on the same cells, to the end of its budget or of the one given.
    progress
        Show a progress bar on stderr.
    say
        Told in one line each what was found in the cells and what was chosen.

    Raises
    ------
    InputError
        If the cells, the arguments or the folder cannot be used.
    """
    run = Path(out) if out is not None else None
    budget = None
    if (minutes, epochs, steps) != (None, None, None):
        budget = Budget(minutes, epochs, steps)
    where = _device(device)
    if resume:
        generator, trainer = _resume(adata, run, budget, where)
    else:
        if run is not None and (run / CONFIG).exists():
            raise InputError(f"{run} already holds a run: go on with it (--resume) or choose another folder")
        generator, trainer = _start(adata, label, preset, budget, max_genes, seed, where, say)
    finished = _train(generator, trainer, run, progress)
    if not finished:
        kept = f"; the run is saved in {run}, go on with --resume" if run is not None else ""
        say(f"stopped at step {trainer.step}{kept}")
    return generator


def load(run: str | Path, *, device: str = "auto") -> CellGenerator:
    """Load a RUN folder.

    Parameters
    ----------
    run
        The folder that ``wbdit train`` or :meth:`CellGenerator.save` wrote.
    device
        "auto", "cpu" or "cuda".

    Raises
    ------
    InputError
        If a file is missing, damaged, a pickle, or from a newer wbdit.
    """
    run = Path(run)
    config = checkpoint.read_config(run)
    recipe = checkpoint.read_recipe(run)
    state = checkpoint.read_tensors(run / MODEL)
    try:
        model, schedule = _model(config), NoiseSchedule(**config["schedule"])
        model.load_state_dict(state, strict=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{run / MODEL} and {run / CONFIG} do not fit each other ({reason})") from error
    history = []
    if (run / METRICS).exists():
        history = [json.loads(line) for line in (run / METRICS).read_text().splitlines() if line.strip()]
    return CellGenerator(model.to(_device(device)), schedule, recipe, config, history)


def _start(
    adata: ad.AnnData,
    label: str | None,
    preset: str,
    budget: Budget | None,
    max_genes: int | None,
    seed: int,
    device: torch.device,
    say: Callable[[str], object],
) -> tuple[CellGenerator, Trainer]:
    chosen = find_preset(preset)
    if max_genes is not None and max_genes < 1:
        raise InputError(f"at least one gene must be kept, not {max_genes}")
    recipe = Recipe.fit(
        adata,
        label=label,
        max_genes=chosen.max_genes if max_genes is None else max_genes,
        lognorm=chosen.lognorm,
        centred=chosen.centred,
        say=say,
    )
    arguments = {**chosen.model, "input_size": len(recipe.genes), "num_classes": len(recipe.categories)}
    schedule: dict[str, Any] = {"noise_steps": 1000, "kind": chosen.schedule}
    config = {
        "format": FORMAT,
        "wbdit": _version(),
        "torch": str(torch.__version__),
        "preset": preset,
        "seed": seed,
        "model": arguments,
        "schedule": schedule,
        "training": asdict(chosen.training),
        "budget": asdict(budget or chosen.budget),
    }
    generator = CellGenerator(_model(config).to(device), NoiseSchedule(**schedule), recipe, config, [])
    say(f"{adata.n_obs} cells, {len(recipe.genes)} genes, {len(recipe.categories) or 'no'} labels on {device}")
    return generator, _trainer(generator, adata, device)


def _resume(
    adata: ad.AnnData, run: Path | None, budget: Budget | None, device: torch.device
) -> tuple[CellGenerator, Trainer]:
    if run is None:
        raise InputError("say which run to resume: give out")
    generator = load(run, device=str(device))
    if budget is not None:
        generator.config["budget"] = asdict(budget)
    trainer = _trainer(generator, adata, device)
    facts = checkpoint.read_json(run / RESUME / "state.json")
    trainer.restore(checkpoint.read_tensors(run / RESUME / "state.safetensors"), facts)
    generator.history = [record for record in generator.history if record["step"] <= trainer.step]
    return generator, trainer


def _trainer(generator: CellGenerator, adata: ad.AnnData, device: torch.device) -> Trainer:
    recipe, config = generator.recipe, generator.config
    x = torch.from_numpy(recipe.encode(adata)).to(device)
    y = None
    if recipe.label is not None:
        y = torch.from_numpy(recipe.codes(adata.obs[recipe.label].astype(str))).to(device)
    training = Training(**{**config["training"], "betas": tuple(config["training"]["betas"])})
    batches = Batches(x, y, training.batch_size)
    return Trainer(generator.model, generator.schedule, batches, training, Budget(**config["budget"]), config["seed"])


def _train(generator: CellGenerator, trainer: Trainer, run: Path | None, progress: bool) -> bool:
    """Train, saving into `run`; afterwards the generator's model holds the averaged weights."""

    def save() -> None:
        if run is not None:
            _use_average(generator, trainer).save(run)
            tensors, facts = trainer.state()
            checkpoint.write_tensors(run / RESUME / "state.safetensors", tensors)
            checkpoint.write_json(run / RESUME / "state.json", facts)

    save()  # finds out now, not after hours, that the folder cannot be written
    finished = trainer.train(generator.history.append, save, progress)
    save()
    averaged = _use_average(generator, trainer)
    generator.model, generator.config = averaged.model, averaged.config
    return finished


def _use_average(generator: CellGenerator, trainer: Trainer) -> CellGenerator:
    """Return a copy of the generator with the averaged weights."""
    model = _model(generator.config).to(trainer.device)
    state = {**trainer.model.state_dict(), **trainer.average}
    model.load_state_dict(state)
    config = {
        **generator.config,
        "model_hash": checkpoint.state_hash(state),
        "trained": {
            "steps": trainer.step,
            "seconds": round(trainer.seconds, 1),
            "cells": len(trainer.batches.x),
            "epochs": round(trainer.step / trainer.batches.per_epoch, 2),
        },
    }
    return CellGenerator(model, generator.schedule, generator.recipe, config, generator.history)


def _batches(n: int, batch_size: int, steps: int, progress: bool) -> Iterator[tuple[np.ndarray, Callable[..., object]]]:
    """Cut `n` cells into batches, each with the callback that moves the progress bar."""
    layout = "{desc} {percentage:3.0f}% |{bar:24}| {elapsed}<{remaining}"
    starts = range(0, n, batch_size)
    with tqdm(total=len(starts) * steps, desc="generating", bar_format=layout, disable=not progress) as bar:
        for start in starts:
            yield np.arange(start, min(start + batch_size, n)), lambda *step: bar.update()


def _model(config: dict[str, Any]) -> WBDiT:
    """Make a run's model with its seed's weights, leaving the user's own random numbers alone."""
    with torch.random.fork_rng([]):
        torch.manual_seed(config["seed"])
        return WBDiT(**config["model"])


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"no device {name!r}: choose auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is available here: choose --device cpu or auto")
    return device


def _version() -> str:
    from wbdit import __version__

    return __version__
