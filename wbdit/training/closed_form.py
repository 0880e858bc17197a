"""Fit what generated cells start from: :mod:`wbdit.counts.closed_form` and :mod:`wbdit.counts.noise_table`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from scipy.sparse.linalg import svds

from wbdit import ops
from wbdit._progress import progress_bar
from wbdit.cell_blocks import BLOCK, run_tasks, whole_block
from wbdit.counts.cell_places import LEADING, CellPlaces
from wbdit.counts.closed_form import AXES, LabelGaussians
from wbdit.counts.denoiser import CountDenoiser
from wbdit.counts.noise_table import NoiseTable
from wbdit.data.sources import TrainingData
from wbdit.training.distributed import current

if TYPE_CHECKING:
    from wbdit.generator import CellGenerator

MOST_CELLS, MOST_VALUES = 8192, 2**24  # that the Gaussians are fitted on, and their values
COPIES = 4  # of these values, fp32, at once
FEWEST = 200  # cells; with fewer, the axes are mostly sampling error
PRIOR_CELLS = 80  # that the pooled covariance along the axes is worth, beside a combination's own
PRIOR_OF_VARIANCES = 20  # the same for the variances of the rest
START = -1.43  # ln(alpha / sigma) where sampling begins; with more signal, what is not Gaussian shows
MOST_SIGNAL = 6.0  # mean over the cells of the leading variance within their combination, over that of the noise
SEED, TABLE_SEED = 0x436C6F7365640000, 0x5461626C65000000  # of the noise


@torch.no_grad()
def fit_gaussians(generator: CellGenerator, data: TrainingData, progress: bool = False) -> dict[str, torch.Tensor]:
    """Fit a Gaussian to the cells of each combination of labels, around the mean that the denoiser gives.

    Parameters
    ----------
    generator
        Generator with a trained model; the buffers of the model's `gaussians` and `noise_table` are set in place.
    data
        Training cells.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    The buffers by name, as in the model's state dict; an empty dict for a model without Gaussians. Its timestep is 0,
    so that sampling starts from pure noise, with few cells, and where labels leave so much variance that the cells'
    structure shows at the timestep at which it would begin: without labels, a Gaussian would mix the cell types.
    """
    model = generator.model
    if not isinstance(model, CountDenoiser) or model.gaussians is None:
        return {}
    gaussians = model.gaussians
    gaussians.timestep.zero_()
    if len(gaussians.codes):
        gaussians.codes.copy_(torch.from_numpy(data.preprocessor.labels.combinations))
    start = round(generator.schedule.timestep(START))
    order = np.random.default_rng(generator.config.seed).permutation(len(data))
    few = data.take(order[: fitted_cells(data)])
    if len(few) and start > model.stop:
        with progress_bar("fitting Gaussians", progress) as show:
            if model.noise_table is not None:
                _fit_table(generator, model.noise_table, data)
            rest = _rest(generator, few, lambda share: show(share, ""))
        rows = gaussians.rows(torch.from_numpy(few.codes).to(gaussians.codes.device)).cpu().numpy()
        largest = _set(gaussians, rest, rows, few.log_library)
        alpha, sigma = generator.schedule.levels(start)
        if largest[rows].mean() * (alpha / sigma) ** 2 <= MOST_SIGNAL:
            gaussians.timestep.fill_(start)
    buffers = {f"gaussians.{name}": buffer for name, buffer in gaussians.named_buffers()}
    if model.noise_table is not None:
        buffers |= {f"noise_table.{name}": buffer for name, buffer in model.noise_table.named_buffers()}
    current().copy_first(list(buffers.values()))
    return buffers


def fitted_cells(data: TrainingData) -> int:
    """Return the number of cells that the Gaussians are fitted on, 0 for too few."""
    genes = data.cells.shape[1]
    n = min(len(data), MOST_CELLS, MOST_VALUES // genes)
    return n if n >= FEWEST and genes > AXES else 0


def fitting_calls(model: torch.nn.Module, data: TrainingData) -> int:
    """Return the number of cells for which :func:`fit_gaussians` calls the denoiser."""
    table = getattr(model, "noise_table", None)
    if table is None or not fitted_cells(data):
        return fitted_cells(data)
    return BLOCK * len(table.knots)


def fitting_bytes(data: TrainingData) -> int:
    """Return the memory that :func:`fit_gaussians` takes."""
    return COPIES * 4 * fitted_cells(data) * data.cells.shape[1]


def _set(gaussians: LabelGaussians, rest: np.ndarray, rows: np.ndarray, log_library: np.ndarray) -> np.ndarray:
    """Set axes, roots, variances and places.

    Parameters
    ----------
    rest
        Cells' values about their means, ``(n, G)``.
    rows, log_library
        Rows of their combinations, and natural logarithms of their library sizes, ``(n,)``.

    Returns
    -------
    The leading variance of each row, ``(1 + M,)``.
    """
    axes, kept = _axes(rest), _kept(rest)
    gaussians.axes.copy_(torch.from_numpy(axes))
    places = rest @ (axes.T * np.sqrt(kept)).astype(np.float32)
    everything = _moments(rest, places, axes)
    largest = np.zeros(len(gaussians.roots))
    for row in range(len(largest)):
        own = rows == row if row else np.zeros(len(rows), bool)
        n, (covariance, variances) = own.sum(), everything
        if n:
            of_own = _moments(rest[own], places[own], axes)
            covariance, variances = (
                (n * mine + prior * pooled) / (n + prior)
                for mine, pooled, prior in zip(of_own, everything, (PRIOR_CELLS, PRIOR_OF_VARIANCES), strict=True)
            )
        largest[row] = np.linalg.eigvalsh(covariance)[-1]
        floor = 1e-9 * np.trace(covariance) * np.eye(AXES)  # of rounding: as few cells as axes leave no variance
        gaussians.roots[row] = torch.from_numpy(np.linalg.cholesky(covariance + floor))
        gaussians.variances[row] = torch.from_numpy(variances)
    if gaussians.places is not None:
        _set_places(gaussians, places, rows, log_library)
    return largest


def _set_places(gaussians: LabelGaussians, places: np.ndarray, rows: np.ndarray, log_library: np.ndarray) -> None:
    """Set the places of cells from their places along the axes ``(n, AXES)``, rows and log library sizes ``(n,)``."""
    kept, order = cast(CellPlaces, gaussians.places), np.lexsort((log_library, rows))
    roots = gaussians.roots[:, :LEADING, :LEADING].double().cpu()  # lower triangular: the first ones stand alone
    found = torch.linalg.solve_triangular(
        roots[rows[order]], torch.from_numpy(places[order, :LEADING, None]).double(), upper=False
    )
    kept.coordinates.copy_(found[..., 0])
    kept.log_library.copy_(torch.from_numpy(log_library[order]))
    kept.ends.copy_(torch.from_numpy(np.searchsorted(rows[order], np.arange(len(kept.ends)), side="right")))


def _axes(rest: np.ndarray) -> np.ndarray:
    """Return the leading principal axes ``(AXES, G)`` fp64, the first one first."""
    start = np.ones(min(rest.shape))  # a fixed start vector makes the axes reproducible
    return svds(rest, AXES, v0=start, return_singular_vectors="vh")[2][::-1].astype(np.float64)


def _kept(rest: np.ndarray) -> np.ndarray:
    """Return how much of the variance along the axes other cells have, ``(AXES,)``, at most 1.

    Axes fit the noise of the cells that they come from: here half of the cells, beside the other half. The axes of all
    cells fit half as much, as sampling error falls with the number of cells.
    """
    halves = rest[::2], rest[1::2]
    shares = []
    for own, other in (halves, halves[::-1]):
        axes = _axes(own).T.astype(np.float32)
        shares.append(np.square(other @ axes).mean(0) / np.square(own @ axes).mean(0))
    return np.minimum((1 + np.mean(shares, axis=0)) / 2, 1)


def _moments(rest: np.ndarray, places: np.ndarray, axes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the covariance along the axes ``(AXES, AXES)``, and the variances of what is left ``(G,)``."""
    covariance = places.T.astype(np.float64) @ places / len(rest)
    along = np.einsum("ig,ij,jg->g", axes, covariance, axes, optimize=True)
    return covariance, np.maximum(np.einsum("ng,ng->g", rest, rest, dtype=np.float64) / len(rest) - along, 0)


def _fit_table(generator: CellGenerator, table: NoiseTable, data: TrainingData) -> None:
    """Fit the table to outputs of the denoiser: for each combination one block, at library sizes of its cells."""
    model, genes = cast(CountDenoiser, generator.model), data.cells.shape[1]
    device = next(model.parameters()).device
    highest = torch.full((BLOCK,), generator.schedule.noise_steps - 1, device=device)
    library, combination = data.log_library, data.preprocessor.labels.combination_index(data.codes)
    order = np.lexsort((library, combination))  # by combination, then by library size
    starts = np.searchsorted(combination[order], np.arange(len(table.knots) + 1))

    def fit(row: int, check: Callable[[], None]) -> None:
        check()
        own = order[starts[row] : starts[row + 1]]
        if not len(own):
            return  # all of its cells are held out: its rates are those of its labels
        own = own[np.linspace(0, len(own) - 1, BLOCK).round().astype(int)]
        noise = ops.normal(TABLE_SEED, (row * BLOCK + torch.arange(BLOCK)).to(device), -1, genes)[:, None]
        codes, log_library = (torch.from_numpy(part[own]).to(device) for part in (data.codes, library))
        table.fit(row, log_library, model.output(noise, highest, model.embed(codes, log_library)))

    model.eval()  # clears what was computed from the weights on several threads
    run_tasks(fit, range(len(table.knots)), torch.get_num_threads() if device.type == "cpu" else 1)


def _rest(generator: CellGenerator, few: TrainingData, show: Callable[[float], None]) -> np.ndarray:
    """Return the cells' values minus the denoiser's estimates at pure noise, ``(n, G)`` fp32.

    Pure noise tells nothing: the estimates are means, given labels, library sizes and covariates.
    """
    model, genes = cast(CountDenoiser, generator.model), few.cells.shape[1]
    device = next(model.parameters()).device
    highest = torch.full((BLOCK,), generator.schedule.noise_steps - 1, device=device)
    given = [torch.from_numpy(few.codes), torch.from_numpy(few.log_library)]
    if few.scaled_covariates is not None:
        given.append(torch.from_numpy(few.scaled_covariates))

    def block(start: int, check: Callable[[], None]) -> np.ndarray:
        check()
        own = np.arange(start, min(start + BLOCK, len(few)))
        rows = torch.from_numpy(whole_block(own))
        noise = ops.normal(SEED, rows.to(device), -1, genes)[:, None]
        codes, log_library, *covariates = (part[rows].to(device) for part in given)
        conditioning = model.embed(codes, log_library, *covariates)
        if model.noise_table is None or model.gaussians is None:
            mean = model(noise, highest, conditioning=conditioning)
        else:
            mean = model.mean_at_noise(noise, model.gaussians.rows(codes), log_library, conditioning)
        show(min(start + BLOCK, len(few)) / len(few))
        return few.values(own).astype(np.float32) - mean[: len(own), 0].float().cpu().numpy()

    model.eval()  # clears what was computed from the weights on several threads
    at_once = torch.get_num_threads() if device.type == "cpu" else 1
    return np.concatenate(run_tasks(block, range(0, len(few), BLOCK), at_once))
