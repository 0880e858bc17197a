"""Train on cells, generate cells: what people with an AnnData use."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import torch
from tqdm import tqdm

from wbdit import checkpoint, ops, samplers
from wbdit.checkpoint import CONFIG, METRICS, MODEL
from wbdit.counts.denoiser import CountDenoiser
from wbdit.counts.likelihood import CountLikelihood
from wbdit.data.preprocessor import Preprocessor
from wbdit.errors import InputError
from wbdit.nn.cuda_graph import CUDAGraphModel
from wbdit.nn.denoiser import Denoiser
from wbdit.nn.dit import DiT
from wbdit.nn.wbdit import WBDiT
from wbdit.request import CellsPerLabel, GenerationRequest, guidance_fact, read_request
from wbdit.run_config import RunConfig
from wbdit.samplers.noise import COUNT_DRAW, LIBRARY_DRAW
from wbdit.schedule import NoiseSchedule

logger = logging.getLogger("wbdit")

DENOISERS: dict[str, type[Denoiser]] = {"wbdit": WBDiT, "dit": DiT}

# where counts are drawn on the way: more than 15 calls, or calls closer together toward its end, gain nothing, and a
# solver of second order is as good with them as the first order is with 100 (docs/study.md)
COUNTS_SAMPLER: samplers.Name = "unipc"
COUNTS_CALLS = 15
COUNTS_SPACING: samplers.Spacing = "uniform"


class Sampling(NamedTuple):
    """A sampler, its number of calls of the model, and their spacing."""

    sampler: samplers.Name
    calls: int
    spacing: samplers.Spacing


class CellGenerator:
    """A trained denoiser with all that turns its output into cells.

    Made by :func:`fit` or :func:`load`.

    Attributes
    ----------
    model
        The denoiser, in evaluation mode.
    schedule
        Its noise schedule.
    preprocessor
        Genes, labels and values.
    config
        What ``config.json`` holds.
    history
        One record for each line of ``metrics.jsonl``.
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
        seed: int = 0,
        batch_size: int = 256,
        progress: bool = False,
    ) -> ad.AnnData:
        """Generate synthetic cells; logs which combinations of labels are asked for that no training cell had.

        The cells depend on the seed, their place in the result and their labels, not on the batch size; on a GPU up to
        rounding, because products take other block sizes for other batches.

        Parameters
        ----------
        n
            Number of cells, their combinations of labels composed as the training cells' were, or as those of `like`.
        like
            Cells to imitate the labels of: one synthetic cell for each of them, in their order, or `n` in their
            proportions.
        n_per_label
            Number of cells of each label, in place of `n` and `like`: ``{"NK": 200}``; with several label columns of
            each combination, ``{"NK/stim": 200}`` or ``{("NK", "stim"): 200}``. ``"NK/*"`` leaves a column open, see
            :meth:`wbdit.data.labels.Labels.codes_from_counts`. Combinations that no training cell had are tried all the
            same.
        sampler
            "ddim" with eta = 1, "ddpm", or a solver for few steps: "unipc", "dpmpp" or, with fresh noise, "sde-dpmpp";
            see :mod:`wbdit.samplers`. By default "unipc" where counts are drawn from a likelihood, else "ddim".
        calls
            Calls of the model. By default 15 where counts are drawn from a likelihood, else those of
            :data:`wbdit.samplers.BY_NAME`, 50 for "ddim".
        spacing
            Spacing of the calls: "uniform", "logsnr" or "sqrt" (:func:`wbdit.samplers.timesteps`). By default "uniform"
            where counts are drawn from a likelihood, else from that table.
        guidance
            Weight of classifier-free guidance, 1 for none; or a weight by label column, ``{"condition": 3.0}``, 1 for
            those not named. See :class:`wbdit.samplers.GuidedModel`.
        toward
            Label by column, ``{"condition": "stim"}``, that the cells lie toward from their own.
        mix
            How far they do: 0 for their own labels, 1 for those of `toward`. The conditioning vectors are mixed, and
            each cell keeps its noise, so that with one seed a cell moves along a continuous path.
        seed
            64 bits.
        batch_size
            Cells at a time.
        progress
            Show a progress bar on stderr.

        Returns
        -------
        AnnData with ``X`` = counts (CSR fp32) and ``layers["lognorm"]`` (ln(1 + counts per 10,000)) where the training
        cells held counts, else ``X`` in their own space; the label columns in ``obs``, with `toward` also
        ``obs[f"{column}_toward"]`` and ``obs["mix"]``; ``uns["wbdit"]`` with versions, seed, sampler, model hash, and
        under "unseen" the combinations of labels that no training cell had, if any.

        Raises
        ------
        InputError
            If the request makes no sense for this run: no or too few cells, unknown labels, sampler or spacing.
        """
        asked = read_request(self.preprocessor.labels, n, like, n_per_label, guidance, toward, mix)
        if batch_size < 1:
            raise InputError(f"the batch size must be at least 1, not {batch_size}")
        sampling = self._resolve_sampler(sampler, calls, spacing)
        unseen = asked.unseen(self.preprocessor.labels)
        if unseen:
            logger.warning(
                f"no training cell was {', '.join(unseen)}: these cells are put together from what labels do elsewhere"
            )
        library = self._library(asked, seed)
        x = self._sample(asked, library, sampling, seed, batch_size, progress)
        cells = self.preprocessor.decode(x, library)
        cells.obs = self.preprocessor.obs(asked.codes, asked.toward, asked.mix)
        cells.uns["wbdit"] = {
            "wbdit": self.config.wbdit,
            "torch": str(torch.__version__),
            "model_hash": self.config.model_hash,
            "seed": seed,
            **sampling._asdict(),
            "guidance": guidance_fact(guidance),
            **({} if toward is None else {"toward": dict(toward), "mix": asked.mix}),
            **({"unseen": np.array(unseen, dtype=object)} if unseen else {}),
            **self.preprocessor.facts(),
        }
        return cells

    def sample(self, codes: np.ndarray, seed: int, calls: int | None = None, batch_size: int = 256) -> np.ndarray:
        """Sample cells as numbers.

        Parameters
        ----------
        codes
            Labels ``(n, C)`` int64.
        seed, calls, batch_size
            As in :meth:`generate`.

        Returns
        -------
        What :meth:`wbdit.data.preprocessor.Preprocessor.decode` takes, ``(n, G)``: counts, or values.
        """
        asked = GenerationRequest(codes, [1.0] * codes.shape[1])
        sampling = self._resolve_sampler(None, calls, None)
        return self._sample(asked, self._library(asked, seed), sampling, seed, batch_size, False)

    def save(self, run: str | Path) -> None:
        """Write a RUN folder: ``config.json``, ``model.safetensors``, ``preprocessor.*``, ``metrics.jsonl``.

        Raises
        ------
        InputError
            If it cannot be written.
        """
        run = Path(run)
        checkpoint.write_preprocessor(run, self.preprocessor)
        lines = "".join(json.dumps(record) + "\n" for record in self.history)
        checkpoint.write_atomically(run / METRICS, lines.encode())
        checkpoint.write_tensors(run / MODEL, dict(self.model.state_dict()))
        checkpoint.write_json(run / CONFIG, self.config.to_dict())

    @property
    def denoiser(self) -> Denoiser:
        """The network itself, without the likelihood that makes counts of its answers."""
        return self.model.network

    def _resolve_sampler(
        self, sampler: samplers.Name | None, calls: int | None, spacing: samplers.Spacing | None
    ) -> Sampling:
        """Return what is asked for, with the defaults of this run in place of None."""
        of_counts = self.model.stop > 0
        sampler = sampler or (COUNTS_SAMPLER if of_counts else "ddim")
        if sampler not in samplers.BY_NAME:
            raise InputError(f"no sampler {sampler!r}: choose one of {', '.join(samplers.BY_NAME)}")
        default = samplers.BY_NAME[sampler]
        spacing = spacing or (COUNTS_SPACING if of_counts else default.spacing)
        if spacing not in samplers.SPACINGS:
            raise InputError(f"no spacing {spacing!r}: choose one of {', '.join(samplers.SPACINGS)}")
        longest = self.schedule.noise_steps - 1
        if calls is None:
            calls = COUNTS_CALLS if of_counts else default.calls or longest
        if not 1 <= calls <= longest:
            raise InputError(f"calls must be between 1 and {longest}, not {calls}")
        return Sampling(sampler, calls, spacing)

    def _library(self, asked: GenerationRequest, seed: int) -> np.ndarray:
        """Draw the library size of each cell."""
        draws = ops.normal(seed, torch.arange(len(asked.codes)), LIBRARY_DRAW, 1)[:, 0]
        u = torch.special.ndtr(draws.double()).numpy()
        return self.preprocessor.draw_library(asked.codes, u, asked.toward, asked.mix)

    def _sample(
        self,
        asked: GenerationRequest,
        library: np.ndarray,
        sampling: Sampling,
        seed: int,
        batch_size: int,
        progress: bool,
    ) -> np.ndarray:
        """Sample what :meth:`Preprocessor.decode` takes, ``(cells, G)``."""
        path = samplers.timesteps(self.schedule, sampling.calls, sampling.spacing, stop=self.model.stop)
        n, graph = len(asked.codes), CUDAGraphModel(self.model)
        starts = range(0, n, batch_size)
        layout = "{desc} {percentage:3.0f}% |{bar:24}| {elapsed}<{remaining}"
        total = len(starts) * len(path)
        with tqdm(total=total, desc="generating", bar_format=layout, disable=not progress) as bar:

            def batch(start: int) -> np.ndarray:
                rows = np.arange(start, min(start + batch_size, n))
                return self._sample_batch(
                    graph, rows, asked, library[rows], sampling.sampler, path, seed, lambda *step: bar.update()
                )

            return np.concatenate([batch(start) for start in starts])

    @torch.no_grad()
    def _sample_batch(
        self,
        graph: CUDAGraphModel,
        rows: np.ndarray,
        asked: GenerationRequest,
        library: np.ndarray,
        sampler: samplers.Name,
        path: list[float],
        seed: int,
        update: Callable[..., object],
    ) -> np.ndarray:
        """Sample the cells with the indices `rows`, ``(B, G)``."""
        device = next(self.model.parameters()).device
        places = torch.from_numpy(rows).to(device)
        noise = samplers.PhiloxNoise(seed, places, (1, len(self.preprocessor.genes)))
        log_library = torch.from_numpy(np.log(np.maximum(library, 1))).to(device, torch.float32)
        model: Any = asked.model(self.model.fix_library(graph, log_library), rows, device)

        def uniform() -> torch.Tensor:
            return torch.special.ndtr(ops.normal(seed, places, COUNT_DRAW, len(self.preprocessor.genes))).float()

        with sampling_precision(device):
            x = samplers.BY_NAME[sampler].sample(
                model,
                self.model.start(noise(-1)),
                self.schedule,
                path,
                stop=self.model.stop,
                clamp_min=None,
                noise=noise,
                callback=update,
            )
            return self.model.finish(x, model, uniform, log_library.exp()).cpu().numpy()


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
    preprocessor = checkpoint.read_preprocessor(run)
    state = checkpoint.read_tensors(run / MODEL)
    try:
        model, schedule = make_model(config), NoiseSchedule(**config.schedule)
        model.load_state_dict(state, strict=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{run / MODEL} and {run / CONFIG} do not fit each other ({reason})") from error
    history = []
    if (run / METRICS).exists():
        history = [json.loads(line) for line in (run / METRICS).read_text().splitlines() if line.strip()]
    return CellGenerator(model.to(find_device(device)), schedule, preprocessor, config, history)


def make_model(config: RunConfig) -> Denoiser | CountDenoiser:
    """Make a run's model with its seed's weights, leaving the user's own random numbers alone."""
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        facts = config.likelihood
        n_outputs = 2 if facts is not None and facts.learned_dispersion else 1
        denoiser = DENOISERS[config.denoiser](**config.model, n_outputs=n_outputs)
        if facts is None:
            return denoiser
        schedule = NoiseSchedule(**config.schedule)
        likelihood = CountLikelihood(denoiser.input_size, facts.n_bins, schedule.noise_steps)
        return CountDenoiser(denoiser, likelihood, schedule, facts.input_dropout, facts.stop)


def sampling_precision(device: torch.device) -> torch.autocast:
    """Return the context that a denoiser is sampled in: bf16 products on a GPU, the model's own type elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def find_device(name: str) -> torch.device:
    """Return the device of a name; "auto" takes a GPU where there is one.

    Raises
    ------
    InputError
        If there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"no device {name!r}: choose auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is available here: choose --device cpu or auto")
    return device
