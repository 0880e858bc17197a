"""A denoiser whose answer is a distribution over each gene's counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wbdit import ops
from wbdit.counts.init import label_rates, log_library_sizes
from wbdit.counts.likelihood import CountLikelihood
from wbdit.nn.denoiser import Denoiser
from wbdit.ops import reference
from wbdit.schedule import NoiseSchedule, Prediction

ROUNDS = 4  # of bringing the expected counts to the library size
NOISE_AXES = 16  # directions that starting noise may be wider along; beyond them spread is mostly sequencing's


class CountDenoiser(nn.Module):
    """A denoiser, and the likelihood that makes counts of what it answers.

    The conditioning is one vector per cell, made by :meth:`embed_labels`: the denoiser's own, of labels and library
    size, and for each gene the logarithm of how much more the labels and the library size make of it than the average
    cell has, and how much wider than other labels' its counts are.

    Parameters
    ----------
    denoiser
        What answers each gene's logarithm of the mean count, beyond what the conditions make of it; with two outputs
        also what is added to :attr:`CountLikelihood.dispersion_knots`: how wide the count's distribution is. A gene
        that is on or off in cells of a label is as uncertain as can be where both are likely, and neither before nor
        after. With one spread for all cells of a label, counts' means come out right, and those of their logarithms,
        which samplers go by, too close to one another.
    likelihood
        The distribution of counts.
    schedule
        Noise schedule.
    input_dropout
        Share of the genes that the denoiser does not see, in training mode.

    Attributes
    ----------
    label_rates
        Logarithm of how much more of each gene a label makes, ``(sum of K_c + 1, G)``, see :func:`label_rates`.
    label_dispersion
        What a label adds to :attr:`CountLikelihood.dispersion_knots`, of the same shape; learned. At high noise a gene's
        counts are as dispersed as the label's: with one dispersion for all labels, means fit and zeros do not.
    noise_axes, noise_factors
        Orthonormal directions ``(K, G)`` along which sampling begins with wider noise, and how much wider ``(K,)``; see
        :mod:`wbdit.training.calibration`.
    """

    prediction: Prediction = "x0"

    def __init__(
        self, denoiser: Denoiser, likelihood: CountLikelihood, schedule: NoiseSchedule, input_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.likelihood = likelihood
        self.schedule = schedule
        self.input_dropout = input_dropout
        self.num_classes = denoiser.num_classes
        width, genes = denoiser.hidden_size, denoiser.input_size
        self.library_embedder = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.normal_(self.library_embedder[2].weight, std=0.02)  # type: ignore[arg-type]
        nn.init.zeros_(self.library_embedder[2].bias)  # type: ignore[arg-type]
        rows = sum(labels + 1 for labels in denoiser.label_sizes)
        self.register_buffer("label_rates", torch.zeros(rows, genes))
        self.label_dispersion = nn.Parameter(torch.zeros(rows, genes), requires_grad=rows > 0)
        self.register_buffer("log_library_scale", torch.tensor([0.0, 1.0]))  # mean and deviation of ln(library size)
        self.register_buffer("noise_axes", torch.zeros(NOISE_AXES, genes))
        self.register_buffer("noise_factors", torch.ones(NOISE_AXES))

    label_rates: Tensor
    log_library_scale: Tensor
    noise_axes: Tensor
    noise_factors: Tensor

    @torch.no_grad()
    def init_from_data(self, counts: np.ndarray, codes: np.ndarray, centre: np.ndarray, scale: float) -> None:
        """Take what is known before training from the cells.

        Parameters
        ----------
        counts
            Raw counts ``(n, G)``.
        codes
            Labels ``(n, C)`` int64.
        centre, scale
            Of the values, see :class:`wbdit.data.preprocessor.Preprocessor`.
        """
        self.likelihood.init_from_data(counts, centre, scale)
        log_library = log_library_sizes(counts)
        self.log_library_scale.copy_(torch.tensor([log_library.mean(), max(log_library.std(), 1e-3)]))
        self.label_rates.copy_(torch.from_numpy(label_rates(counts, codes, self.denoiser.label_sizes)))
        if self.denoiser.has_cell_token:
            self.denoiser.cell_token.init_principal_components(torch.from_numpy((np.log1p(counts) - centre) / scale))

    def scale_noise(self, noise: Tensor) -> Tensor:
        """Return starting noise ``(B, 1, G)`` that is wider along :attr:`noise_axes`."""
        with torch.autocast(noise.device.type, enabled=False):
            return noise + (noise @ self.noise_axes.mT * (self.noise_factors - 1)) @ self.noise_axes

    def embed_labels(self, y: Tensor | None, log_library: Tensor) -> Tensor:
        """Return the conditions ``(B, d + 2 G)`` fp32.

        Parameters
        ----------
        y
            Labels ``(B,)`` or ``(B, C)`` int64, as :class:`wbdit.nn.denoiser.Denoiser` takes them; None for no labels.
        log_library
            Natural logarithm of the library size over the model's genes, ``(B,)``.
        """
        mean, deviation = self.log_library_scale
        vector = self.library_embedder(((log_library - mean) / deviation)[:, None])
        rates = (log_library - mean)[:, None].expand(-1, self.denoiser.input_size)
        shapes = torch.zeros_like(rates)
        if self.denoiser.label_sizes and y is not None:
            embedder = self.denoiser.y_embedder
            y = embedder.drop(y) if self.training else y
            vector = vector + embedder.embed(y)
            sizes = [labels + 1 for labels in self.denoiser.label_sizes]
            tables = self.label_rates.split(sizes), self.label_dispersion.split(sizes)
            for rate, shape, column in zip(*tables, y.reshape(len(y), len(sizes)).unbind(1), strict=True):
                rates, shapes = rates + rate[column], shapes + shape[column]
        return torch.cat([vector, rates, shapes], dim=1)

    def forward(self, x: Tensor, t: Tensor, given: Tensor) -> Tensor:
        """Return the mean of the clean values, fp32, without gradients: what samplers go by.

        Parameters
        ----------
        x
            Noised cells ``(B, 1, G)``.
        t
            Timesteps ``(B,)``.
        given
            GenerationRequest ``(B, d + 2 G)``, see :meth:`embed_labels`.
        """
        with torch.no_grad():
            return ops.count_mean(*self._posterior(x, t, *self._answer(x, t, given)))[:, None]

    def nll(self, x: Tensor, t: Tensor, given: Tensor, levels: Tensor) -> Tensor:
        """Return the negative log-likelihood ``(B, G)``, in nats, of the levels ``(B, G)`` uint8 behind noised cells.

        `x`, `t` and `given` as in :meth:`forward`.
        """
        posterior = self._posterior(x, t, *self._answer(x, t, given))
        return ops.count_nll(*(*posterior, levels))

    @torch.no_grad()
    def draw(self, x: Tensor, t: Tensor, given: Tensor, u: Tensor, library: Tensor) -> Tensor:
        """Draw counts from their distribution at noised cells.

        The distributions are first moved, all of a cell's rates alike, until the counts that they expect of the cell
        add up to its library size: what a few steps of a sampler lose of it is given back.

        Parameters
        ----------
        x, t, given
            As in :meth:`forward`.
        u
            Uniform numbers ``(B, G)``; one draws the level and, where that is a bin, the count in it.
        library
            Library sizes ``(B,)``.

        Returns
        -------
        Counts ``(B, G)`` int32.
        """
        log_rate, shape = self._answer(x, t, given)
        # the denoiser may compute in bf16; expected counts of a whole cell, rounded to 8 bits, would miss its library
        with torch.autocast(x.device.type, enabled=False):
            return self._draw(x, t, log_rate, shape, u, library)

    def _draw(self, x: Tensor, t: Tensor, log_rate: Tensor, shape: Tensor, u: Tensor, library: Tensor) -> Tensor:
        known = self.likelihood
        for _ in range(ROUNDS):
            p = self._probabilities(x, t, log_rate, shape)
            log_rate = log_rate + (library / (p @ known.middle).sum(1)).log()[:, None]
        p = self._probabilities(x, t, log_rate, shape)
        below = p.cumsum(-1)
        level = torch.minimum((below < u[..., None]).sum(-1), known.sizes - 1)[..., None]
        # how far along its level's step u lies says where in the bin the count is
        share = 1 - ((below.gather(-1, level) - u[..., None]) / p.gather(-1, level))[..., 0]
        lowest, highest = (edge[level[..., 0]] for edge in (known.lowest, known.highest))
        return (lowest + (share * (highest - lowest + 1)).int()).clamp(min=lowest, max=highest)

    def _probabilities(self, x: Tensor, t: Tensor, log_rate: Tensor, shape: Tensor) -> Tensor:
        """Return the probability of each level ``(B, G, L)``."""
        return reference.count_logits(*self._posterior(x, t, log_rate, shape))[0].softmax(-1)

    def _answer(self, x: Tensor, t: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """Return what :meth:`CountLikelihood.terms` takes: log rates and shapes, ``(B, G)`` fp32."""
        vector, rates, shapes = given.split([self.denoiser.hidden_size, x.shape[-1], x.shape[-1]], dim=1)
        seen = F.dropout(x, self.input_dropout, self.training)
        answer = self.denoiser(seen, t, vector).float()
        spread = shapes + answer[:, 1] if self.denoiser.out_channels == 2 else shapes
        return answer[:, 0] + rates, spread

    def _posterior(self, x: Tensor, t: Tensor, log_rate: Tensor, shape: Tensor) -> tuple[Tensor, ...]:
        """Return the first arguments of :func:`wbdit.ops.count_nll` and its kin."""
        known = self.likelihood
        levels = known.values, known.middle, known.sizes
        return x[:, 0], *known.terms(log_rate, shape, t), *self.schedule.level_tensors(t), *known.prior, *levels


class FixedLibrary:
    """A count denoiser at fixed library sizes, as samplers and :class:`wbdit.samplers.GuidedModel` call a model.

    Parameters
    ----------
    model
        A :class:`CountDenoiser`, or what calls one.
    log_library
        Natural logarithm of the library sizes ``(B,)``.
    """

    def __init__(self, model: Any, log_library: Tensor) -> None:
        self.model = model
        self.log_library = log_library
        self.prediction: Prediction = model.prediction
        self.num_classes: int | Sequence[int] = model.num_classes

    @property
    def conditions(self) -> Tensor:
        """What cells without labels are conditioned on, ``(B, d + 2 G)``."""
        return self.embed_labels(None)

    def embed_labels(self, y: Tensor | None) -> Tensor:
        """Return the conditions of labels, one or several for each cell, at the cells' library sizes."""
        times = 1 if y is None else len(y) // len(self.log_library)
        return self.model.embed_labels(y, self.log_library.repeat(times))

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Answer for noised cells ``(B, 1, G)`` at timesteps ``(B,)``, with labels or conditions `y`."""
        given = y if y is not None and y.is_floating_point() else self.embed_labels(y)
        return self.model(x, t, given)
