"""A denoiser whose answer is a distribution over each gene's counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wbdit import ops
from wbdit.counts.init import label_rates
from wbdit.counts.likelihood import CountLikelihood
from wbdit.data.normalize import log_library_sizes
from wbdit.nn.denoiser import Denoiser
from wbdit.ops import reference
from wbdit.schedule import NoiseSchedule, Prediction

ROUNDS = 4  # of bringing the expected counts to the library size
NOISE_AXES = 16  # directions that starting noise may be wider along; beyond them spread is mostly sequencing's


class CountDenoiser(nn.Module):
    """A denoiser, and the likelihood that makes counts of what it answers.

    The conditioning is one vector per cell, made by :meth:`embed`: the denoiser's own, of labels and library
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
    stop
        Timestep at which sampling ends and counts are drawn.

    Attributes
    ----------
    label_rates
        Logarithm of how much more of each gene a label makes, ``(sum of K_c + 1, G)``, see :func:`label_rates`.
    label_dispersion
        What a label adds to :attr:`CountLikelihood.dispersion_knots`, of the same shape; learned. At high noise a
        gene's counts are as dispersed as the label's: with one dispersion for all labels, means fit and zeros do not.
    noise_axes, noise_factors
        Orthonormal directions ``(K, G)`` along which sampling begins with wider noise, and how much wider ``(K,)``; see
        :mod:`wbdit.training.calibration`.
    """

    prediction: Prediction = "x0"

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: CountLikelihood,
        schedule: NoiseSchedule,
        input_dropout: float = 0.0,
        stop: int = 500,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.likelihood = likelihood
        self.schedule = schedule
        self.input_dropout = input_dropout
        self.stop = stop
        self.label_sizes = denoiser.label_sizes
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
    def init_from_data(self, counts: np.ndarray, codes: np.ndarray, center: np.ndarray, scale: float) -> None:
        """Take what is known before training from the cells.

        Parameters
        ----------
        counts
            Raw counts ``(n, G)``.
        codes
            Labels ``(n, C)`` int64.
        center, scale
            Of the values, see :class:`wbdit.data.preprocessor.Preprocessor`.
        """
        self.likelihood.init_from_data(counts, center, scale)
        log_library = log_library_sizes(counts)
        self.log_library_scale.copy_(torch.tensor([log_library.mean(), max(log_library.std(), 1e-3)]))
        self.label_rates.copy_(torch.from_numpy(label_rates(counts, codes, self.denoiser.label_sizes)))
        if self.denoiser.has_cell_token:
            self.denoiser.cell_token.init_principal_components(torch.from_numpy((np.log1p(counts) - center) / scale))

    @property
    def network(self) -> Denoiser:
        """The network itself, without the likelihood."""
        return self.denoiser

    def start(self, noise: Tensor) -> Tensor:
        """Return what sampling starts from, given Gaussian noise ``(B, 1, G)``: wider along :attr:`noise_axes`."""
        with torch.autocast(noise.device.type, enabled=False):
            return noise + (noise @ self.noise_axes.mT * (self.noise_factors - 1)) @ self.noise_axes

    def embed(self, y: Tensor | None, log_library: Tensor | None = None) -> Tensor:
        """Return the conditioning ``(B, d + 2 G)`` fp32.

        Parameters
        ----------
        y
            Labels ``(B,)`` or ``(B, C)`` int64, as :class:`wbdit.nn.denoiser.Denoiser` takes them; None for no labels.
        log_library
            Natural logarithm of the library size over the model's genes, ``(B,)``.

        Raises
        ------
        ValueError
            If there are no library sizes.
        """
        if log_library is None:
            raise ValueError("a model of counts is conditioned on library sizes: give log_library")
        mean, deviation = self.log_library_scale
        vector = self.library_embedder(((log_library - mean) / deviation)[:, None])
        rates = (log_library - mean)[:, None].expand(-1, self.denoiser.input_size)
        dispersion = torch.zeros_like(rates)
        if self.denoiser.label_sizes and y is not None:
            embedder = self.denoiser.y_embedder
            y = embedder.drop(y) if self.training else y
            vector = vector + embedder.embed(y)
            sizes = [labels + 1 for labels in self.denoiser.label_sizes]
            tables = self.label_rates.split(sizes), self.label_dispersion.split(sizes)
            for rate, wider, column in zip(*tables, y.reshape(len(y), len(sizes)).unbind(1), strict=True):
                rates, dispersion = rates + rate[column], dispersion + wider[column]
        return torch.cat([vector, rates, dispersion], dim=1)

    def forward(self, x: Tensor, t: Tensor, *, conditioning: Tensor) -> Tensor:
        """Return the mean of the clean values, fp32, without gradients: what samplers go by.

        Parameters
        ----------
        x
            Noised cells ``(B, 1, G)``.
        t
            Timesteps ``(B,)``.
        conditioning
            ``(B, d + 2 G)``, see :meth:`embed`.
        """
        with torch.no_grad():
            return ops.count_mean(*self._posterior(x, t, *self._answer(x, t, conditioning)))[:, None]

    def nll(self, x: Tensor, t: Tensor, conditioning: Tensor, levels: Tensor) -> Tensor:
        """Return the negative log-likelihood ``(B, G)``, in nats, of the levels ``(B, G)`` uint8 behind noised cells.

        `x`, `t` and `conditioning` as in :meth:`forward`.
        """
        posterior = self._posterior(x, t, *self._answer(x, t, conditioning))
        return ops.count_nll(*(*posterior, levels))

    def fix_library(self, call: Any, log_library: Tensor) -> FixedLibrary:
        """Return what samplers call for cells of given library sizes: `call`, this model or its CUDA graph, at them."""
        return FixedLibrary(call, log_library)

    def finish(self, x: Tensor, model: Any, uniform: Callable[[], Tensor], library: Tensor) -> Tensor:
        """Draw counts ``(B, G)`` where sampling has ended at ``x`` ``(B, 1, G)``, see :meth:`draw`."""
        t = torch.full((len(x),), self.stop, device=x.device)
        return self.draw(x, t, model.conditioning, uniform(), library)

    @torch.no_grad()
    def draw(self, x: Tensor, t: Tensor, conditioning: Tensor, u: Tensor, library: Tensor) -> Tensor:
        """Draw counts from their distribution at noised cells.

        The distributions are first moved, all of a cell's rates alike, until the counts that they expect of the cell
        add up to its library size: what a few steps of a sampler lose of it is given back.

        Parameters
        ----------
        x, t, conditioning
            As in :meth:`forward`.
        u
            Uniform numbers ``(B, G)``; one draws the level and, where that is a bin, the count in it.
        library
            Library sizes ``(B,)``.

        Returns
        -------
        Counts ``(B, G)`` int32.
        """
        log_rate, dispersion = self._answer(x, t, conditioning)
        # the denoiser may compute in bf16; expected counts of a whole cell, rounded to 8 bits, would miss its library
        with torch.autocast(x.device.type, enabled=False):
            return self._draw(x, t, log_rate, dispersion, u, library)

    def _draw(self, x: Tensor, t: Tensor, log_rate: Tensor, dispersion: Tensor, u: Tensor, library: Tensor) -> Tensor:
        known = self.likelihood
        for _ in range(ROUNDS):
            p = self._probabilities(x, t, log_rate, dispersion)
            log_rate = log_rate + (library / (p @ known.middle).sum(1)).log()[:, None]
        p = self._probabilities(x, t, log_rate, dispersion)
        below = p.cumsum(-1)
        level = torch.minimum((below < u[..., None]).sum(-1), known.n_levels - 1)[..., None]
        # how far along its level's step u lies says where in the bin the count is
        share = 1 - ((below.gather(-1, level) - u[..., None]) / p.gather(-1, level))[..., 0]
        lowest, highest = (edge[level[..., 0]] for edge in (known.lowest, known.highest))
        return (lowest + (share * (highest - lowest + 1)).int()).clamp(min=lowest, max=highest)

    def _probabilities(self, x: Tensor, t: Tensor, log_rate: Tensor, dispersion: Tensor) -> Tensor:
        """Return the probability of each level ``(B, G, L)``."""
        return reference.count_logits(*self._posterior(x, t, log_rate, dispersion))[0].softmax(-1)

    def _answer(self, x: Tensor, t: Tensor, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        """Return what :meth:`CountLikelihood.terms` takes: log rates and dispersions, ``(B, G)`` fp32."""
        vector, rates, dispersion = conditioning.split([self.denoiser.hidden_size, x.shape[-1], x.shape[-1]], dim=1)
        seen = F.dropout(x, self.input_dropout, self.training)
        answer = self.denoiser(seen, t, conditioning=vector).float()
        if self.denoiser.out_channels == 2:
            dispersion = dispersion + answer[:, 1]
        return answer[:, 0] + rates, dispersion

    def _posterior(self, x: Tensor, t: Tensor, log_rate: Tensor, dispersion: Tensor) -> tuple[Tensor, ...]:
        """Return the first arguments of :func:`wbdit.ops.count_nll` and its kin."""
        known = self.likelihood
        tables = *known.prior, known.values, known.middle, known.n_levels
        return x[:, 0], *known.terms(log_rate, dispersion, t), *self.schedule.level_tensors(t), *tables


class FixedLibrary:
    """A model of counts at fixed library sizes, as samplers and :class:`wbdit.samplers.GuidedModel` call a model.

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
        self.label_sizes: tuple[int, ...] = model.label_sizes

    @property
    def conditioning(self) -> Tensor:
        """What cells without labels are conditioned on, ``(B, d + 2 G)``."""
        return self.embed(None)

    def embed(self, y: Tensor | None) -> Tensor:
        """Return the conditioning of labels, one or several for each cell, at the cells' library sizes."""
        times = 1 if y is None else len(y) // len(self.log_library)
        return self.model.embed(y, self.log_library.repeat(times))

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, conditioning: Tensor | None = None) -> Tensor:
        """Answer for noised cells ``(B, 1, G)`` at timesteps ``(B,)``, with labels or their conditioning."""
        return self.model(x, t, conditioning=self.embed(y) if conditioning is None else conditioning)
