"""Rates and dispersions of combinations of labels, beyond the sum of the labels' own."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wbdit._draws import draw
from wbdit.counts.foretell import Foretelling
from wbdit.counts.likelihood import CountLikelihood
from wbdit.counts.log_means import LogMeans
from wbdit.run_config import CombinationRows

HOLD_OUT = 0.1  # share of the training cells whose combination is treated as unseen
AXES = 16  # principal axes of the log rates
STRENGTH = 5.0  # cells that the product of its labels' rates is worth, for a combination that cannot be foretold
CLIP = 0.02  # smallest mixture weight of the tables, and distance of the largest from 1


class OfCombination(NamedTuple):
    """What a cell's combination of labels gives.

    Attributes
    ----------
    shown
        Labels that the denoiser is told, ``(B, C)`` int64; null labels if the combination is foretold.
    vector
        What is added to the denoiser's conditioning, ``(B, d)``.
    rates
        What is added to the log rates, ``(B, G)``.
    mixture_logits
        Logits of the prior's mixture weight at pure noise, ``(B, G)``.
    named
        Whether the cell has a combination, ``(B, 1)`` bool; false if one of its labels is null.
    """

    shown: Tensor
    vector: Tensor
    rates: Tensor
    mixture_logits: Tensor
    named: Tensor


class Combinations(nn.Module):
    """Tables of rates and dispersions of label combinations, for a run with several label columns.

    Row 0 is of cells with a null label. Then come the combinations of the training cells, those that are foretold since
    they have no or few cells, and the former as they are foretold without their own cells, see
    :class:`wbdit.counts.foretell.Foretelling`. In training mode, a random tenth of the cells gets the latter.

    Where rates are foretold, the denoiser is not told the labels, which it has never seen together. It sees that the
    rates are foretold, and where they lie on the principal axes of those of all combinations.

    Parameters
    ----------
    label_sizes
        Number of labels of each column, ``(C,)``.
    genes, width
        Number of genes G, width d of the denoiser.
    rows
        Numbers of combinations.
    learned_rates
        Whether the rates of the training cells' combinations are learned.

    Attributes
    ----------
    row_of
        Row of each combination, by its labels as digits of one number, null labels included.
    held_out_row
        For each row, that of the same combination without its own cells; 0 for none.
    rates
        Log ratio of each combination's rates to the product of its labels' rates, ``(rows, G)``.
    mixture_logits
        As in :class:`OfCombination`, ``(rows, G)``.
    profiles
        Coordinates of the log rates, ``(rows, AXES)``, with a standard deviation of 1 over the training combinations.
    foretold_log_means
        Mean ln(1 + count per 10,000) of the foretold combinations, ``(rows.foretold, G)``.
    dispersion
        Offset of the logits of the training cells' combinations, ``(1 + rows.seen, G)``; learned. The first row is that
        of all foretold ones.
    rate_offset
        Offset of the training cells' combinations' rates, ``(1 + rows.seen, G)``; learned. The first row is not used.
        None without `learned_rates`.
    """

    row_of: Tensor
    held_out_row: Tensor
    rates: Tensor
    mixture_logits: Tensor
    profiles: Tensor
    foretold_log_means: Tensor
    nulls: Tensor

    def __init__(
        self, label_sizes: tuple[int, ...], genes: int, width: int, rows: CombinationRows, learned_rates: bool = False
    ) -> None:
        super().__init__()
        self.label_sizes = label_sizes
        self.n = CombinationRows(*rows)
        total, grid = 1 + sum(self.n), int(np.prod([labels + 1 for labels in label_sizes]))
        self.register_buffer("nulls", torch.tensor(label_sizes), persistent=False)
        self.register_buffer("row_of", torch.zeros(grid, dtype=torch.int64))
        self.register_buffer("held_out_row", torch.zeros(total, dtype=torch.int64))
        self.register_buffer("rates", torch.zeros(total, genes))
        self.register_buffer("mixture_logits", torch.zeros(total, genes))
        self.register_buffer("profiles", torch.zeros(total, AXES))
        self.register_buffer("foretold_log_means", torch.zeros(self.n.foretold, genes))
        self.dispersion = nn.Parameter(torch.zeros(1 + self.n.seen, genes))
        self.rate_offset = nn.Parameter(torch.zeros(1 + self.n.seen, genes)) if learned_rates else None
        self.profile_embedder = nn.Linear(AXES, width, bias=False)
        nn.init.zeros_(self.profile_embedder.weight)
        self.foretold_embedding = nn.Parameter(torch.zeros(width))

    @torch.no_grad()
    def init_from_data(
        self, foretelling: Foretelling, expected: np.ndarray, likelihood: CountLikelihood, mean_log_library: float
    ) -> None:
        """Set all tables.

        Parameters
        ----------
        foretelling
            What is foretold from the training cells.
        expected
            Share of each gene in the counts of each combination, given its labels' own rates,
            ``(K_1, ..., K_C, G)``.
        likelihood
            Likelihood before training.
        mean_log_library
            Mean log library size of the training cells, at which rates are relative to the genes' means.
        """
        profiles, seen = foretelling.profiles, foretelling.seen
        told = (*foretelling.unseen, *foretelling.held_out.values())
        codes = [*profiles.codes[seen], *(one.codes for one in told)]
        log_means = [*map(foretelling.log_mean, seen), *(one.log_mean for one in told)]
        log_sizes = [*profiles.log_size[seen], *(one.log_size for one in told)]
        libraries = [*profiles.library[seen], *(one.library for one in told)]
        own = [profiles.cells[k] / (profiles.cells[k] + STRENGTH * (k not in foretelling.held_out)) for k in seen]
        share = likelihood.shares
        low, high = likelihood.log_size.double().cpu().numpy()
        log_rates = np.empty((len(codes), len(share)))
        for row, (code, log_mean, log_size, library, share_of_own) in enumerate(
            zip(codes, log_means, log_sizes, libraries, [*own, *(1.0 for _ in told)], strict=True)
        ):
            weight = np.clip((log_size - low) / np.minimum(high - low, -1e-3), CLIP, 1 - CLIP)
            logits = np.log(weight / (1 - weight))
            of_labels = LogMeans.at(library)(library * expected[tuple(code)], log_size)
            wanted = share_of_own * log_mean + (1 - share_of_own) * of_labels
            log_rates[row] = likelihood.log_rates(wanted, logits, library) - np.log(library) + mean_log_library
            self.mixture_logits[1 + row] = torch.from_numpy(logits)
            self.rates[1 + row] = torch.from_numpy(log_rates[row] - np.log(expected[tuple(code)] / share))
        self.profiles[1:] = torch.from_numpy(_coordinates(log_rates, share, len(seen)))
        self._index(codes)
        for k, one in enumerate(foretelling.unseen):
            self.foretold_log_means[k] = torch.from_numpy(one.log_mean)

    def rows(self, y: Tensor) -> Tensor:
        """Return the rows ``(B,)`` of cells with labels ``(B, C)``."""
        number = torch.zeros_like(y[:, 0])
        for column, labels in zip(y.unbind(1), self.label_sizes, strict=True):
            number = number * (labels + 1) + column
        return self.row_of[number]

    def foretold_codes(self) -> np.ndarray:
        """Return the labels of the foretold combinations, ``(rows.foretold, C)`` int64."""
        rows = self.row_of.cpu().numpy()
        places = np.flatnonzero(rows > self.n.seen)
        codes = np.stack(np.unravel_index(places, [labels + 1 for labels in self.label_sizes]), axis=1)
        return codes[np.argsort(rows[places])].astype(np.int64)

    def forward(self, y: Tensor) -> OfCombination:
        """Return what the combinations of labels ``(B, C)`` int64 give."""
        rows = self.rows(y)
        if self.training:
            u = draw(len(y), lambda n: torch.rand(n, device=y.device))
            held_out = self.held_out_row[rows]
            rows = torch.where((u < HOLD_OUT) & (held_out > 0), held_out, rows)
        told, named = (rows > self.n.seen)[:, None], (rows > 0)[:, None]
        # an embedding: see CountLikelihood.dispersion_at
        row = rows.masked_fill(told[:, 0], 0)
        rates = self.rates[rows]
        if self.rate_offset is not None:
            rates = rates + (named & ~told) * F.embedding(row, self.rate_offset)
        return OfCombination(
            shown=torch.where(told, self.nulls, y),
            vector=self.profile_embedder(self.profiles[rows]) + told * self.foretold_embedding,
            rates=rates,
            mixture_logits=self.mixture_logits[rows] + F.embedding(row, self.dispersion),
            named=named,
        )

    def _index(self, codes: list[np.ndarray]) -> None:
        """Set the rows of combinations: seen, foretold, and again those that are held out."""
        place = np.array([np.ravel_multi_index(tuple(row), [k + 1 for k in self.label_sizes]) for row in codes])
        named = self.n.seen + self.n.foretold
        for row, number in enumerate(place, 1):
            if row <= named:
                self.row_of[number] = row
            else:
                self.held_out_row[self.row_of[number]] = row


def _coordinates(log_rates: np.ndarray, share: np.ndarray, seen: int) -> np.ndarray:
    """Return the coordinates ``(rows, AXES)`` of log rates on the principal axes of the first `seen` rows.

    Genes are weighted by the root of their share, the inverse of the noise of a log rate.
    """
    weighted = log_rates * np.sqrt(share)
    center = weighted[:seen].mean(0)
    axes = np.linalg.svd(weighted[:seen] - center, full_matrices=False)[2][: min(AXES, seen - 1)]
    found = np.zeros((len(log_rates), AXES))
    places = (weighted - center) @ axes.T
    found[:, : len(axes)] = places / np.maximum(places[:seen].std(0), 1e-6)
    return found
