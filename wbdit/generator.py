"""Train on cells, generate cells: what people with an AnnData use."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import torch
from tqdm import tqdm

from wbdit import checkpoint, ops, samplers
from wbdit.cells import check_labels
from wbdit.checkpoint import CONFIG, METRICS, MODEL
from wbdit.dit import DiT
from wbdit.errors import InputError
from wbdit.graphs import Graphed
from wbdit.model import Denoiser, WBDiT
from wbdit.recipe import Recipe, apportion
from wbdit.schedule import NoiseSchedule

Sampler = Literal["ddim", "ddpm"]
DENOISERS: dict[str, type[Denoiser]] = {"wbdit": WBDiT, "dit": DiT}
SAMPLERS: tuple[Sampler, ...] = ("ddim", "ddpm")
CALIBRATION_SEED = 2**62  # of no cells that anyone is likely to ask for
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
        self, model: Denoiser, schedule: NoiseSchedule, recipe: Recipe, config: dict[str, Any], history: list[dict]
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
        x = self._sample(codes, sampler, steps, guidance, seed, batch_size, "generating" if progress else None)
        draws = ops.normal(seed, torch.arange(len(codes)), LIBRARY_DRAW, 1)[:, 0]
        cells = self.recipe.decode(x, codes, torch.special.ndtr(draws.double()).numpy())
        cells.uns["wbdit"] = {
            "wbdit": self.config["wbdit"],
            "torch": str(torch.__version__),
            "model_hash": self.config["model_hash"],
            "seed": seed,
            "sampler": sampler,
            "steps": steps,
            "guidance": float(guidance),
            **self.recipe.facts(),
        }
        return cells

    def calibrate(self, n: int = 1000, *, progress: bool = False) -> None:
        """Set the recipe's count thresholds by cells generated for the purpose; :func:`fit` does it.

        Parameters
        ----------
        n
            Cells to generate, composed of labels as the training cells were.
        progress
            Show a progress bar on stderr.
        """
        if self.recipe.needs_calibration:
            codes = self.recipe.composition(n)
            x = self._sample(codes, "ddim", 50, 1.0, CALIBRATION_SEED, 256, "calibrating" if progress else None)
            self.recipe = self.recipe.calibrated(x)

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
        if like is not None and like.n_obs == 0:
            raise InputError("there are no cells to imitate")
        if n is None:
            if like is None:
                raise InputError("say how many cells: give n, like or counts")
            n = like.n_obs
        elif n < 1:
            raise InputError(f"at least one cell must be asked for, not {n}")
        if like is None or self.recipe.label is None:
            return self.recipe.composition(n)
        check_labels(like, self.recipe.label)
        codes = self.recipe.codes(like.obs[self.recipe.label].astype(str))
        return codes if n == like.n_obs else apportion(np.bincount(codes), n)

    def _sample(
        self,
        codes: np.ndarray,
        sampler: Sampler,
        steps: int,
        guidance: float,
        seed: int,
        batch_size: int,
        shown: str | None,
    ) -> np.ndarray:
        """Sample cells as the model gives them, ``(cells, G)``, batch by batch under a progress bar named `shown`."""
        starts, denoiser = range(0, len(codes), batch_size), Graphed(self.model)
        layout = "{desc} {percentage:3.0f}% |{bar:24}| {elapsed}<{remaining}"
        with tqdm(total=len(starts) * steps, desc=shown, bar_format=layout, disable=shown is None) as bar:
            parts = [
                self._sample_batch(
                    denoiser,
                    np.arange(start, min(start + batch_size, len(codes))),
                    codes[start : start + batch_size],
                    sampler,
                    steps,
                    guidance,
                    seed,
                    lambda *step: bar.update(),
                )
                for start in starts
            ]
        return np.concatenate(parts)

    def _sample_batch(
        self,
        denoiser: Graphed,
        rows: np.ndarray,
        codes: np.ndarray,
        sampler: Sampler,
        steps: int,
        guidance: float,
        seed: int,
        update: Callable[..., object],
    ) -> np.ndarray:
        """Sample the cells with the indices `rows`, ``(B, G)``."""
        device = next(self.model.parameters()).device
        noise = samplers.PhiloxNoise(seed, torch.from_numpy(rows).to(device), (1, len(self.recipe.genes)))
        model: samplers.Model = denoiser
        if self.recipe.categories:
            model = samplers.Guided(denoiser, torch.from_numpy(codes).to(device), guidance)
        walk = {"ddim": samplers.ddim, "ddpm": samplers.ddpm}[sampler]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
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
        model, schedule = make_model(config), NoiseSchedule(**config["schedule"])
        model.load_state_dict(state, strict=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{run / MODEL} and {run / CONFIG} do not fit each other ({reason})") from error
    history = []
    if (run / METRICS).exists():
        history = [json.loads(line) for line in (run / METRICS).read_text().splitlines() if line.strip()]
    return CellGenerator(model.to(find_device(device)), schedule, recipe, config, history)


def make_model(config: dict[str, Any]) -> Denoiser:
    """Make a run's model with its seed's weights, leaving the user's own random numbers alone."""
    with torch.random.fork_rng([]):
        torch.manual_seed(config["seed"])
        return DENOISERS[config.get("denoiser", "wbdit")](**config["model"])  # early runs do not name theirs


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
