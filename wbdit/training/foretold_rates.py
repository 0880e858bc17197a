"""Rates of foretold combinations of labels, with which generated cells have the means that are foretold.

The network begins with the rates of an unseen combination (:mod:`wbdit.counts.foretell`), and leaves them on its way to
lower noise, in ways that it has not learned for this combination. So its rates are changed until the generated cells
have the mean log-normalized expression that is foretold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from wbdit._progress import progress_bar
from wbdit.counts.denoiser import CountDenoiser
from wbdit.counts.log_means import SIZES, LogMeans
from wbdit.data.normalize import transformed
from wbdit.training.calibration import SEED, part_of, sample
from wbdit.training.distributed import current

if TYPE_CHECKING:
    from wbdit.generator import CellGenerator

CELLS = 384  # of a combination, generated per round
STEPS = (1.0, 0.8, 0.6)  # share of the missing change that a round makes: smaller steps average the cells' noise
MOST = 16  # combinations, those most alike to others
FLOOR = 1e-3  # counts
LARGEST = 2.0  # change of a log rate per round


@torch.no_grad()
def calibrate_foretold(generator: CellGenerator, progress: bool = False) -> dict[str, torch.Tensor]:
    """Bring the generated cells of foretold combinations to the means that are foretold.

    Parameters
    ----------
    generator
        Generator with a trained model, whose rates are set in place.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    The changed buffer by name, as in the model's state dict; an empty dict for a model without such combinations.
    """
    model = generator.model
    codes = calibrated(generator)
    if not len(codes) or not isinstance(model, CountDenoiser) or model.combinations is None:
        return {}
    tables = model.combinations
    rows = tables.rows(torch.from_numpy(codes).to(tables.row_of.device)).cpu().numpy()
    foretold = tables.foretold_log_means.double().cpu().numpy()[rows - tables.n.seen - 1]
    asked = np.repeat(codes, CELLS, axis=0)
    with progress_bar("calibrating foretold combinations", progress) as show:
        for turn, step in enumerate(STEPS):
            counts = sample(generator, asked, SEED - 1 - turn, part_of(show, turn, len(STEPS)))
            change = np.array(list(map(_log_ratio, np.split(counts, len(codes)), foretold)))
            tables.rates[rows] += torch.from_numpy(step * change).to(tables.rates)
            current().copy_first([tables.rates])
    return {"combinations.rates": tables.rates}


def calibrated(generator: CellGenerator) -> np.ndarray:
    """Return the labels ``(n, C)`` of the combinations that are calibrated."""
    model, facts, labels = generator.model, generator.config.foretold, generator.preprocessor.labels
    if not isinstance(model, CountDenoiser) or model.combinations is None or facts is None:
        return np.zeros((0, len(labels.columns)), np.int64)
    codes = model.combinations.foretold_codes()
    alike = [facts.nearest[labels.name(row)][1] for row in codes]
    return codes[np.argsort(alike, kind="stable")[::-1][:MOST]]


def foretold_cells(generator: CellGenerator) -> int:
    """Return the number of cells that :func:`calibrate_foretold` generates."""
    return len(STEPS) * CELLS * len(calibrated(generator))


def _log_ratio(counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the change of log rates ``(G,)`` that takes cells ``(n, G)`` to given mean log-normalized values ``(G,)``.

    These values become means of counts by negative binomials with the size that the cells' counts have.
    """
    counts = counts.astype(np.float64)
    found, mean, variance = transformed(counts, "lognorm").mean(0), counts.mean(0), counts.var(0)
    size = np.log(np.clip(mean**2 / np.maximum(variance - mean, 1e-9), *SIZES))
    of = LogMeans.at(max(float(counts.sum(1).mean()), 1.0))
    before, after = (of.means(x, size) + FLOOR for x in (found, wanted))
    return np.clip(np.log(after / before), -LARGEST, LARGEST)
