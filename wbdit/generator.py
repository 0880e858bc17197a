"""The cell generator: from a trained model to an AnnData of synthetic cells."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import torch

from wbdit import card, checkpoint, ops, run_folder, samplers, steering, streaming
from wbdit._progress import Show, progress_bar
from wbdit.cell_blocks import BLOCK, n_blocks, run_tasks, whole_block
from wbdit.checkpoint import CONFIG, MODEL, RESUME
from wbdit.counts.closed_form import NoisedGaussians
from wbdit.counts.denoiser import CountDenoiser
from wbdit.counts.likelihood import CountLikelihood
from wbdit.data.preprocessor import Preprocessor
from wbdit.errors import InputError
from wbdit.nn.cuda_graph import CUDAGraphModel
from wbdit.nn.denoiser import Denoiser
from wbdit.nn.dit import DiT
from wbdit.nn.wbdit import WBDiT
from wbdit.ops import cpu
from wbdit.recast import Recast
from wbdit.request import (
    CellsPerLabel,
    GenerationRequest,
    PerLabel,
    Points,
    guidance_fact,
    read_request,
    request_facts,
)
from wbdit.request_check import doses, whole
from wbdit.run_check import read_weights
from wbdit.run_config import ForetoldFacts, RunConfig
from wbdit.samplers.noise import COUNT_DRAW, LIBRARY_DRAW, PLACE_DRAW
from wbdit.sampling import COUNTS_SAMPLER, COUNTS_SPACING, RECAST_CALLS, Sampling, choose_sampling
from wbdit.schedule import NoiseSchedule

logger = logging.getLogger("wbdit")

DENOISERS: dict[str, type[Denoiser]] = {"wbdit": WBDiT, "dit": DiT}

GPU_BATCH = 256  # cells
MOST_SENTENCES, MOST_NAMES = 3, 8  # about foretold combinations of labels


class Plan(NamedTuple):
    """The cells to generate: a request in which nothing is open, library sizes ``(n,)``, and how to sample.

    `shift` is added to the initial noise, ``(G,)``; `facts` is the content of ``uns["wbdit"]``.
    """

    asked: GenerationRequest
    library: np.ndarray
    sampling: Sampling
    seed: int
    facts: dict[str, Any]
    shift: np.ndarray | None = None

    @property
    def n(self) -> int:
        """Number of cells."""
        return len(self.asked.codes)


class CellGenerator:
    """A trained denoiser, and the preprocessor that turns its output into cells.

    :func:`fit` and :func:`load` return one.

    Attributes
    ----------
    model
        The denoiser, in evaluation mode.
    schedule
        Noise schedule of the denoiser.
    preprocessor
        Genes, labels and value transforms.
    config
        Content of ``config.json``.
    history
        One record per line of ``metrics.jsonl``.

    Examples
    --------
    >>> generator.preprocessor.labels.categories
    (('CD19+ B', 'Dendritic'),)
    >>> len(generator.preprocessor.genes), generator.config.trained.steps
    (765, 3)
    """

    def __init__(
        self,
        model: Denoiser | CountDenoiser,
        schedule: NoiseSchedule,
        preprocessor: Preprocessor,
        config: RunConfig,
        history: list[dict],
    ) -> None:
        self.model = model.eval()
        self.schedule = schedule
        self.preprocessor = preprocessor
        self.config = config
        self.history = history

    def __repr__(self) -> str:
        return card.plain_text(self.config, self.preprocessor)

    def _repr_html_(self) -> str:
        """Return the description that a notebook shows."""
        return card.html(self.config, self.preprocessor)

    def generate(
        self,
        n: int | None = None,
        *,
        like: ad.AnnData | None = None,
        n_per_label: CellsPerLabel | None = None,
        sampler: samplers.Name | None = None,
        calls: int | None = None,
        spacing: samplers.Spacing | None = None,
        guidance: float | Mapping[str, float] = 1.0,
        toward: Mapping[str, str] | None = None,
        mix: float | None = None,
        at: Points | None = None,
        library_size: PerLabel | None = None,
        library_factor: PerLabel | None = None,
        steer: Mapping[str, float] | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> ad.AnnData:
        """Generate synthetic cells.

        The cells depend on the seed, on their index in the result and on their labels, but not on the batch size. A CPU
        computes them in blocks of 64, each on one thread, so that batch size and number of threads change no bit
        (:mod:`wbdit.cell_blocks`). On a GPU this holds up to rounding, because other batch sizes use other tiles in
        matrix products. A warning is logged if no training cell has a requested label combination, or a requested
        covariate or library size is beyond those of the training cells.

        What is not requested is drawn from the training cells: covariates and library sizes from those with the cell's
        labels, and near the requested covariates, labels as well.

        Parameters
        ----------
        n
            Number of cells. Their label combinations have the proportions of the training cells, or of `like`.
        like
            Cells whose labels and covariates to copy: one synthetic cell per cell, in the same order, or `n` in the
            same proportions.
        n_per_label
            Number of cells per label, in place of `n` and `like`: ``{"NK": 200}``. With several label columns, the
            number per combination: ``{"NK/stim": 200}`` or ``{("NK", "stim"): 200}``. ``"NK/*"`` fills the open column
            in the training proportions, see :meth:`wbdit.data.labels.Labels.codes_from_counts`. Combinations without
            an open column need not occur in the training cells.
        sampler
            "ddim" with eta = 1, "ddpm", or a few-step solver: "unipc", "dpmpp", or "sde-dpmpp", which adds fresh noise.
            See :mod:`wbdit.samplers`. The default is "unipc" for models with a count likelihood, else "ddim".
        calls
            Number of model calls. For models with a count likelihood, the default is 3 with a start in closed form (4
            with covariates: one for the mean), 6 from noise and 15 for combinations of labels that no training cell
            has; else it is that of :data:`wbdit.samplers.BY_NAME`, 50 for "ddim".
        spacing
            Spacing of the calls: "uniform", "logsnr" or "sqrt" (:func:`wbdit.samplers.timesteps`). The default is
            "uniform" for models with a count likelihood, else that of :data:`wbdit.samplers.BY_NAME`.
        guidance
            Weight of classifier-free guidance, 1 for none. A dict gives a weight per label or continuous column,
            ``{"condition": 3.0}``; columns not named have weight 1. See :class:`wbdit.samplers.GuidedModel`.
        toward
            One label per column, ``{"condition": "stim"}``, to interpolate toward from each cell's own labels.
        mix
            Interpolation weight: 0 for the cell's own labels, 1 for those of `toward`. The conditioning vectors are
            interpolated. For a fixed seed each cell keeps its noise and follows a continuous path as `mix` grows.
            Covariates stay those of the cell.
        at
            Covariates: ``{"pseudotime": 0.5}`` for all cells, or a sequence of points, ``{"pseudotime": [0, 0.5, 1]}``,
            over which the cells of each label are apportioned evenly and in order. Sequences of several columns have
            equal lengths and name points jointly. With `like`, a sequence has one value per cell.
        library_size
            Library size in place of the drawn ones: expected total counts per cell over the run's genes. A dict gives
            a size per label, with keys as in `n_per_label`; other labels keep the drawn sizes.
        library_factor
            Factor of the library sizes, for all cells or per label.
        steer
            Heads along whose axes the cells are moved, and how far, in standard deviations of the noise that a cell
            starts from: ``{"block-1-head-2": 1.5}``. ``wbdit explain --ablate`` shows which genes follow, see
            :mod:`wbdit.steering`. It needs "unipc" or "dpmpp", which add no noise of their own.
        seed
            Random seed, 64 bits.
        batch_size
            Cells in memory at a time, rounded up to whole blocks of 64. The default is 256 on a GPU, and one block per
            thread on a CPU.
        progress
            Show a progress bar on stderr.

        Returns
        -------
        AnnData with the label and continuous columns in ``obs``. If the training cells held counts, ``X`` holds counts
        (CSR fp32) and ``layers["lognorm"]`` holds ln(1 + counts per 10,000). Otherwise ``X`` is in the space of the
        training cells. `toward` adds ``obs[f"{column}_toward"]`` and ``obs["mix"]``. ``uns["wbdit"]`` records versions,
        seed, sampler, model hash, a hash of the request, and the requested covariates, library sizes and heads. Its
        "unseen" lists the label combinations that no training cell has, if any.

        Raises
        ------
        InputError
            If the request does not fit this run: fewer than one cell, a number out of range, or an unknown label,
            column, sampler or spacing.

        Examples
        --------
        >>> synthetic = generator.generate(n_per_label={"Dendritic": 3, "CD19+ B": 2}, calls=5)
        >>> synthetic.shape, synthetic.X.dtype
        ((5, 765), dtype('float32'))
        >>> synthetic.obs["bulk_labels"].tolist()
        ['Dendritic', 'Dendritic', 'Dendritic', 'CD19+ B', 'CD19+ B']
        """
        plan = self._plan(
            *(n, like, n_per_label, sampler, calls, spacing, guidance, toward, mix, at, library_size, library_factor),
            *(steer, seed),
        )
        with progress_bar("generating", progress) as show:
            x = self._sample(plan, range(plan.n), batch_size, show)
        return self._cells(plan, range(plan.n), x)

    def generate_to(
        self,
        path: str | Path,
        n: int | None = None,
        *,
        chunk: int | None = None,
        resume: bool = False,
        rank: int = 0,
        ranks: int = 1,
        batch_size: int | None = None,
        progress: bool = False,
        **request: Any,
    ) -> Path:
        """Generate synthetic cells into a file, with memory for one chunk of them.

        The file has the content of ``generate(n, **request).write_h5ad(path)``. It gets its name when it is complete.
        Until then, finished chunks are kept in a folder ``.NAME.partial`` beside it. After a kill, `resume` goes on
        from them, and the file is the same byte by byte.

        Parameters
        ----------
        path
            File to write, ``.h5ad`` or ``.zarr``.
        n, batch_size, progress
            As in :meth:`generate`.
        chunk
            Cells per chunk, rounded up to whole blocks of 64. The default are as many as a dense matrix of 64 MiB
            holds, but at most 65,536. It does not change the file.
        resume
            Go on from the finished chunks of the same request, if there are any. If the file is complete, nothing is
            done.
        rank, ranks
            Generate the share of one of several processes, into ``NAME.rank0-of-3.h5ad``; :func:`wbdit.join` makes one
            file of them.
        **request
            The other arguments of :meth:`generate`, by name.

        Returns
        -------
        The path of the file.

        Raises
        ------
        InputError
            If the request does not fit this run, or the file cannot be written; with `resume`, if the finished chunks
            or the file are of another request, seed or run; without, if there are finished chunks.

        Examples
        --------
        >>> import anndata as ad
        >>> path = generator.generate_to("synthetic.h5ad", 100, calls=2, seed=1)
        >>> ad.read_h5ad(path, backed="r").shape
        (100, 765)
        """
        plan, path = self._plan(n, **request), Path(path)
        rows = streaming.share_of(plan.n, rank, ranks)
        path = streaming.part_path(path, rank, ranks)
        genes = len(self.preprocessor.genes)
        if chunk is not None and chunk < 1:
            raise InputError(f"`chunk` must be at least 1, not {chunk}")
        if ranks > 1:
            plan.facts[streaming.PART] = {"rank": rank, "ranks": ranks, "n": plan.n}

        def make(some: range, show: Show) -> ad.AnnData:
            return self._cells(plan, some, self._sample(plan, some, batch_size, show))

        kept = ("model_hash", "seed", "wbdit", "torch", "request")
        with progress_bar("generating", progress) as show:
            streaming.generate_file(
                path,
                rows,
                {name: plan.facts[name] for name in kept},
                make,
                show,
                chunk=streaming.chunk_cells(genes) if chunk is None else BLOCK * n_blocks(chunk),
                resume=resume,
            )
        return path

    def recast(
        self,
        cells: ad.AnnData,
        *,
        toward: Mapping[str, str],
        draws: int = 1,
        calls: int | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> ad.AnnData:
        """Return the same cells under other labels: in another condition, batch or of another donor.

        Each cell keeps its library size and what its labels do not explain. Recast to its own labels, it is itself. See
        :mod:`wbdit.recast`.

        Parameters
        ----------
        cells
            Counts of the run's genes and the run's label and continuous columns.
        toward
            The new label of one or more columns: ``{"condition": "stim"}``.
        draws
            Number of draws, each with its own noise.
        calls
            Number of model calls of the sampler. The default is 15.
        seed
            Random seed, 64 bits.
        progress
            Show a progress bar on stderr.

        Returns
        -------
        The cells with ``obs`` as it was, but for the columns of `toward`. ``X`` holds the counts of the first draw (CSR
        fp32), ``layers["original"]`` those before, and ``layers["lognorm"]`` ln(1 + counts per 10,000). With several
        draws, ``layers["mean"]`` and ``layers["std"]`` hold the mean and the standard deviation of the counts.

        Raises
        ------
        InputError
            If the run was not trained on counts, a label or column is unknown, or the cells lack genes or labels.

        Examples
        --------
        >>> b_cells = cells[cells.obs["bulk_labels"] == "CD19+ B"][:20].copy()
        >>> recast = generator.recast(b_cells, toward={"bulk_labels": "Dendritic"}, calls=5)
        >>> recast.shape, recast.obs["bulk_labels"].unique().tolist()
        ((20, 765), ['Dendritic'])
        """
        draws, seed = whole("draws", draws), whole("seed", seed)
        if draws < 1:
            raise InputError(f"`draws` must be at least 1, not {draws}")
        calls = RECAST_CALLS if calls is None else calls
        calls = self._resolve_sampler(COUNTS_SAMPLER, calls, COUNTS_SPACING).calls
        job = Recast.of(self.model, self.schedule, self.preprocessor, cells, toward, seed, calls)
        self._warn_of_unseen(job.new)
        with progress_bar("recasting", progress) as show:
            found = job.run(draws, show)
        made = self.preprocessor.decode(found.counts.toarray(), np.asarray(found.counts.sum(axis=1)).ravel())
        new = self.preprocessor.obs(job.new.codes).set_axis(cells.obs_names)
        made.obs = cells.obs.assign(**{column: new[column] for column in toward})
        made.layers["original"] = job.cells.rows(np.arange(len(new)))
        if found.mean is not None:
            made.layers["mean"], made.layers["std"] = found.mean, found.deviation
        made.uns["wbdit"] = {
            "wbdit": self.config.wbdit,
            "model_hash": self.config.model_hash,
            "recast_toward": dict(toward),
            **{"seed": seed, "draws": draws, "sampler": COUNTS_SAMPLER, "calls": calls},
        }
        return made

    def sample(
        self,
        codes: np.ndarray,
        seed: int,
        calls: int | None = None,
        batch_size: int | None = None,
        covariates: np.ndarray | None = None,
        show: Show = lambda share, text: None,
        rows: slice = slice(None),
    ) -> np.ndarray:
        """Sample cells as an array, without labels and gene names.

        Parameters
        ----------
        codes
            Labels ``(n, C)`` int64.
        seed, calls, batch_size
            As in :meth:`generate`.
        covariates
            Covariates ``(n, K)`` in the cells' own units; drawn from the training cells if None.
        show
            Called after each model call with the finished share of the work, from 0 to 1, and an empty text.
        rows
            The cells to sample, a range of the `n`; all by default. They are the same as among all of them.

        Returns
        -------
        Counts or values of the cells, ``(n, G)``, the input of :meth:`wbdit.data.preprocessor.Preprocessor.decode`.

        Examples
        --------
        >>> codes = generator.preprocessor.labels.training_codes(4)
        >>> counts = generator.sample(codes, seed=0, calls=5)
        >>> counts.shape, bool((counts == np.rint(counts)).all())
        ((4, 765), True)
        """
        columns = len(self.preprocessor.covariates.columns)
        at = np.full((len(codes), columns), np.nan) if covariates is None else covariates
        asked = GenerationRequest(codes, [1.0] * (codes.shape[1] + columns), at)
        sampling = self._resolve_sampler(None, calls, None, asked)
        plan = Plan(*asked.complete(self.preprocessor, self._uniform(len(codes), seed)), sampling, seed, {})
        return self._sample(plan, range(plan.n)[rows], batch_size, show)

    def save(self, run: str | Path, *, overwrite: bool = False) -> None:
        """Write a RUN folder: ``config.json``, ``model.safetensors``, ``preprocessor.*``, ``metrics.jsonl``.

        It also gets a model card, ``README.md``: data, training, intended use, limits, and how to generate; and
        ``manifest.json`` with the SHA-256 of each file, which :func:`load` verifies. If the folder holds a run, that
        one stays in ``previous/``. The folder holds either run at any moment, even if the process is killed.

        Parameters
        ----------
        run
            The folder.
        overwrite
            Whether to replace files in it that have the names of a run's files but are not of a run.

        Raises
        ------
        InputError
            If the folder cannot be written, holds such files, or is being trained into.

        Examples
        --------
        >>> from pathlib import Path
        >>> generator.save("run")
        >>> sorted(path.name for path in Path("run").iterdir())  # doctest: +NORMALIZE_WHITESPACE
        ['README.md', 'config.json', 'manifest.json', 'metrics.jsonl', 'model.safetensors', 'preprocessor.json',
         'preprocessor.safetensors']
        """
        run = Path(run)
        run_folder.check_run_folder(run, overwrite=overwrite)
        with run_folder.writing(run) as writer:
            writer.save(partial(write_generator, self), carried=[RESUME] if self._continues(run) else [])

    def _continues(self, run: Path) -> bool:
        """Return whether a run's training state belongs to this generator: the run has the same weights."""
        if not (run / RESUME).is_file():
            return False
        try:
            return checkpoint.read_config(run).model_hash == checkpoint.state_hash(dict(self.model.state_dict()))
        except InputError:
            return False

    @property
    def denoiser(self) -> Denoiser:
        """The denoising network, without the count likelihood."""
        return self.model.network

    def _resolve_sampler(
        self,
        sampler: samplers.Name | None,
        calls: int | None,
        spacing: samplers.Spacing | None,
        asked: GenerationRequest | None = None,
        deterministic: bool = False,
    ) -> Sampling:
        """Return the requested sampler, calls and spacing, with this run's defaults in place of None.

        Sampling of the cells that are `asked` for begins in closed form where that holds: combinations of labels that
        no training cell has are without a Gaussian, and guided means are of no labels.
        """
        seen = asked is None or bool((self.preprocessor.labels.combination_index(asked.codes) >= 0).all())
        plain = asked is not None and seen and all(weight == 1 for weight in asked.weights)
        options = {"seen": seen, "plain": plain, "deterministic": deterministic}
        return choose_sampling(self.model, self.schedule, sampler, calls, spacing, **options)

    def _uniform(self, n: int, seed: int) -> np.ndarray:
        """Return one uniform number per cell, ``(n,)``, with which library sizes and covariates are drawn."""
        draws = ops.normal(seed, torch.arange(n), LIBRARY_DRAW, 1)[:, 0]
        return torch.special.ndtr(draws.double()).numpy()

    def _plan(
        self,
        n: int | None = None,
        like: ad.AnnData | None = None,
        n_per_label: CellsPerLabel | None = None,
        sampler: samplers.Name | None = None,
        calls: int | None = None,
        spacing: samplers.Spacing | None = None,
        guidance: float | Mapping[str, float] = 1.0,
        toward: Mapping[str, str] | None = None,
        mix: float | None = None,
        at: Points | None = None,
        library_size: PerLabel | None = None,
        library_factor: PerLabel | None = None,
        steer: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> Plan:
        """Check the request of :meth:`generate`, and draw what it leaves open; warn of what is extrapolated."""
        asked = read_request(
            *(self.preprocessor, n, like, n_per_label, guidance, toward, mix, at, library_size, library_factor)
        )
        seed = whole("seed", seed)
        shift = self._shift(steer)
        sampling = self._resolve_sampler(sampler, calls, spacing, asked, deterministic=shift is not None)
        asked, library = asked.complete(self.preprocessor, self._uniform(len(asked.codes), seed))
        unseen = self._warn_of_unseen(asked)
        for beyond in self.preprocessor.beyond(asked.at, library):
            logger.warning(f"extrapolated beyond the training cells: {beyond}")
        facts = {
            "wbdit": self.config.wbdit,
            "torch": str(torch.__version__),
            "model_hash": self.config.model_hash,
            "seed": seed,
            **sampling._asdict(),
            "precision": "bf16" if self._low_precision else "fp32",
            "guidance": guidance_fact(guidance),
            **({} if toward is None else {"toward": dict(toward), "mix": asked.mix}),
            **request_facts(at, library_size, library_factor),
            **({"steer": doses(steer)} if steer else {}),
            **({"unseen": np.array(unseen, dtype=object)} if unseen else {}),
            **self.preprocessor.facts(),
        }
        facts["request"] = self._request_hash(asked, library, facts)
        return Plan(asked, library, sampling, seed, facts, shift)

    @cached_property
    def head_directions(self) -> steering.Directions:
        """Where each head's axis lies, and how noise is shifted along it; see :mod:`wbdit.steering`."""
        steering.check(self.model, {})
        cells = self.generate(steering.CELLS, seed=steering.SEED)
        return steering.directions(self.model, self.schedule, self.preprocessor, cells)

    def _shift(self, steer: Mapping[str, float] | None) -> np.ndarray | None:
        """Return the shift ``(G,)`` fp32 of the initial noise, or None."""
        if not steer:
            return None
        wanted = steering.check(self.model, steer)
        moves = [dose * self.head_directions.shifts[head] for head, dose in wanted.items()]
        return np.asarray(np.sum(moves, axis=0), np.float32)

    def with_model(self, model: Denoiser | CountDenoiser) -> CellGenerator:
        """Return the same generator with another model of the same shape.

        Examples
        --------
        >>> import copy
        >>> other = generator.with_model(copy.deepcopy(generator.model))
        >>> bool((other.generate(3, calls=2).X != generator.generate(3, calls=2).X).nnz)
        False
        """
        return CellGenerator(model, self.schedule, self.preprocessor, self.config, self.history)

    def _warn_of_unseen(self, asked: GenerationRequest) -> list[str]:
        """Return the label combinations that no training cell has, and warn of them."""
        cells = asked.training_cells(self.preprocessor.labels)
        unseen = [name for name, n in cells.items() if n == 0]
        facts = self.config.foretold or ForetoldFacts()
        told = [sentence for name in unseen if (sentence := facts.describe(name)) is not None]
        for sentence in told[:MOST_SENTENCES]:
            logger.warning(sentence)
        if len(told) > MOST_SENTENCES:
            logger.warning(f"{len(told) - MOST_SENTENCES} more combinations are foretold, see config.foretold")
        rest = [name for name in unseen if name not in facts.nearest]
        if rest:
            logger.warning(
                f"no training cell has the labels {', '.join(rest)}: these cells are extrapolated from other "
                "label combinations"
            )
        few = [f"{name} ({n})" for name, n in cells.items() if n and name in facts.nearest]
        if few:
            more = f" and {len(few) - MOST_NAMES} more" * (len(few) > MOST_NAMES)
            logger.warning(
                f"few training cells have the labels {', '.join(few[:MOST_NAMES])}{more}: they are foretold in part "
                "from other combinations"
            )
        return unseen

    def _request_hash(self, asked: GenerationRequest, library: np.ndarray, facts: dict[str, Any]) -> str:
        """Return the SHA-256 of all that the cells depend on, except the weights, which have a hash of their own."""
        known = self.preprocessor
        arrays = [asked.codes, asked.at, asked.toward, library, known.center, known.smallest]
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(b"none" if array is None else f"{array.shape}{array.dtype}".encode() + array.tobytes())
        plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in facts.items()}
        rest = [plain, list(map(float, asked.weights)), float(known.scale), self._device.type]
        digest.update(json.dumps(rest, sort_keys=True, default=lambda array: array.tolist()).encode())
        return digest.hexdigest()

    def _cells(self, plan: Plan, rows: range, x: np.ndarray) -> ad.AnnData:
        """Return the cells with indices `rows`, given their part of the result of :meth:`_sample`."""
        some, asked = slice(rows.start, rows.stop), plan.asked
        cells = self.preprocessor.decode(x, plan.library[some])
        toward = None if asked.toward is None else asked.toward[some]
        obs = self.preprocessor.obs(asked.codes[some], toward, asked.mix, asked.at[some])
        cells.obs = obs.set_axis([f"synthetic-{i}" for i in rows])
        cells.uns |= self.preprocessor.annotations.uns()
        cells.uns["wbdit"] = plan.facts
        return cells

    @property
    def _low_precision(self) -> bool:
        """Whether matrix products of sampling run in bf16: on a GPU, and where counts are drawn on a fast processor.

        Rounding changes a few counts in a thousand, to other draws from nearly the same distributions. Values that are
        not drawn would be rounded themselves.
        """
        return cpu.prefers_bf16(self._device) and (self.model.stop > 0 or self._device.type == "cuda")

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _sample(self, plan: Plan, rows: range, batch_size: int | None, show: Show) -> np.ndarray:
        """Sample the cells with indices `rows`, from the first of a block, and return the input of `decode`."""
        if batch_size is not None and whole("batch_size", batch_size) < 1:
            raise InputError(f"`batch_size` must be at least 1, not {batch_size}")
        path = plan.sampling.timesteps(self.schedule, self.model.stop)
        gaussians = self._gaussians(plan, path)
        on_cpu = self._device.type == "cpu"
        size = BLOCK if on_cpu else BLOCK * n_blocks(batch_size or GPU_BATCH)
        starts, calls, lock = range(rows.start, rows.stop, size), count(1), threading.Lock()
        graph = CUDAGraphModel(self.model, embeds_once=on_cpu)

        def batch(start: int, check: Callable[[], None]) -> np.ndarray:
            def update(*step: object) -> None:
                check()
                with lock:
                    show(next(calls) / (len(starts) * plan.sampling.calls), "")

            own = np.arange(start, min(start + size, rows.stop))
            batch_rows = whole_block(own) if on_cpu else own
            return self._sample_batch(graph, batch_rows, plan, path, gaussians, update)[: len(own)]

        if not on_cpu:
            return np.concatenate([batch(start, lambda: None) for start in starts])
        self.model.eval()  # clears what was computed from the weights on several threads
        at_once = torch.get_num_threads() if batch_size is None else n_blocks(batch_size)
        return np.concatenate(run_tasks(batch, starts, min(at_once, torch.get_num_threads(), len(starts))))

    def _gaussians(self, plan: Plan, path: list[float]) -> NoisedGaussians | None:
        """Return the Gaussians where the path begins; None if sampling starts from pure noise."""
        if not plan.sampling.start or not isinstance(self.model, CountDenoiser) or self.model.gaussians is None:
            return None
        return self.model.gaussians.at(*self.schedule.levels(path[0]))

    @torch.no_grad()
    def _sample_batch(
        self,
        graph: CUDAGraphModel,
        rows: np.ndarray,
        plan: Plan,
        path: list[float],
        gaussians: NoisedGaussians | None,
        update: Callable[..., object],
    ) -> np.ndarray:
        """Sample one batch, the cells with indices `rows`, ``(B, G)``; `path` ends with the final timestep."""
        device, genes = self._device, len(self.preprocessor.genes)
        places = torch.from_numpy(rows).to(device)
        shift = 0 if plan.shift is None else torch.from_numpy(plan.shift).to(device)
        noise = samplers.PhiloxNoise(plan.seed, places, (1, genes))
        log_library = torch.from_numpy(np.log(np.maximum(plan.library[rows], 1))).to(device, torch.float32)
        fixed = self.model.fix_library(graph, log_library)
        model: Any = plan.asked.model(fixed, rows, device, self.preprocessor.covariates)

        def uniform() -> torch.Tensor:
            return torch.special.ndtr(ops.normal(plan.seed, places, COUNT_DRAW, genes)).float()

        with sampling_precision(device, self._low_precision):
            x, times = noise(-1) + shift, path[:-1]
            if gaussians is None:
                x = self.model.start(x)
            else:
                assert isinstance(self.model, CountDenoiser)
                of_labels = gaussians.rows(torch.from_numpy(plan.asked.codes[rows]).to(device))
                if plan.sampling.calls_for_mean:
                    mean = model(x, torch.full((1,), self.schedule.noise_steps - 1, device=device).expand(len(x)))
                    update()
                else:
                    mean = self.model.mean_at_noise(x, of_labels, log_library, model.conditioning)
                near = gaussians.near(of_labels, log_library, ops.normal(plan.seed, places, PLACE_DRAW, 1)[:, 0])
                x = gaussians.state(mean[:, 0], x[:, 0], of_labels, near)[:, None]
            if times:
                sample = samplers.BY_NAME[plan.sampling.sampler].sample
                options = {"stop": path[-1], "clamp_min": None, "noise": noise, "callback": update}
                x = sample(model, x, self.schedule, times, **options)
            if device.type == "cpu" and not bool(torch.isfinite(x).all()):  # the host would wait for a GPU
                raise InputError("the model's values are not finite: its weights are damaged, use another run")
            return self.model.finish(x, model, uniform, log_library.exp()).cpu().numpy()


def load(run: str | Path, *, device: str = "auto") -> CellGenerator:
    """Load the generator of a RUN folder. Nothing is written, and the run may be in training.

    Parameters
    ----------
    run
        Folder written by ``wbdit train``, :func:`fit` or :meth:`CellGenerator.save`. If its newest save is damaged, the
        one before is loaded, with a warning.
    device
        "auto", "cpu", "cuda", or "cuda:1" for the second GPU.

    Raises
    ------
    InputError
        If a file is missing, damaged, a pickle, or from a newer version of wbdit, and there is no earlier save.

    Examples
    --------
    >>> generator.save("run")
    >>> loaded = wbdit.load("run", device="cpu")
    >>> loaded.config.model_hash == generator.config.model_hash
    True
    """
    where = find_device(device)
    return run_folder.read_newest(Path(run), run_folder.NEEDED, lambda save: read_generator(save, where))


def write_generator(generator: CellGenerator, folder: Path) -> None:
    """Write the files of a generator into a folder, one after the other."""
    state = dict(generator.model.state_dict())
    config = replace(generator.config, model_hash=checkpoint.state_hash(state))
    checkpoint.write_preprocessor(folder, generator.preprocessor)
    checkpoint.write_history(folder, generator.history)
    checkpoint.write_tensors(folder / MODEL, state)
    (folder / card.CARD).write_text(card.markdown(config, generator.preprocessor), encoding="utf-8")
    checkpoint.write_json(folder / CONFIG, config.to_dict())


def read_generator(folder: Path, device: torch.device) -> CellGenerator:
    """Read the generator from the files in a folder, which are those of one save.

    Raises
    ------
    InputError
        If a file is missing, damaged, a pickle, or from a newer version of wbdit, or they do not fit each other.
    """
    config = checkpoint.read_config(folder)
    preprocessor = checkpoint.read_preprocessor(folder)
    state = read_weights(folder / MODEL, config, preprocessor, make_model)
    if config.model_hash and config.model_hash != checkpoint.state_hash(state):
        raise InputError(
            f"{folder / MODEL} and {folder / CONFIG} do not fit each other (the weights have another hash): are both "
            "from the same run?"
        )
    model, schedule = make_model(config), NoiseSchedule(**config.schedule)
    model.load_state_dict(state, strict=True)
    return CellGenerator(model.to(device), schedule, preprocessor, config, checkpoint.read_history(folder))


def make_model(config: RunConfig) -> Denoiser | CountDenoiser:
    """Build a run's model with initial weights from its seed; the global CPU random state stays unchanged."""
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        facts = config.likelihood
        n_outputs = 2 if facts is not None and facts.learned_dispersion else 1
        denoiser = DENOISERS[config.denoiser](**config.model, n_outputs=n_outputs)
        if facts is None:
            return denoiser
        schedule = NoiseSchedule(**config.schedule)
        likelihood = CountLikelihood(denoiser.input_size, facts.n_bins, schedule.noise_steps)
        rows = facts.combinations, facts.gaussians, facts.places
        return CountDenoiser(
            *(denoiser, likelihood, schedule, facts.input_dropout, facts.stop, *rows),
            noise_table=facts.noise_table,
            rate_prior=facts.rate_prior,
        )


def sampling_precision(device: torch.device, low: bool = True) -> torch.autocast:
    """Return the autocast context for sampling with bf16 matrix products, or without any."""
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


def find_device(name: str) -> torch.device:
    """Return the device of a name; "auto" selects the GPU if there is one.

    Raises
    ------
    InputError
        If the name is unknown or the device is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown `device` {name!r}: choose auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"wbdit does not run on `device` {name!r}: choose auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError('no CUDA device is available: choose `device="cpu"` or "auto"')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise InputError(f"there is no `device` {name!r}: the CUDA devices are numbered from cuda:0 to cuda:{last}")
    return device
