"""Training runs: start or resume a run, train it, save it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import anndata as ad
import torch

from wbdit import checkpoint
from wbdit._io import check_writable
from wbdit.checkpoint import CONFIG, RESUME
from wbdit.counts.bins import CountBins
from wbdit.counts.denoiser import NOISE_AXES, CountDenoiser
from wbdit.data.loader import Batches
from wbdit.data.sources import TrainingData
from wbdit.errors import InputError
from wbdit.generator import CellGenerator, find_device, load, make_model
from wbdit.nn.wbdit import WBDiT
from wbdit.run_config import LikelihoodConfig, RunConfig, Trained
from wbdit.schedule import NoiseSchedule
from wbdit.training.calibration import calibrate_noise, calibration_seconds
from wbdit.training.config import Budget, Preset, Training, check_precision, find_preset
from wbdit.training.losses import CountNLL, LossFunction, SquaredError
from wbdit.training.tensorboard import tensorboard_writer
from wbdit.training.trainer import Trainer, choose_precision
from wbdit.whitebox.measures import diagnostics

MAX_CALIBRATION_SHARE = 0.25  # of a training budget in minutes

logger = logging.getLogger("wbdit")


def fit(
    adata: ad.AnnData,
    *,
    label: str | Sequence[str] | None = None,
    continuous: str | Sequence[str] | None = None,
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
) -> CellGenerator:
    """Train a White-Box Diffusion Transformer on cells.

    The logger "wbdit" reports the kind of values found in the cells and the chosen settings.

    Parameters
    ----------
    adata
        Cells by genes. Raw counts in ``X`` (or ``layers["counts"]``) are best; log-normalized and scaled values work.
    label
        Column of ``obs`` to condition on, such as the cell type, or several: ``["cell_type", "condition", "donor"]``.
    continuous
        Numeric column of ``obs`` to condition on, such as age, dose or pseudotime, or several. The model takes values
        in standard deviations from the mean: give doses that span decades as logarithms.
    preset
        "small" (two cores, minutes), "base" (one GPU), "paper" (as published) or "dit" (the black-box control).
    minutes, epochs, steps
        Training budget, at most one of the three; the preset's by default. With steps or epochs, the same seed gives
        the same model.
    max_genes
        Maximum number of genes. If there are more, the most variable are kept. The preset's number by default.
    seed
        Seed of weights, order of cells, timesteps and noise.
    device
        "auto", "cpu" or "cuda".
    precision
        "fp32", "bf16" or "auto", see :class:`wbdit.training.config.Training`. A resumed run keeps its precision.
    out
        RUN folder, written during training. Ctrl-C ends the training and saves the run.
    resume
        Resume the run in `out` on the same cells, until its budget, or the budget given here, is spent.
    tensorboard
        Folder for a copy of the training log in TensorBoard format.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    The trained generator.

    Raises
    ------
    InputError
        If the cells, the arguments or the folder cannot be used.

    Examples
    --------
    >>> few = cells[cells.obs["bulk_labels"].isin(["Dendritic", "CD19+ B"])][:40, :128]
    >>> trained = wbdit.fit(few, label="bulk_labels", steps=2, progress=False)
    >>> trained.config.trained.steps
    2
    >>> trained.generate(5).shape
    (5, 128)
    """
    folder = Path(out) if out is not None else None
    if folder is not None:
        check_writable(folder / CONFIG)
    check_precision(precision)
    budget = None
    if (minutes, epochs, steps) != (None, None, None):
        budget = Budget(minutes, epochs, steps)
    where = find_device(device)
    if resume:
        run = TrainingRun.resume(adata, folder, budget, precision, where)
    else:
        if folder is not None and (folder / CONFIG).exists():
            raise InputError(f"{folder} already holds a run: resume it (--resume) or choose another folder")
        run = TrainingRun.start(
            adata, label, continuous, find_preset(preset), preset, budget, max_genes, seed, where, precision
        )
    with tensorboard_writer(tensorboard) as write:
        generator = run.train(folder, write, progress)
    if not run.finished:
        kept = f"; the run is saved in {folder}, continue with --resume" if folder is not None else ""
        logger.info(f"stopped at step {run.trainer.step}{kept}")
    elif run.trainer.has_seen_enough:
        passes = run.trainer.training.most_epochs
        logger.info(f"ended early after {passes:g} passes over the cells, the preset's limit")
    if run.finished and isinstance(generator.model, CountDenoiser) and generator.model.noise_axes.any():
        low, high = (float(factor) for factor in generator.model.noise_factors.aminmax())
        logger.info(f"initial noise is scaled by {low:.2f} to {high:.2f} along {NOISE_AXES} directions")
    return generator


class TrainingRun:
    """A run during training: the model, its cells and its trainer.

    Parameters
    ----------
    model
        The model to train, on the device to train on.
    data
        The training cells.
    config
        The run's configuration.
    history
        Earlier records of the training log.

    Attributes
    ----------
    finished
        Whether the training has spent its budget.
    """

    def __init__(
        self, model: Any, data: TrainingData, config: RunConfig, history: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.model = model
        self.data = data
        self.config = config
        self.history = list(history)
        self.schedule = NoiseSchedule(**config.schedule)
        self.trainer = self._trainer()
        self.finished = False

    @classmethod
    def start(
        cls,
        adata: ad.AnnData,
        label: str | Sequence[str] | None,
        continuous: str | Sequence[str] | None,
        preset: Preset,
        name: str,
        budget: Budget | None,
        max_genes: int | None,
        seed: int,
        device: torch.device,
        precision: str,
    ) -> TrainingRun:
        """Start a run on cells with the preset `name`; other arguments as in :func:`fit`."""
        precision = choose_precision(precision, device)  # resolved once: a resumed run keeps it on any device
        if max_genes is not None and max_genes < 1:
            raise InputError(f"at least one gene must be kept, not {max_genes}")
        genes = preset.max_genes if max_genes is None else max_genes
        chosen = {"label": label, "continuous": continuous, "max_genes": genes}
        data = TrainingData.fit(adata, **chosen, lognorm=preset.lognorm, centered=preset.centered)  # type: ignore[arg-type]
        labels, covariates, genes = data.preprocessor.labels, data.preprocessor.covariates, len(data.preprocessor.genes)
        of_covariates = {"n_covariates": len(covariates.columns)} if covariates.columns else {}
        config = RunConfig(
            preset=name,
            seed=seed,
            denoiser=preset.denoiser,
            model={**preset.model, "input_size": genes, "label_sizes": labels.label_sizes, **of_covariates},
            schedule={"noise_steps": 1000, "kind": preset.schedule},
            training=asdict(replace(preset.training, precision=precision)),
            budget=asdict(budget or preset.budget),
            likelihood=_likelihood(preset, data),
        )
        model = make_model(config)
        if isinstance(model, CountDenoiser):
            model.init_from_data(
                *(data.matrix, data.codes, data.preprocessor.center, data.preprocessor.scale, data.scaled_covariates)
            )
        run = cls(model.to(device), data, config)
        conditions = f"{labels.summary()}{covariates.summary()}"
        logger.info(f"{len(data)} cells, {genes} genes, {conditions} on {device}, {precision}")
        return run

    @classmethod
    def resume(
        cls, adata: ad.AnnData, folder: Path | None, budget: Budget | None, precision: str, device: torch.device
    ) -> TrainingRun:
        """Resume the run in a folder; other arguments as in :func:`fit`."""
        if folder is None:
            raise InputError("no run to resume: give the run's folder (out)")
        kept = load(folder, device=str(device))
        config = kept.config
        if precision not in ("auto", config.training["precision"]):
            own = config.training["precision"]
            raise InputError(f"{folder} was trained in {own}: resume it without --precision {precision}")
        if budget is not None:
            config = replace(config, budget=asdict(budget))
        run = cls(kept.model, TrainingData.of(kept.preprocessor, adata), config)
        run.trainer.restore(*checkpoint.read_tensors_and_facts(folder / RESUME))
        run.history = [record for record in kept.history if record["step"] <= run.trainer.step]
        return run

    def train(self, folder: Path | None, write: Callable[[dict[str, Any]], object], progress: bool) -> CellGenerator:
        """Train, save into `folder`, pass log records to `write`; return the generator with the averaged weights."""

        def log(record: dict[str, Any]) -> None:
            self.history.append(record)
            write(record)

        def save() -> CellGenerator:
            averaged = self.generator()
            if folder is not None:
                averaged.save(folder)
                checkpoint.write_tensors(folder / RESUME, *self.trainer.state())
            return averaged

        untrained = save()  # fails now, not after hours, if the folder cannot be written
        minutes = self.trainer.budget.minutes
        if minutes is not None:
            reserved = min(calibration_seconds(untrained, self.data) / 60, MAX_CALIBRATION_SHARE * minutes)
            self.trainer.budget = Budget(minutes=minutes - reserved)
        self.finished = self.trainer.train(log, save, progress)
        averaged = save()
        if self.finished:  # noise_axes and noise_factors, measured with the averaged weights
            self.model.load_state_dict(calibrate_noise(averaged, self.data), strict=False)
            averaged = save()
        return averaged

    def generator(self) -> CellGenerator:
        """Return a generator with a copy of the model, with averaged weights."""
        model = make_model(self.config).to(self.trainer.device)
        state = {**self.model.state_dict(), **self.trainer.average}
        model.load_state_dict(state)
        trainer = self.trainer
        trained = Trained(
            steps=trainer.step,
            seconds=round(trainer.seconds, 1),
            cells=len(self.data),
            epochs=round(trainer.step / trainer.batches.per_epoch, 2),
        )
        config = replace(self.config, model_hash=checkpoint.state_hash(state), trained=trained)
        return CellGenerator(model, self.schedule, self.data.preprocessor, config, self.history)

    def _trainer(self) -> Trainer:
        config, device = self.config, next(self.model.parameters()).device
        training = Training(**{**config.training, "betas": tuple(config.training["betas"])})
        loss_fn: LossFunction
        if isinstance(self.model, CountDenoiser):
            loss_fn = CountNLL(self.model, self.schedule)
            batches = Batches.of_counts(self.data, self.model.likelihood.bin_of, training.batch_size, device)
        else:
            loss_fn = SquaredError(self.model, self.schedule)
            batches = Batches.of_values(self.data, training.batch_size, device)
        diagnose = diagnostics if isinstance(self.model.network, WBDiT) else None
        return Trainer(loss_fn, batches, training, Budget(**config.budget), config.seed, diagnose)


def _likelihood(preset: Preset, data: TrainingData) -> LikelihoodConfig | None:
    """Return the settings of the count likelihood; None if the model is not trained on counts."""
    if data.counts is None:
        return None
    n_bins = len(CountBins.up_to(float(data.counts.max())).lowest)
    return LikelihoodConfig(n_bins=n_bins, **asdict(preset.likelihood))
