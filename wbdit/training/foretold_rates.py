"""Rates of foretold combinations of labels, with which generated cells have the means that are foretold.

The network begins with the rates of an unseen combination (:mod:`wbdit.counts.foretell`), and leaves them on its way to
lower noise, in ways that it has not learned for this combination. So its rates are changed until the generated cells
have the mean log-normalized expression that is foretold.

A change of all rates of a response is amplified by the network, by a factor that is not known. So the next rates are
taken from a mixture of all rounds whose errors, mixed likewise, cancel best (Anderson 1965, J. ACM 12:547; D. G.
Anderson's acceleration of a fixed-point iteration). This also averages over the rounds' sampling noise.
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
ROUNDS = 4
MOST = 16  # combinations, those most alike to others
FLOOR = 1e-3  # counts
LARGEST = 2.0  # change of a log rate per round
RIDGE = 1e-9  # of the mixture's normal equations


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
    paths = [_Path(row) for row in foretold]
    with progress_bar("calibrating foretold combinations", progress) as show:
        for turn in range(ROUNDS):
            counts = sample(generator, asked, SEED - 1 - turn, part_of(show, turn, ROUNDS))
            rates = tables.rates[rows].double().cpu().numpy()
            made = zip(paths, rates, np.split(counts, len(codes)), strict=True)
            tables.rates[rows] = torch.from_numpy(np.array([path.next(*one) for path, *one in made])).to(tables.rates)
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
    return ROUNDS * CELLS * len(calibrated(generator))


class _Path:
    """The rates of one combination by round, and how far its cells are from the foretold means ``(G,)``."""

    def __init__(self, wanted: np.ndarray) -> None:
        self.wanted = wanted
        self.changed: list[np.ndarray] = []  # log rates of each round, changed as its cells ask
        self.errors: list[np.ndarray] = []

    def next(self, rates: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return the log rates of the next round, given those of this one ``(G,)`` and its cells' counts ``(n, G)``."""
        counts = counts.astype(np.float64)
        found = transformed(counts, "lognorm").mean(0)
        self.changed.append(rates + _log_ratio(counts, found, self.wanted))
        self.errors.append(self.wanted - found)
        mixed = mixture(np.array(self.errors)) @ np.array(self.changed)
        return np.clip(mixed, rates - LARGEST, rates + LARGEST)  # errors that are alike extrapolate far


def mixture(errors: np.ndarray) -> np.ndarray:
    """Return the weights ``(rounds,)``, of sum 1, with which errors ``(rounds, G)`` cancel best.

    Examples
    --------
    >>> from wbdit.training.foretold_rates import mixture
    >>> mixture(np.array([[3.0, 0.0], [-1.0, 0.0]])).round(3)
    array([0.25, 0.75])
    """
    products = errors @ errors.T
    products += max(RIDGE * float(np.trace(products)), 1e-300) * np.eye(len(errors))
    weights = np.linalg.solve(products, np.ones(len(errors)))
    return weights / weights.sum()


def _log_ratio(counts: np.ndarray, found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the change of log rates ``(G,)`` that takes mean log-normalized values ``(G,)`` from `found` to `wanted`.

    These values become means of counts by negative binomials with the size that the cells' counts ``(n, G)`` have.
    """
    mean, variance = counts.mean(0), counts.var(0)
    size = np.log(np.clip(mean**2 / np.maximum(variance - mean, 1e-9), *SIZES))
    of = LogMeans.at(max(float(counts.sum(1).mean()), 1.0))
    before, after = (of.means(x, size) + FLOOR for x in (found, wanted))
    return np.clip(np.log(after / before), -LARGEST, LARGEST)
