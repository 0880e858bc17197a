"""Cells that are moved along axes of heads, see :mod:`wbdit.nn.heads`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import anndata as ad

from wbdit.counts.denoiser import CountDenoiser
from wbdit.data.preprocessor import Preprocessor
from wbdit.network_inputs import conditioning_of, noised
from wbdit.nn.denoiser import Denoiser
from wbdit.nn.heads import Axis, head_axes, head_of, move, turnable
from wbdit.request_check import doses
from wbdit.schedule import NoiseSchedule

CELLS = 256  # that axes are taken from
SEED = 0x4865616473000000  # of these cells; far from the seeds that users choose


def steered(
    model: Denoiser | CountDenoiser,
    schedule: NoiseSchedule,
    preprocessor: Preprocessor,
    generate: Callable[[], ad.AnnData],
    steer: Mapping[str, float],
) -> Denoiser | CountDenoiser:
    """Return a model whose cells are moved along axes of heads.

    Parameters
    ----------
    model, schedule, preprocessor
        Those of a run with white-box blocks.
    generate
        Function that returns generated cells. A head's axis is the first principal axis of these cells in its subspace,
        at the end of sampling. It points to where its largest coordinate is positive.
    steer
        For each head, by how many standard deviations of these cells to move: ``{"block-1-head-2": 1.5}``.

    Raises
    ------
    InputError
        If the run has no such head, or a dose is not a finite number.
    """
    network = turnable(model.network)
    by = {head_of(network, name): dose for name, dose in doses(steer).items()}
    axes = axes_of_cells(model, schedule, preprocessor, generate())
    turned = copy.deepcopy(model).eval()
    move(turnable(turned.network), axes, by)
    return turned


def axes_of_cells(
    model: Denoiser | CountDenoiser, schedule: NoiseSchedule, preprocessor: Preprocessor, cells: ad.AnnData
) -> list[list[Axis]]:
    """Return the axis of each head by block, as cells show it at the end of sampling."""
    x, t = noised(model, schedule, preprocessor, cells, SEED)
    return head_axes(turnable(model.network), x, t, conditioning_of(model, preprocessor, cells))
