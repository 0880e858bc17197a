"""Training runs: start or resume a run, train it, save it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wbdit import checkpoint, run_folder
from wbdit._progress import show_passes
from wbdit._signals import deferred_signals
from wbdit.checkpoint import RESUME
from wbdit.counts.bins import CountBins
from wbdit.counts.denoiser import NOISE_AXES, CountDenoiser
from wbdit.counts.foretell import Foretelling
from wbdit.counts.noise_table import NoiseTable
from wbdit.data.cells import Cells
from wbdit.data.expression import check_cells
from wbdit.data.files import CellSource, open_cells
from wbdit.data.fingerprint import Fingerprint
from wbdit.data.labels import Labels
from wbdit.data.loader import Batches
from wbdit.data.matrix import Source
from wbdit.data.sources import TrainingData
from wbdit.data.space import Space
from wbdit.data.statistics import most_combinations
from wbdit.errors import InputError
from wbdit.generator import CellGenerator, make_model, read_generator, write_generator
from wbdit.nn.wbdit import WBDiT
from wbdit.run_config import LikelihoodConfig, RunConfig, Trained
from wbdit.run_folder import RunWriter
from wbdit.sampling import CALLS_FROM_NOISE
from wbdit.schedule import NoiseSchedule
from wbdit.training import resume as resuming
from wbdit.training.calibration import calibrate_noise, calibration_bytes, calibration_seconds
from wbdit.training.closed_form import fit_gaussians, fitted_cells, fitting_bytes, fitting_calls
from wbdit.training.config import NOISE_STEPS, Budget, Preset, Training, check_precision
from wbdit.training.distributed import current, joins_others
from wbdit.training.forecast import Forecast, duration, short
from wbdit.training.foretold_rates import calibrate_foretold, foretold_cells
from wbdit.training.losses import CountNLL, LossFunction, SquaredError
from wbdit.training.memory import GIGABYTE, check_memory, peak_memory
from wbdit.training.tensorboard import tensorboard_writer
from wbdit.training.trainer import Trainer, choose_precision
from wbdit.training.validation import Validation, split_rows
from wbdit.whitebox.measures import diagnostics

LONG_PREPARATION = 30.0  # seconds; the log says how long it took if longer
MAX_CALIBRATION_SHARE = 0.25  # of a training budget in minutes
BAD_BATCHES = "bad_batches.jsonl"  # of the RUN folder: the rows of batches whose steps were skipped

logger = logging.getLogger("wbdit")


@joins_others
def fit(
    adata: CellSource,
    *,
    label: str | Sequence[str] | None = None,
    continuous: str | Sequence[str] | None = None,
    preset: str | Preset | None = None,
    minutes: float | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    max_genes: int | None = None,
    genes: str | Sequence[str] | None = None,
    batch_key: str | None = None,
    layer: str | None = None,
    use_raw: bool = False,
    space: Space | None = None,
    round_counts: bool = False,
    seed: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    validation: float | None = None,
    early_stopping: float | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: str | Path | None = None,
    progress: bool = True,
) -> CellGenerator:
    """Train a White-Box Diffusion Transformer on cells.

    The logger "wbdit" reports the kind of values found in the cells and the chosen settings. After a few seconds it
    reports how long the training will take in all, and its memory.

    Parameters
    ----------
    adata
        Cells by genes. Raw counts are best. They are looked for in X, ``raw.X`` and all layers, see
        :func:`wbdit.data.matrix.find_expression`. Log-normalized and scaled values in X work too. Millions of cells
        may stay on disk: give a backed AnnData, the path of an ``.h5ad`` or ``.zarr`` file, a list of these, or an
        iterable of AnnData, see :func:`wbdit.data.files.open_cells`.
    label
        Column of ``obs`` to condition on, such as the cell type, or several: ``["cell_type", "condition", "donor"]``.
    continuous
        Numeric column of ``obs`` to condition on, such as age, dose or pseudotime, or several. The model takes values
        in standard deviations from the mean: give doses that span decades as logarithms.
    preset
        "small" (laptops), "base" (one GPU), "paper" (as published) or "dit" (the black-box control); or a
        :class:`wbdit.Preset` of your own. The default is "small".
    minutes, epochs, steps
        Training budget, at most one of the three: minutes, passes over the cells, or optimizer steps. By default the
        preset's, which is 50 passes for "small". With steps or epochs, the same seed gives the same model.
    max_genes
        Maximum number of genes. If there are more, the most variable are kept. The preset's number by default, or all
        of `genes`.
    genes
        Genes to use: a list of names, or the name of a boolean column of ``var`` such as "highly_variable".
    batch_key
        Column of ``obs``: the most variable genes are ranked in each of its batches.
    layer, use_raw
        Use the values of this layer ("X" for X), or of ``raw.X`` with its genes, in place of what is found.
    space
        "counts", "lognorm" or "scaled": what the values are, where they do not tell. "lognorm" and "scaled" use X.
    round_counts
        Round counts that are not integers, such as those corrected for ambient RNA.
    seed
        Seed of weights, order of cells, timesteps and noise; 0 by default.
    device
        "auto", "cpu", "cuda", or "cuda:1" for the second GPU.
    precision
        "fp32", "bf16" or "auto", see :class:`wbdit.training.config.Training`. A resumed run keeps its precision.
    validation
        Share of the cells to hold out, such as 0.1; the preset's by default, which is 0. Their loss is logged about
        once per pass. A resumed run keeps its held-out cells.
    early_stopping
        End the training after this many passes without a lower loss of the held-out cells, and keep the best weights.
    out
        RUN folder, written during training, by one training at a time. It holds one save at any moment, and the save
        before it in ``previous/`` (:mod:`wbdit.run_folder`). Ctrl-C ends the training and saves the run. SIGTERM and
        SIGHUP do so too and then reach the handlers that the program had.
    resume
        Resume the run in `out` on the same cells, until its budget, or the budget given here, is spent. What else is
        given must be as before.
    overwrite
        Replace a run in `out`, or files of others with the names of a run's files.
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
        If the cells, the arguments or the folder cannot be used, or another process trains into the folder.

    Examples
    --------
    >>> few = cells[cells.obs["bulk_labels"].isin(["Dendritic", "CD19+ B"])][:40, :128]
    >>> trained = wbdit.fit(few, label="bulk_labels", steps=2, progress=False)
    >>> trained.config.trained.steps
    2
    >>> trained.generate(5).shape
    (5, 128)
    """
    began = time.monotonic()
    folder = Path(out) if out is not None else None
    check_precision(precision)
    budget = None
    if (minutes, epochs, steps) != (None, None, None):
        budget = Budget(minutes, epochs, steps)
    settings: dict[str, Any] = {"validation": validation, "early_stopping": early_stopping}
    settings = {name: value for name, value in settings.items() if value is not None}
    ranks = current()
    where = ranks.device(device)
    show_passes(progress and ranks.is_first)
    source = Source(layer, use_raw, space, round_counts)
    with ExitStack() as stack:
        writer = None
        if folder is not None and ranks.is_first:
            writer = stack.enter_context(_writing(folder, resume, overwrite))
        ranks.exchange()  # the folder is in order before the others read it
        if resume:
            if folder is None:
                raise InputError("no run to resume: give the run's folder as `out`")
            choices: dict[str, Any] = {"label": label, "continuous": continuous, "preset": preset, "seed": seed}
            choices |= {"precision": precision, "settings": settings}
            reading = resuming.reading_facts(max_genes, source, genes, batch_key)
            run = TrainingRun.resume(open_cells(adata), folder, budget, choices, reading, where)
        else:
            preset = "small" if preset is None else preset
            chosen = Preset.from_name(preset) if isinstance(preset, str) else preset
            if not isinstance(chosen, Preset):
                raise InputError(f"`preset` must be a name or a wbdit.Preset, not {type(preset).__name__}")
            chosen = replace(chosen, training=replace(chosen.training, **settings))
            how: dict[str, Any] = {"source": source, "genes": genes, "batch_key": batch_key}
            name = resuming.preset_name(preset)
            run = TrainingRun.start(
                *(open_cells(adata), label, continuous, chosen, name, budget, max_genes),
                *(seed or 0, where, precision, how),
            )
        if (prepared := time.monotonic() - began) > LONG_PREPARATION:
            logger.info(f"read and prepared the cells in {duration(prepared)}")
        write = stack.enter_context(tensorboard_writer(tensorboard if ranks.is_first else None))
        with deferred_signals():
            generator = run.train(writer, write, progress, began)
            run.log_ending(folder)
    return generator


@contextmanager
def _writing(folder: Path, resume: bool, overwrite: bool) -> Iterator[RunWriter]:
    """Check and lock the RUN folder, and yield its writer."""
    if resume and overwrite:
        raise InputError("give either `resume` or `overwrite`, not both")
    if resume and not folder.is_dir():
        raise InputError(f"no such run: {folder} is not a folder")
    run_folder.check_run_folder(folder, overwrite=overwrite)
    with run_folder.writing(folder) as writer:
        if not (resume or overwrite) and run_folder.holds_run(folder):
            raise InputError(
                f"{folder} already holds a run: resume it (`resume=True`), choose another folder, or replace it "
                "(`overwrite=True`)"
            )
        yield writer


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
    held_out
        Held-out cells, if any.
    reading
        How the cells were read, from :func:`wbdit.training.resume.reading_facts`.

    Attributes
    ----------
    history
        Records of the training log, earlier sessions included.
    finished
        Whether the training is complete: it has spent its budget, or stopped early by itself.
    """

    def __init__(
        self,
        model: Any,
        data: TrainingData,
        config: RunConfig,
        held_out: TrainingData | None = None,
        reading: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.data = data
        self.held_out = held_out
        self.config = config
        self.history: list[dict[str, Any]] = []
        self.identity: dict[str, Any] = {"cells_hash": Fingerprint.of(data, held_out), "reading": reading}
        self.schedule = NoiseSchedule(**config.schedule)
        self.ranks = current()
        genes, totals = "\n".join(data.preprocessor.genes), data.totals if data.has_counts else data.totals[:0]
        self.ranks.check_same("cells", genes.encode(), data.codes.tobytes(), totals.tobytes())
        self.ranks.copy_first(model.state_dict().values())
        self.trainer = self._trainer()
        self.began = time.monotonic()
        self.forecast = Forecast(self.trainer, self.began, lambda: 0.0)
        self.finished = False

    @classmethod
    def start(
        cls,
        adata: Cells,
        label: str | Sequence[str] | None,
        continuous: str | Sequence[str] | None,
        preset: Preset,
        name: str,
        budget: Budget | None,
        max_genes: int | None,
        seed: int,
        device: torch.device,
        precision: str,
        reading: dict[str, Any],
    ) -> TrainingRun:
        """Start a run on cells with the preset `name`; other arguments as in :func:`fit`.

        `reading` holds the arguments `source`, `genes` and `batch_key` of :meth:`TrainingData.fit`.
        """
        if max_genes is not None and max_genes < 1:
            raise InputError(f"at least one gene must be kept, not {max_genes}: give `max_genes` of 1 or more")
        most = preset.max_genes if max_genes is None and reading["genes"] is None else max_genes
        check_memory(preset, min(most or adata.n_vars, max(adata.n_vars, 1)), device)
        train, others = _split(adata, label, preset.training.validation, seed)
        data = TrainingData.fit(
            train,
            label=label,
            continuous=continuous,
            max_genes=most,
            lognorm=preset.lognorm,
            centered=preset.centered,
            **reading,
        )
        held_out = None if others is None else TrainingData.of(data.preprocessor, others)
        labels, covariates, genes = data.preprocessor.labels, data.preprocessor.covariates, len(data.preprocessor.genes)
        of_covariates = {"n_covariates": len(covariates.columns)} if covariates.columns else {}
        # resolved once: a resumed run keeps it on any device; this compiles the kernels, so cells are checked before
        precision = choose_precision(preset.training.precision if precision == "auto" else precision, device)
        foretelling = Foretelling.of(data.codes, labels.label_sizes, data.statistics) if data.has_counts else None
        config = RunConfig(
            preset=name,
            seed=seed,
            denoiser=preset.denoiser,
            model={**preset.model_for(genes), "label_sizes": labels.label_sizes, **of_covariates},
            schedule={"noise_steps": NOISE_STEPS, "kind": preset.schedule},
            training=asdict(replace(preset.training, precision=precision)),
            budget=asdict(budget or preset.budget),
            likelihood=_likelihood(preset, data, foretelling),
            foretold=foretelling.facts(labels) if foretelling is not None else None,
        )
        model = make_model(config)
        if isinstance(model, CountDenoiser):
            known = data.preprocessor.center, data.preprocessor.scale, data.scaled_covariates
            model.init_from_data(data.cells, data.codes, *known, data.statistics, foretelling)
        run = cls(model.to(device), data, config, held_out, resuming.reading_facts(max_genes, **reading))
        conditions = f"{labels.summary()}{covariates.summary()}"
        logger.info(f"{len(data)} cells, {genes} genes, {conditions} on {device}, {precision}")
        return run

    @classmethod
    def resume(
        cls,
        adata: Cells,
        folder: Path,
        budget: Budget | None,
        choices: dict[str, Any],
        reading: dict[str, Any],
        device: torch.device,
    ) -> TrainingRun:
        """Resume the run in a folder.

        `choices` are the arguments of :func:`wbdit.training.resume.check_choices`, `reading` those of
        :func:`wbdit.training.resume.reading_facts`; other arguments as in :func:`fit`.
        """

        def read(save: Path) -> tuple[CellGenerator, dict[str, torch.Tensor], dict[str, Any]]:
            return read_generator(save, device), *checkpoint.read_tensors_and_facts(save / RESUME)

        kept, state, facts = run_folder.read_newest(folder, run_folder.DATA, read)
        resuming.check_choices(folder, kept, **choices)
        resuming.check_reading(folder, reading, facts.get("reading"))
        config = kept.config
        _check_settings(config, folder)
        if budget is not None:
            config = replace(config, budget=asdict(budget))
        train, others = _split(
            adata, kept.preprocessor.labels.columns, config.training.get("validation", 0.0), config.seed
        )
        data = TrainingData.of(kept.preprocessor, train)
        held_out = None if others is None else TrainingData.of(kept.preprocessor, others)
        run = cls(kept.model, data, config, held_out, facts.get("reading"))
        run.trainer.restore(state, facts)
        resuming.check_cells(folder, run.identity["cells_hash"], facts.get("cells_hash"))
        run.history = [record for record in kept.history if record["step"] <= run.trainer.step]
        return run

    def train(
        self, writer: RunWriter | None, write: Callable[[dict[str, Any]], object], progress: bool, began: float
    ) -> CellGenerator:
        """Train, save by `writer`, pass log records to `write`; return the generator with the averaged weights.

        The session began at `began` by :func:`time.monotonic`. Call it in a block of
        :func:`wbdit._signals.deferred_signals`: a signal ends the training after a step, a save is always finished, and
        the calibration is given up.
        """
        self.began = began
        logger.info(self._plan())

        def log(record: dict[str, Any]) -> None:
            self.history.append(record)
            write(record)

        def save() -> CellGenerator:
            averaged = self.generator()
            if writer is not None:
                with deferred_signals() as signals, signals.shielded():
                    writer.save(partial(self._write, averaged))
            return averaged

        self.ranks.exchange()  # all have read the folder
        untrained = save()  # fails now, not after hours, if the folder cannot be written
        minutes, seconds = self.trainer.budget.minutes, None
        if minutes is not None:
            seconds = self.ranks.from_first(partial(self._calibration_seconds, untrained))
            reserved = min(seconds / 60, MAX_CALIBRATION_SHARE * minutes)
            self.trainer.budget = Budget(minutes=minutes - reserved)
        del untrained
        self.forecast = Forecast(
            self.trainer,
            self.began,
            lambda: self._calibration_seconds(self.generator()) if seconds is None else seconds,
            max(calibration_bytes(self.data), fitting_bytes(self.data)),
        )
        self.trainer.skipped.path = None if writer is None else writer.run / BAD_BATCHES
        self.finished = self.trainer.train(log, save, progress, self.forecast.watch)
        averaged = save()
        if self.finished:  # what is measured with the averaged weights
            try:
                with deferred_signals() as signals, signals.at_once():
                    tables = calibrate_noise(averaged, self.data, progress)
                    tables |= fit_gaussians(averaged, self.data, progress)
                    tables |= calibrate_foretold(averaged, progress)
            except KeyboardInterrupt:
                self.finished = False  # a resumed run takes no step and calibrates
                return averaged
            self.model.load_state_dict(tables, strict=False)
            averaged = save()
        return averaged

    def _calibration_seconds(self, generator: CellGenerator) -> float:
        calls = fitting_calls(self.model, self.data) // CALLS_FROM_NOISE  # in cells that are sampled
        return calibration_seconds(generator, self.data, foretold_cells(generator) + calls)

    def _write(self, averaged: CellGenerator, folder: Path) -> None:
        """Write the files of a save into a folder."""
        write_generator(averaged, folder)
        tensors, facts = self.trainer.state()
        checkpoint.write_tensors(folder / RESUME, tensors, {**facts, **self.identity})

    def log_ending(self, folder: Path | None) -> None:
        """Log how the training ended."""
        if ending := self.ending(folder):
            logger.info(ending)
        if self.finished and self.model.first_timestep:
            logger.info(f"sampling starts in closed form, at timestep {self.model.first_timestep}")
        if self.finished and isinstance(self.model, CountDenoiser) and self.model.noise_axes.any():
            low, high = (float(factor) for factor in self.model.noise_factors.aminmax())
            logger.info(f"initial noise is scaled by {low:.2f} to {high:.2f} along {NOISE_AXES} directions")

    def ending(self, folder: Path | None) -> str:
        """Return what the log says of the end of a training that was cut short or stopped early, or nothing."""
        trainer, per_epoch = self.trainer, self.trainer.batches.per_epoch
        in_all, minutes = trainer.steps_in_all, self.forecast.minutes_for_all
        passes, advice, best = f"{short(trainer.step / per_epoch)} passes", "", ""
        if trainer.best and trainer.best_step not in (None, trainer.step):
            best = (
                f"; kept the weights of pass {short(trainer.best_step / per_epoch)}, which fit the held-out cells best"
            )
        if trainer.stopped_early:
            return f"ended early after {passes} over the cells{best}"
        if self.finished and trainer.has_seen_enough:
            return f"ended early after {passes} over the cells, the preset's limit{best}"
        if in_all is not None and trainer.step < in_all:
            passes = f"{short(trainer.step / per_epoch)} of {short(in_all / per_epoch)} passes"
            if trainer.budget.minutes is not None:
                advice = f": give `minutes={minutes:g}` for all"
            elif minutes is not None:
                advice = f"; all of them take about {duration(60 * minutes)}"
        if self.finished:
            return passes + advice + best if advice or best else ""
        kept = f"; the run is saved in {folder}, continue with `resume=True`" if folder is not None else ""
        return f"stopped at step {trainer.step}, {passes}{advice}{best}{kept}"

    def generator(self) -> CellGenerator:
        """Return a generator with a copy of the model, with averaged weights."""
        model = make_model(self.config).to(self.trainer.device)
        state = {**self.model.state_dict(), **self.trainer.kept}
        model.load_state_dict(state)
        trainer = self.trainer
        trained = Trained(
            steps=trainer.step,
            seconds=round(trainer.seconds, 1),
            cells=len(self.data),
            epochs=round(trainer.step / trainer.batches.per_epoch, 2),
            validation_loss=trainer.best_loss if trainer.best else trainer.validation_loss,
            total_seconds=round(time.monotonic() - self.began, 1),
            peak_gigabytes=_rounded(peak_memory(trainer.device), GIGABYTE),
            estimated_seconds=_rounded(self.forecast.seconds),
            estimated_gigabytes=_rounded(self.forecast.gigabytes),
        )
        training = {**self.config.training, "micro_batch": trainer.gradient.micro_batch}
        model_hash = checkpoint.state_hash(state)
        config = replace(self.config, training=training, model_hash=model_hash, trained=trained)
        return CellGenerator(model, self.schedule, self.data.preprocessor, config, self.history)

    def _trainer(self) -> Trainer:
        config, device = self.config, next(self.model.parameters()).device
        training = _training(config)
        loss_fn: LossFunction
        if isinstance(self.model, CountDenoiser):
            loss_fn = CountNLL(self.model, self.schedule, len(self.data))
        else:
            loss_fn = SquaredError(self.model, self.schedule)

        def batches(cells: TrainingData) -> Batches:
            if isinstance(self.model, CountDenoiser):
                bin_of = deepcopy(self.model.likelihood).cpu().bin_of  # which a thread may call without the GPU
                return Batches.of_counts(cells, bin_of, training.batch_size, device)
            return Batches.of_values(cells, training.batch_size, device)

        held_out = None
        if self.held_out is not None:
            held_out = Validation(loss_fn, batches(self.held_out), training.batch_size, config.seed)
        diagnose = diagnostics if isinstance(self.model.network, WBDiT) else None
        budget = Budget(**config.budget)
        trainer = Trainer(loss_fn, batches(self.data), training, budget, config.seed, diagnose, held_out)
        if self.ranks.size > trainer.batches.batch_size:
            raise InputError(
                f"a batch of {trainer.batches.batch_size} cells has none for some of {self.ranks.size} processes: "
                "start fewer"
            )
        return trainer

    def _plan(self) -> str:
        """Return what is to be done, for the log: the budget, its passes and steps, and the held-out cells."""
        trainer, per_epoch = self.trainer, self.trainer.batches.per_epoch
        passes = []
        if trainer.budget.minutes is not None:
            passes.append(duration(60 * trainer.budget.minutes))
        if trainer.steps_in_all is not None:
            most = "at most " if passes else ""
            epochs = short(trainer.steps_in_all / per_epoch)
            passes.append(
                f"{most}{epochs} pass{'' if epochs == '1' else 'es'} over the cells in {trainer.steps_in_all} steps"
            )
        cells = f"of {trainer.batches.batch_size} cells"
        held = "" if self.held_out is None else f"; {len(self.held_out)} cells are held out"
        ranks = f" on {self.ranks.size} processes" if self.ranks.size > 1 else ""
        return f"training for {', '.join(passes)} {cells}{ranks}{held}"


def _training(config: RunConfig) -> Training:
    """Return the training settings of a run, checked."""
    return Training(**{**config.training, "betas": tuple(config.training["betas"])})


def _check_settings(config: RunConfig, folder: Path) -> None:
    """Check the training settings and the budget of a run that is resumed."""
    try:
        _training(config)
        Budget(**config.budget)
    except (KeyError, TypeError, ValueError) as error:  # InputError too
        raise InputError(f"cannot resume {folder}: its training settings are damaged ({error})") from error


def _split(adata: Cells, label: str | Sequence[str] | None, share: float, seed: int) -> tuple[Cells, Cells | None]:
    """Return the training cells and the held-out cells; all cells and None for a share of 0."""
    if share == 0:
        return adata, None
    check_cells(adata)
    labels = Labels.fit(adata, label)
    train, held_out = split_rows(labels, labels.codes(adata), share, seed)
    if len(held_out) == 0 or len(train) < 2:
        raise InputError(
            f"`validation={share:g}` of {adata.n_obs} cells holds out {len(held_out)}: give a larger share or 0"
        )
    return adata.select(train), adata.select(held_out)


def _rounded(value: float | None, unit: float = 1.0) -> float | None:
    return None if value is None else round(value / unit, 2)


def _likelihood(preset: Preset, data: TrainingData, foretelling: Foretelling | None) -> LikelihoodConfig | None:
    """Return the settings of the count likelihood; None if the model is not trained on counts."""
    if not data.has_counts:
        return None
    n_bins = len(CountBins.up_to(float(data.statistics.largest.max())).lowest)
    rows = None if foretelling is None else foretelling.rows
    gaussians = len(data.preprocessor.labels.sizes)
    if gaussians > most_combinations(data.cells.shape[1]):
        gaussians = 0  # the pooled one serves all
    channels = 2 if preset.likelihood.learned_dispersion else 1
    alone = data.scaled_covariates is None and gaussians > 0
    has_table = alone and NoiseTable.fits(gaussians, channels, data.cells.shape[1])
    settings = asdict(preset.likelihood) | {"rate_prior": preset.likelihood.rate_prior_of(len(data))}
    places = fitted_cells(data) if gaussians else 0
    return LikelihoodConfig(
        n_bins, combinations=rows, gaussians=gaussians, places=places, noise_table=has_table, **settings
    )
