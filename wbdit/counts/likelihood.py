"""The distribution of a gene's count, given its mean and its noised value."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wbdit.counts.bins import CountBins
from wbdit.counts.log_means import bisect
from wbdit.data.normalize import TARGET_SUM
from wbdit.data.statistics import Statistics

LARGEST_SIZE = 20.0  # of the prior's negative binomial, which is nearly Poisson beyond it
LARGEST_LOG_RATE = 12.0
KNOTS = 12  # timesteps at which the dispersion is learned; linear in between


class CountLikelihood(nn.Module):
    """The distribution of each gene's count at a noised value, given its mean.

    Parameters
    ----------
    genes
        Number of genes G.
    levels
        Number of levels L: bins of counts, see :class:`CountBins`.
    noise_steps
        Timesteps T of the schedule.

    Attributes
    ----------
    prior
        Logarithm of the prior without the factor that depends on the mean, ``(2, G, L)``; learned. The first entry is
        for no noise and starts nearly Poisson. The second is for no signal and starts as dispersed as the gene's counts
        over all cells.
    dispersion_knots
        Logits of the second entry's weight, at :data:`KNOTS` timesteps, ``(KNOTS, G)``; learned.
    """

    def __init__(self, genes: int, levels: int, noise_steps: int) -> None:
        super().__init__()
        self.noise_steps = noise_steps
        self.prior = nn.Parameter(torch.zeros(2, genes, levels))
        self.dispersion_knots = nn.Parameter(torch.linspace(-4, 4, KNOTS)[:, None].repeat(1, genes))
        self.register_buffer("lowest", torch.zeros(levels, dtype=torch.int32))
        self.register_buffer("highest", torch.zeros(levels, dtype=torch.int32))
        self.register_buffer("values", torch.zeros(genes, levels))
        self.register_buffer("n_levels", torch.ones(genes, dtype=torch.int32))  # number of levels of each gene
        self.register_buffer("log_mean", torch.zeros(genes))
        self.register_buffer("log_size", torch.zeros(2, genes))  # of the initial negative binomials

    lowest: Tensor
    highest: Tensor
    values: Tensor
    n_levels: Tensor
    log_mean: Tensor
    log_size: Tensor

    @torch.no_grad()
    def init_from_data(self, statistics: Statistics, center: np.ndarray, scale: float) -> None:
        """Set the levels, their values and the initial prior from the statistics of the training cells' counts."""
        levels = CountBins.up_to(float(statistics.largest.max()))
        middle = levels.middle
        top = levels.of(statistics.largest).astype(int)
        mean = statistics.matrix_mean + 1e-4
        # method of moments: variance = mean + mean^2 / size
        excess = np.maximum(statistics.matrix_variance - mean, 0.02 * mean)
        size = np.stack([np.full_like(mean, LARGEST_SIZE), np.clip(mean**2 / excess, 0.02, LARGEST_SIZE)])
        self.lowest.copy_(torch.from_numpy(levels.lowest))
        self.highest.copy_(torch.from_numpy(levels.highest))
        self.values.copy_(torch.from_numpy((np.log1p(middle) - center[:, None]) / scale))
        self.n_levels.copy_(torch.from_numpy(np.minimum(top + 2 + (top > 3), len(middle))))
        self.log_mean.copy_(torch.from_numpy(np.log(mean)))
        self.log_size.copy_(torch.from_numpy(np.log(size)))
        c, r = torch.from_numpy(middle), torch.from_numpy(size)[..., None]
        width = torch.from_numpy(levels.highest - levels.lowest + 1.0).log()
        self.prior.copy_(torch.lgamma(c + r) - torch.lgamma(r) - torch.lgamma(c + 1) + width)

    def bin_of(self, counts: np.ndarray) -> np.ndarray:
        """Return the levels ``(n, G)`` uint8 of counts ``(n, G)``.

        Other cells than the training cells may have counts above a gene's highest level. They get this level, since the
        likelihood of the count itself is zero.
        """
        levels = CountBins(self.lowest.cpu().numpy(), self.highest.cpu().numpy()).of(counts)
        return np.minimum(levels, (self.n_levels.cpu().numpy() - 1).astype(np.uint8))

    @property
    def middle(self) -> Tensor:
        """Mean count of each level, ``(L,)`` fp32."""
        return (self.lowest + self.highest) / 2

    @property
    def shares(self) -> np.ndarray:
        """Share of each gene in the counts of all training cells, ``(G,)`` fp64."""
        means = np.exp(self.log_mean.double().cpu().numpy())
        return means / means.sum()

    def terms(self, log_rate: Tensor, dispersion: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the natural parameter ``ln(mean / (mean + size))`` and the prior's mixture weight, both ``(B, G)``.

        A negative binomial's probability of a count c depends on the mean by ``(mean / (mean + size))^c``, up to
        normalization.

        Parameters
        ----------
        log_rate
            Logarithm of the ratio of each count's mean to the gene's mean over all cells, ``(B, G)``.
        dispersion
            Offset of the mixture weight's logits, ``(B, G)``.
        t
            Timesteps ``(B,)``.
        """
        log_ratio, mixture = self.log_ratio(log_rate, dispersion, t)
        return -F.softplus(-log_ratio), mixture

    def log_ratio(self, log_rate: Tensor, dispersion: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``ln(mean / size)`` of each negative binomial and the mixture weight, both ``(B, G)``.

        The parameters are those of :meth:`terms`. An increase of `log_rate` increases the ratio by as much, and leaves
        the weight unchanged.
        """
        mixture = (self.dispersion_at(t.to(log_rate.dtype)) + dispersion).sigmoid()
        log_size = torch.lerp(self.log_size[0], self.log_size[1], mixture)
        return log_rate - (log_size - self.log_mean), mixture

    @torch.no_grad()
    def log_rates(self, log_means: np.ndarray, mixture_logits: np.ndarray, library: float) -> np.ndarray:
        """Return the log rates ``(G,)`` at which counts at pure noise have given mean log-normalized values.

        A mixture of two logarithms is not quite a negative binomial, so that its mean is not the rate.

        Parameters
        ----------
        log_means
            Means of ln(1 + count per 10,000), ``(G,)``.
        mixture_logits
            Logits of the mixture weight, ``(G,)``.
        library
            Library size of the cells.
        """
        weight = torch.from_numpy(mixture_logits).sigmoid()[:, None]
        log_prior = torch.lerp(self.prior[0].double().cpu(), self.prior[1].double().cpu(), weight)
        levels = torch.arange(log_prior.shape[1])
        log_prior.masked_fill_(levels >= self.n_levels.cpu()[:, None], -torch.inf)
        low, high = self.log_size.double().cpu()
        log_size = torch.lerp(low, high, weight[:, 0]) - self.log_mean.double().cpu()
        counts = self.middle.double().cpu()
        logs, wanted = torch.log1p(counts * (TARGET_SUM / library)), torch.from_numpy(log_means)

        def is_below(log_rates: np.ndarray) -> np.ndarray:
            log_odds = F.logsigmoid(torch.from_numpy(log_rates) - log_size)
            return ((log_prior + log_odds[:, None] * counts).softmax(1) @ logs < wanted).numpy()

        return bisect(is_below, log_means.shape, -LARGEST_LOG_RATE, LARGEST_LOG_RATE)

    def dispersion_at(self, t: Tensor) -> Tensor:
        """Return the logits of the mixture weight ``(B, G)`` at timesteps ``(B,)``, floating."""
        at = t / (self.noise_steps - 1) * (KNOTS - 1)
        knot = at.long().clamp(max=KNOTS - 2)
        # the backward of an index adds in any order of the threads, that of an embedding in one
        below, above = (F.embedding(knot + i, self.dispersion_knots) for i in (0, 1))
        return torch.lerp(below, above, (at - knot)[:, None])
