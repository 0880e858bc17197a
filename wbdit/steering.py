"""Cells that are moved along the axes of heads.

A deterministic sampler maps each cell's initial noise to the cell. Along a principal component, if everything were
Gaussian, a cell's place in standard deviations is that of its noise. So cells are moved along a head's axis by a shift
of their noise: of all shifts of one length, the one with which a cell moves farthest on the axis, Sigma^1/2 l, where l
has the head's gene loadings and Sigma is the covariance of values within labels. What follows in the genes is then
Sigma l, as in real cells. A dose is the length of the shift, in standard deviations of the noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import anndata as ad
import numpy as np
import scipy.sparse as sp

from wbdit.counts.denoiser import CountDenoiser
from wbdit.data.components import Residuals
from wbdit.data.normalize import log_library_sizes
from wbdit.data.preprocessor import Preprocessor
from wbdit.network_inputs import conditioning_of, noised
from wbdit.nn.denoiser import Denoiser
from wbdit.nn.heads import HeadAxes, head_axes, head_of, white_box
from wbdit.request_check import doses
from wbdit.schedule import NoiseSchedule

CELLS = 512  # generated, that axes and covariances are taken from
SEED = 0x4865616473000000  # of these cells; far from the seeds that users choose
COMPONENTS = 32  # of the covariance
FEWEST = 10  # cells of a combination of labels that has a mean of its own


class Directions(NamedTuple):
    """The axes of heads, and the shifts of initial noise along them: unit vectors ``(L, h, G)`` fp64."""

    axes: HeadAxes
    shifts: np.ndarray


def directions(
    model: Denoiser | CountDenoiser, schedule: NoiseSchedule, preprocessor: Preprocessor, cells: ad.AnnData
) -> Directions:
    """Return the directions of all heads of a run.

    Parameters
    ----------
    model, schedule, preprocessor
        Those of the run.
    cells
        Cells that the run generated.
    """
    x, t = noised(model, schedule, preprocessor, cells, SEED)
    axes = head_axes(white_box(model.network), x, t, conditioning_of(model, preprocessor, cells))
    components = _within_labels(preprocessor, cells).components(COMPONENTS)
    on_components = axes.loadings.double().cpu().numpy() @ components.axes.T
    shifts = (on_components * np.sqrt(components.variances)) @ components.axes
    return Directions(axes, shifts / np.linalg.norm(shifts, axis=-1, keepdims=True).clip(1e-12))


def check(model: Denoiser | CountDenoiser, steer: Mapping[str, float]) -> dict[tuple[int, int], float]:
    """Return the doses by block and head, counted from 0.

    Raises
    ------
    InputError
        If the run has no such head, or a dose is not a finite number.
    """
    network = white_box(model.network)
    return {head_of(network, name): dose for name, dose in doses(steer).items()}


def _within_labels(preprocessor: Preprocessor, cells: ad.AnnData) -> Residuals:
    """Return the values of cells after regression on labels and library size."""
    values, known = preprocessor.encode(cells), np.ones((cells.n_obs, 1))
    if preprocessor.space == "counts":
        known = np.column_stack([known, log_library_sizes(preprocessor.matrix(cells))])
    index = preprocessor.labels.combination_index(preprocessor.labels.codes(cells))
    groups = [rows for one in np.unique(index) if len(rows := np.flatnonzero(index == one)) >= FEWEST]
    return Residuals(sp.csr_matrix(values), known, groups or None)
