"""Starting noise that lets generated cells spread as far as real ones.

A denoiser that is right on average but does not see all there is to be seen leaves the cells of a label too close
together: what it cannot foresee in the noise, a solver without fresh noise does not bring back. Were all Gaussian, a
cell's place along a principal component would be its starting noise times a factor, so noise that is wider along it is
the remedy. Karras et al. (2022, arXiv 2206.00364, section 4) widen their sampler's fresh noise for the same reason, by
one number that is tuned; here directions and factors are measured.

Spread is that of log counts within labels, without what follows from library sizes, between the 16th and the 84th
percentile: a few cells far off, which have other causes, do not count. Directions come from one half of the training
cells and spread from the other, since components fit best the cells that they are of.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from wbdit.counts.denoiser import CountDenoiser
from wbdit.data.normalize import log_library_sizes
from wbdit.data.sources import TrainingData

if TYPE_CHECKING:
    from wbdit.generator import CellGenerator

CELLS = 768  # generated in each round; their spread is then known to three in a hundred
ROUNDS = 2  # counts' own noise takes part in the spread and no starting noise moves it: the second round adds the rest
PROBE = 64  # cells
FEWEST = 100  # cells in a half; with fewer the directions are chance
FEWEST_OF_LABEL = 10
NARROWEST, WIDEST = 0.8, 2.0  # what no trained network has asked for
SEED = 0x5370726561640000  # of the cells generated here, far from those that users choose

Array = np.ndarray[Any, Any]


def calibrate_noise(generator: CellGenerator, data: TrainingData) -> dict[str, Tensor]:
    """Set the starting noise of a generator's model so that its cells spread as those that it was trained on.

    Parameters
    ----------
    generator
        With a trained model, whose `noise_axes` and `noise_factors` are set.
    data
        The training cells.

    Returns
    -------
    The two by name, as in the model's state; unchanged noise of fewer than 200 cells, and nothing where counts are not
    drawn from a likelihood.
    """
    model = generator.model
    if not isinstance(model, CountDenoiser):
        return {}
    noise = {"noise_axes": model.noise_axes, "noise_factors": model.noise_factors}
    model.noise_axes.zero_()
    model.noise_factors.fill_(1)
    order = np.random.default_rng(generator.config.seed).permutation(len(data))
    one, other = (within_labels(data.take(half)) for half in np.array_split(order, 2))
    k, genes = len(model.noise_factors), data.matrix.shape[1]
    if min(len(one), len(other)) < FEWEST or k >= genes:
        return noise
    # with a start that is fixed, the same cells give the same directions
    axes = eigsh(one.T @ one, k, v0=np.ones(genes, np.float32))[1].T[::-1]
    model.noise_axes.copy_(torch.from_numpy(axes.copy()))
    wanted = _width(other @ axes.T)
    for turn in range(ROUNDS):
        codes = data.codes[np.resize(np.roll(order, -turn * CELLS), CELLS)]
        counts = generator.sample(codes, SEED + turn).astype(np.float32)
        made = within_labels(TrainingData(data.preprocessor, counts, codes))
        ratios = torch.from_numpy(wanted / _width(made @ axes.T)).to(model.noise_factors)
        model.noise_factors.mul_(ratios).clamp_(NARROWEST, WIDEST)
    return noise


def calibration_seconds(generator: CellGenerator, data: TrainingData) -> float:
    """Return about how long :func:`calibrate_noise` will take, by generating a few cells."""
    if not isinstance(generator.model, CountDenoiser) or len(data) < 2 * FEWEST:
        return 0.0
    few = data.codes[:PROBE]
    generator.sample(few, seed=0, calls=1)  # the first call may compile kernels
    start = time.monotonic()
    generator.sample(few, seed=0)
    return ROUNDS * CELLS / len(few) * (time.monotonic() - start)


def within_labels(data: TrainingData) -> Array:
    """Return what labels and library size do not explain of cells' values, ``(cells, G)`` fp32.

    A line in the logarithm of the library size is fitted to the values of each combination of labels; cells of
    combinations with too few cells for it are left out.
    """
    values, log_library = data.values, log_library_sizes(data.matrix)
    combination = data.preprocessor.labels.combination_index(data.codes)
    beyond = [np.empty((0, values.shape[1]), values.dtype)]
    for label in np.unique(combination):
        mine = combination == label
        n = np.count_nonzero(mine)
        if n >= FEWEST_OF_LABEL:
            known = np.stack([np.ones(n, values.dtype), log_library[mine]], axis=1)
            line = np.linalg.lstsq(known, values[mine], rcond=None)[0]
            beyond.append((values[mine] - known @ line) * np.sqrt(n / (n - 2)).astype(values.dtype))
    return np.concatenate(beyond)


def _width(places: Array) -> Array:
    low, high = np.percentile(places, [16, 84], axis=0)
    return np.maximum(high - low, 1e-6)
