"""Initial noise that gives generated cells the spread of real cells.

Deterministic samplers under-disperse: cells of one label come out with too little variance. An imperfect denoiser
predicts only part of the variation within a label, and a solver without fresh noise does not restore the rest. If
everything were Gaussian, a cell's coordinate on a principal component would be its initial noise times a factor. We
therefore scale the initial noise along the leading principal components. Karras et al. (2022, arXiv 2206.00364,
section 4) scale their sampler's fresh noise for the same reason, by one tuned number; here directions and factors are
measured.

Spread is the distance between the 16th and 84th percentiles of log counts within labels, after regression on the
library size and on the trends of the covariates. Percentiles ignore a few outliers, which have other causes. The
directions come from one half of the training cells and the spread from the other half, because principal components
overfit the cells that they come from. At most :data:`wbdit.data.components.MOST_CELLS` random cells of each half are
used.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wbdit._progress import Show, progress_bar
from wbdit.cell_blocks import BLOCK
from wbdit.counts.denoiser import CountDenoiser
from wbdit.counts.trend import spline_basis
from wbdit.data.components import MOST_CELLS, MOST_VALUES, Residuals, read_some
from wbdit.data.normalize import transformed_rows
from wbdit.data.sources import TrainingData
from wbdit.generator import CellGenerator
from wbdit.sampling import CALLS_FROM_NOISE
from wbdit.training.distributed import current

CELLS = 768  # generated per round; their spread then has an error of about 3%
ROUNDS = 2  # the first under-corrects: initial noise does not scale the counts' own noise
FEWEST = 100  # cells per half; with fewer, the directions are mostly sampling error
FEWEST_OF_LABEL = 10
BYTES = 12  # of a nonzero value and its column
NARROWEST, WIDEST = 0.8, 2.0  # safety clamp of the factors
SEED = 0x5370726561640000  # of the cells generated here; far from the seeds that users choose

Array = np.ndarray[Any, Any]


def calibrate_noise(generator: CellGenerator, data: TrainingData, progress: bool = False) -> dict[str, Tensor]:
    """Scale the initial noise of a generator so that its cells have the spread of the training cells.

    Parameters
    ----------
    generator
        Generator with a trained model; the model's `noise_axes` and `noise_factors` are set in place.
    data
        Training cells.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    The two buffers by name, as in the model's state dict. With fewer than 200 usable cells the noise is not scaled. A
    model without a count likelihood gives an empty dict.
    """
    model = generator.model
    if not isinstance(model, CountDenoiser):
        return {}
    noise = {"noise_axes": model.noise_axes, "noise_factors": model.noise_factors}
    model.noise_axes.zero_()
    model.noise_factors.fill_(1)
    if model.gaussians is not None:
        model.gaussians.timestep.zero_()  # cells start from the noise that is calibrated
    order = np.random.default_rng(generator.config.seed).permutation(len(data))
    one, other = (within_labels(data.take(half[:MOST_CELLS])) for half in np.array_split(order, 2))
    k, genes = len(model.noise_factors), data.cells.shape[1]
    if min(len(one), len(other)) < FEWEST or k >= genes:
        return noise
    axes = one.components(k).axes
    model.noise_axes[: len(axes)] = torch.from_numpy(axes)
    wanted = _width(other @ axes.T)
    with progress_bar("calibrating", progress) as show:
        for turn in range(ROUNDS):
            like = data.take(np.resize(np.roll(order, -turn * CELLS), CELLS))
            counts = sample(generator, like.codes, SEED + turn, part_of(show, turn, ROUNDS), like.covariates)
            made = within_labels(like.with_counts(counts))
            ratios = torch.from_numpy(wanted / _width(made @ axes.T)).to(model.noise_factors)
            model.noise_factors[: len(axes)].mul_(ratios).clamp_(NARROWEST, WIDEST)
            current().copy_first([model.noise_axes, model.noise_factors])
    return noise


def sample(
    generator: CellGenerator, codes: Array, seed: int, show: Show, covariates: Array | None = None
) -> np.ndarray:
    """Sample the counts ``(n, G)`` of cells with labels ``(n, C)``; each process samples a share, in whole blocks."""
    ranks, n = current(), len(codes)
    options: dict[str, Any] = {"show": show, "covariates": covariates, "calls": CALLS_FROM_NOISE}
    if ranks.size == 1:
        return generator.sample(codes, seed, **options)
    rows, own = ranks.part(n, BLOCK), np.zeros((0, len(generator.preprocessor.genes)), np.int32)
    if rows.start < rows.stop:
        own = generator.sample(codes, seed, rows=rows, **options)
    return ranks.gather(torch.from_numpy(own), n, BLOCK).numpy()


def calibration_seconds(generator: CellGenerator, data: TrainingData, more: int = 0) -> float:
    """Estimate the duration of :func:`calibrate_noise`, and of generating `more` cells, by generating a few cells.

    These are one block per thread, as many as the calibration computes at a time, so that the process takes as much
    memory as the calibration.
    """
    cells = more + (ROUNDS * CELLS if len(data) >= 2 * FEWEST else 0)
    if not isinstance(generator.model, CountDenoiser) or cells == 0:
        return 0.0
    few = data.take(np.resize(np.arange(len(data)), min(CELLS, BLOCK * torch.get_num_threads())))
    generator.sample(few.codes, seed=0, calls=1, covariates=few.covariates)  # the first call may compile kernels
    start = time.monotonic()
    generator.sample(few.codes, seed=0, covariates=few.covariates)
    return math.ceil(cells / len(few)) * (time.monotonic() - start) / current().size


def calibration_bytes(data: TrainingData) -> int:
    """Return the memory of :func:`calibrate_noise` beyond that of sampling: the sparse values of its cells, twice."""
    few = data.cells.rows(np.arange(min(len(data), BLOCK)))
    values = min(len(data), 2 * MOST_CELLS) * few.nnz // few.shape[0]
    return 2 * BYTES * min(values, 2 * MOST_VALUES)


def within_labels(data: TrainingData) -> Residuals:
    """Return the residuals of the cells' values after regression on labels, library size and covariates.

    Each combination of labels has its own linear fit on the logarithm of the library size and on the spline bases of
    the covariates. Combinations with fewer than :data:`FEWEST_OF_LABEL` cells are left out. The values are not divided
    by their scale.

    Parameters
    ----------
    data
        Training cells in random order. The first ones are used, see :func:`wbdit.data.components.read_some`.
    """
    X, read = read_some(data.cells, np.arange(len(data)))
    known = np.stack([np.ones(len(data)), data.log_library, *_trends(data)], axis=1)[read]
    combination = data.preprocessor.labels.combination_index(data.codes[read])
    groups = [np.flatnonzero(combination == label) for label in np.unique(combination)]
    groups = [group for group in groups if len(group) >= FEWEST_OF_LABEL]
    return Residuals(transformed_rows(X, data.preprocessor.values), known, groups, corrected=True)


def _trends(data: TrainingData) -> Array:
    """Return the spline basis of each covariate without its constant, ``(functions, cells)`` fp32."""
    scaled = data.scaled_covariates
    bases = [] if scaled is None else [spline_basis(x)[:, 1:].T for x in scaled.T.astype(np.float64)]
    return np.concatenate([np.empty((0, len(data)), np.float32), *bases]).astype(np.float32)


def part_of(show: Show, turn: int, turns: int) -> Show:
    """Return a function that shows the progress of one round as a part of all rounds."""
    return lambda share, text: show((turn + share) / turns, text)


def _width(places: Array) -> Array:
    low, high = np.percentile(places, [16, 84], axis=0)
    return np.maximum(high - low, 1e-6)
