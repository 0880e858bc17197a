"""From cells to a trained generator: start or resume a run, train it, save it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import anndata as ad
import torch

from wbdit import checkpoint
from wbdit._io import check_writable
from wbdit._version import __version__
from wbdit.checkpoint import CONFIG, FORMAT, RESUME
from wbdit.counts.bins import CountBins
from wbdit.counts.denoiser import NOISE_AXES, CountDenoiser
from wbdit.counts.init import log_library_sizes
from wbdit.data.loader import Batches
from wbdit.data.preprocessor import Preprocessor
from wbdit.errors import InputError
from wbdit.generator import CellGenerator, find_device, load, make_model
from wbdit.nn.wbdit import WBDiT
from wbdit.schedule import NoiseSchedule
from wbdit.training.calibration import calibrate_noise, calibration_seconds
from wbdit.training.config import Budget, Training, check_precision, find_preset
from wbdit.training.losses import CountNLL, LossFunction, SquaredError
from wbdit.training.tensorboard import tensorboard_writer
from wbdit.training.trainer import Trainer, choose_precision
from wbdit.whitebox.measures import diagnostics

MAX_CALIBRATION_SHARE = 0.25  # of training by the clock, for the spread that is matched in the end


def fit(
    adata: ad.AnnData,
    *,
    label: str | Sequence[str] | None = None,
    preset: str = "small",
    minutes: float | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    max_genes: int | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    out: str | Path | None = None,
    resume: bool = False,
    tensorboard: str | Path | None = None,
    progress: bool = True,
    say: Callable[[str], object] = lambda line: None,
) -> CellGenerator:
    """Train a White-Box Diffusion Transformer on cells.

    Parameters
    ----------
    adata
        Cells by genes; raw counts in ``X`` (or ``layers["counts"]``) are best, log-normalised and scaled values work.
    label
        Column of ``obs`` to condition on, such as the cell type, or several: ``["cell_type", "condition", "donor"]``.
    preset
        "small" (two cores, minutes), "base" (one GPU), "paper" (as published) or "dit" (the black-box control).
    minutes, epochs, steps
        Training budget, one of the three; the preset's by default. With steps or epochs, the same seed gives the same
        model.
    max_genes
        Where there are more genes, this many variable ones are kept; the preset's number by default.
    seed
        Of weights, order, timesteps and noise.
    device
        "auto", "cpu" or "cuda".
    precision
        "fp32", "bf16" or "auto", see :class:`wbdit.training.config.Training`; a run is resumed in its own.
    out
        RUN folder to write while training; Ctrl-C then ends the training with the run saved.
    resume
        Go on with the run in `out`, trained on the same cells, to the end of its budget or of the one given.
    tensorboard
        Folder to write the training log to for TensorBoard too.
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
    if run is not None:
        check_writable(run / CONFIG)
    check_precision(precision)
    budget = None
    if (minutes, epochs, steps) != (None, None, None):
        budget = Budget(minutes, epochs, steps)
    where = find_device(device)
    if resume:
        generator, trainer = _resume(adata, run, budget, precision, where)
    else:
        if run is not None and (run / CONFIG).exists():
            raise InputError(f"{run} already holds a run: go on with it (--resume) or choose another folder")
        generator, trainer = _start(adata, label, preset, budget, max_genes, seed, where, precision, say)
    with tensorboard_writer(tensorboard) as write:
        finished = _train(generator, trainer, adata, run, write, progress)
    if not finished:
        kept = f"; the run is saved in {run}, go on with --resume" if run is not None else ""
        say(f"stopped at step {trainer.step}{kept}")
    elif trainer.has_seen_enough:
        say(f"ended after {trainer.training.most_epochs:g} passes over the cells, which is enough of them")
    if finished and isinstance(generator.model, CountDenoiser) and generator.model.noise_axes.any():
        low, high = (float(factor) for factor in generator.model.noise_factors.aminmax())
        say(f"sampling begins with {low:.2f} to {high:.2f} times the noise along {NOISE_AXES} directions")
    return generator


def _start(
    adata: ad.AnnData,
    label: str | Sequence[str] | None,
    preset: str,
    budget: Budget | None,
    max_genes: int | None,
    seed: int,
    device: torch.device,
    precision: str,
    say: Callable[[str], object],
) -> tuple[CellGenerator, Trainer]:
    chosen = find_preset(preset)
    precision = choose_precision(precision, device)  # once: a run goes on as it began, wherever it is resumed
    training = replace(chosen.training, precision=precision)
    if max_genes is not None and max_genes < 1:
        raise InputError(f"at least one gene must be kept, not {max_genes}")
    preprocessor = Preprocessor.fit(
        adata,
        label=label,
        max_genes=chosen.max_genes if max_genes is None else max_genes,
        lognorm=chosen.lognorm,
        centred=chosen.centred,
        say=say,
    )
    arguments = {**chosen.model, "input_size": len(preprocessor.genes), "num_classes": preprocessor.labels.num_classes}
    schedule: dict[str, Any] = {"noise_steps": 1000, "kind": chosen.schedule}
    config = {
        "format": FORMAT,
        "wbdit": __version__,
        "torch": str(torch.__version__),
        "preset": preset,
        "seed": seed,
        "denoiser": chosen.denoiser,
        "model": arguments,
        "schedule": schedule,
        "training": asdict(training),
        "budget": asdict(budget or chosen.budget),
    }
    counts = preprocessor.matrix(adata) if preprocessor.values == "log1p" else None
    if counts is not None:
        levels = len(CountBins.up_to(float(counts.max())).lowest)
        config["likelihood"] = {"levels": levels, **asdict(chosen.likelihood)}
    model = make_model(config)
    if counts is not None and isinstance(model, CountDenoiser):
        model.init_from_data(counts, preprocessor.labels.codes(adata), preprocessor.centre, preprocessor.scale)
    generator = CellGenerator(model.to(device), NoiseSchedule(**schedule), preprocessor, config, [])
    trainer = _trainer(generator, adata, device)
    labels = preprocessor.labels.summary()
    say(f"{adata.n_obs} cells, {len(preprocessor.genes)} genes, {labels} on {device}, {precision}")
    return generator, trainer


def _resume(
    adata: ad.AnnData, run: Path | None, budget: Budget | None, precision: str, device: torch.device
) -> tuple[CellGenerator, Trainer]:
    if run is None:
        raise InputError("say which run to resume: give out")
    generator = load(run, device=str(device))
    own = generator.config["training"]["precision"]
    if precision not in ("auto", own):
        raise InputError(f"{run} was trained in {own}: resume it without --precision {precision}")
    if budget is not None:
        generator.config["budget"] = asdict(budget)
    trainer = _trainer(generator, adata, device)
    trainer.restore(*checkpoint.read_tensors_and_facts(run / RESUME))
    generator.history = [record for record in generator.history if record["step"] <= trainer.step]
    return generator, trainer


def _trainer(generator: CellGenerator, adata: ad.AnnData, device: torch.device) -> Trainer:
    preprocessor, config, model = generator.preprocessor, generator.config, generator.model
    training = Training(**{**config["training"], "betas": tuple(config["training"]["betas"])})
    y = torch.from_numpy(preprocessor.labels.codes(adata)).to(device) if preprocessor.labels.columns else None
    loss_fn: LossFunction
    if isinstance(model, CountDenoiser):
        counts = preprocessor.matrix(adata)
        x = torch.from_numpy(model.likelihood.bin_of(counts)).to(device)
        log_libraries = torch.from_numpy(log_library_sizes(counts)).to(device)
        batches = Batches(x, y, training.batch_size, log_libraries)
        loss_fn = CountNLL(model, generator.schedule, generator.stop)
    else:
        batches = Batches(torch.from_numpy(preprocessor.encode(adata)).to(device), y, training.batch_size)
        loss_fn = SquaredError(model, generator.schedule)
    diagnose = diagnostics if isinstance(generator.denoiser, WBDiT) else None
    return Trainer(loss_fn, batches, training, Budget(**config["budget"]), config["seed"], diagnose)


def _train(
    generator: CellGenerator,
    trainer: Trainer,
    adata: ad.AnnData,
    run: Path | None,
    write: Callable[[dict[str, Any]], object],
    progress: bool,
) -> bool:
    """Train, saving into `run` and telling `write`; afterwards the generator's model holds the averaged weights."""

    def log(record: dict[str, Any]) -> None:
        generator.history.append(record)
        write(record)

    def save() -> CellGenerator:
        averaged = _use_average(generator, trainer)
        if run is not None:
            averaged.save(run)
            checkpoint.write_tensors(run / RESUME, *trainer.state())
        return averaged

    untrained = save()  # finds out now, not after hours, that the folder cannot be written
    minutes = trainer.budget.minutes
    if minutes is not None:
        reserved = min(calibration_seconds(untrained, adata) / 60, MAX_CALIBRATION_SHARE * minutes)
        trainer.budget = Budget(minutes=minutes - reserved)
    finished = trainer.train(log, save, progress)
    averaged = save()
    if finished:  # two more buffers, of the averaged weights
        trainer.model.load_state_dict(calibrate_noise(averaged, adata), strict=False)
        averaged = save()
    generator.model, generator.config = averaged.model, averaged.config
    return finished


def _use_average(generator: CellGenerator, trainer: Trainer) -> CellGenerator:
    """Return a copy of the generator with the averaged weights."""
    model = make_model(generator.config).to(trainer.device)
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
    return CellGenerator(model, generator.schedule, generator.preprocessor, config, generator.history)
