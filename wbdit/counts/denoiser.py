"""A denoiser that predicts a distribution over each gene's counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wbdit import ops
from wbdit._draws import draw
from wbdit.counts.closed_form import LabelGaussians
from wbdit.counts.combinations import Combinations
from wbdit.counts.foretell import Foretelling
from wbdit.counts.fused_steps import CountSteps
from wbdit.counts.init import ExpectedCounts, label_rates
from wbdit.counts.likelihood import CountLikelihood
from wbdit.counts.noise_table import NoiseTable
from wbdit.counts.trend import CovariateTrend
from wbdit.data.cell_matrix import CellMatrix
from wbdit.data.components import components_of
from wbdit.data.statistics import Statistics, training_combinations, training_groups
from wbdit.nn.denoiser import Denoiser
from wbdit.nn.fused_steps import DenoiserSteps, FusedSteps
from wbdit.ops.reference import count_probabilities
from wbdit.run_config import CombinationRows
from wbdit.schedule import NoiseSchedule, Prediction

COMPONENTS = 64  # of the cells, with which the cell token begins
NOISE_AXES = 16  # principal components with scaled initial noise; later ones are mostly sequencing noise


class CountDenoiser(nn.Module):
    """A denoiser with a likelihood of counts.

    The conditioning is one vector per cell, made by :meth:`embed`. It concatenates the denoiser's own conditioning
    (labels, library size and covariates), the log ratio of each gene's expected count to the average cell's, and the
    offset of each gene's dispersion that labels and covariates give.

    Parameters
    ----------
    denoiser
        Network that predicts each gene's log mean count, relative to the expectation from labels and library size. With
        two outputs, the second is an offset of :attr:`CountLikelihood.dispersion_knots`. A gene that is on or off
        within a label is most uncertain at timesteps at which both states are likely. One dispersion for all cells of a
        label would give the right mean counts. But mean log counts, which samplers use, would differ too little.
    likelihood
        Distribution of the counts.
    schedule
        Noise schedule.
    input_dropout
        Share of the genes that are hidden from the denoiser in training mode.
    stop
        Timestep at which sampling ends and counts are drawn.
    combinations
        Numbers of label combinations with tables of their own; None for none.
    gaussians
        Number of label combinations with a Gaussian of their own; None for no Gaussian at all.
    places
        Number of training cells near which cells start; 0 for none.
    noise_table
        Whether these combinations have a table of the denoiser's output at pure noise.
    rate_prior
        Strength of the prior on what the denoiser adds to log rates, in counts, see
        :class:`wbdit.training.losses.CountNLL`. Unless it is 0, the rates of labels are learned beside it.

    Attributes
    ----------
    label_rates
        Log ratio of each label's expression to the average, ``(sum_c (K_c + 1), G)``; starts as :func:`label_rates`.
        With several label columns, the rates of their combinations are learned instead.
    label_dispersion
        Each label's offset of :attr:`CountLikelihood.dispersion_knots`, ``(sum_c (K_c + 1), G)``; learned. At high
        noise a gene's counts are as dispersed as the label's. One dispersion for all labels would fit the means but not
        the zeros.
    combinations
        Rates and dispersions of combinations of labels, see :class:`wbdit.counts.combinations.Combinations`; None for a
        run with one label column. Cells with all labels have the dispersions of their combination.
    gaussians
        What sampling starts from where it holds, see :class:`wbdit.counts.closed_form.LabelGaussians`; None in runs of
        older versions.
    noise_table
        The denoiser's output at pure noise, see :class:`wbdit.counts.noise_table.NoiseTable`; None in runs of older
        versions, with covariates, and where it would be too large.
    trend
        Offsets of rates and dispersions along the covariates, see :class:`wbdit.counts.trend.CovariateTrend`; only for
        a denoiser with covariates.
    noise_axes, noise_factors
        Orthonormal directions ``(K, G)`` along which the initial noise is scaled, and the factors ``(K,)``; see
        :mod:`wbdit.training.calibration`. For sampling from pure noise only.
    """

    prediction: Prediction = "x0"

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: CountLikelihood,
        schedule: NoiseSchedule,
        input_dropout: float = 0.0,
        stop: int = 500,
        combinations: CombinationRows | None = None,
        gaussians: int | None = None,
        places: int = 0,
        noise_table: bool = False,
        rate_prior: float = 0.0,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.likelihood = likelihood
        self.schedule = schedule
        self.input_dropout = input_dropout
        self.stop = stop
        self.rate_prior = rate_prior
        self.label_sizes = denoiser.label_sizes
        width, genes = denoiser.hidden_size, denoiser.input_size
        self.library_embedder = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.normal_(self.library_embedder[2].weight, std=0.02)  # type: ignore[arg-type]
        nn.init.zeros_(self.library_embedder[2].bias)  # type: ignore[arg-type]
        rows = sum(labels + 1 for labels in denoiser.label_sizes)
        learned = rate_prior > 0 and rows > 0
        self.label_rates = nn.Parameter(torch.zeros(rows, genes), requires_grad=learned and combinations is None)
        self.label_dispersion = nn.Parameter(torch.zeros(rows, genes), requires_grad=rows > 0)
        self.combinations = None
        if combinations is not None:
            self.combinations = Combinations(denoiser.label_sizes, genes, width, combinations, learned)
        self.gaussians = None
        if gaussians is not None:
            self.gaussians = LabelGaussians(genes, gaussians, len(denoiser.label_sizes), places)
        self.noise_table = NoiseTable(gaussians or 0, denoiser.out_channels, genes) if noise_table else None
        if denoiser.n_covariates:
            self.trend = CovariateTrend(denoiser.n_covariates, genes)
        self.register_buffer("log_library_scale", torch.tensor([0.0, 1.0]))  # mean and std of ln(library size)
        self.register_buffer("noise_axes", torch.zeros(NOISE_AXES, genes))
        self.register_buffer("noise_factors", torch.ones(NOISE_AXES))

    log_library_scale: Tensor
    noise_axes: Tensor
    noise_factors: Tensor

    @torch.no_grad()
    def init_from_data(
        self,
        cells: CellMatrix,
        codes: np.ndarray,
        center: np.ndarray,
        scale: float,
        covariates: np.ndarray | None = None,
        statistics: Statistics | None = None,
        foretelling: Foretelling | None = None,
    ) -> None:
        """Initialize the likelihood, the label rates, the trends and the library scale from the training cells.

        A denoiser with a cell token also gets the principal components of the cells, or of a random sample of many
        cells, see :mod:`wbdit.data.components`.

        Parameters
        ----------
        cells
            Raw counts of n cells by G genes.
        codes
            Labels ``(n, C)`` int64.
        center, scale
            Center ``(G,)`` and scale of the values, see :class:`wbdit.data.preprocessor.Preprocessor`.
        covariates
            Scaled covariates ``(n, K)``, for a denoiser with covariates.
        statistics
            Statistics of the cells with :func:`wbdit.data.statistics.training_groups` and
            :func:`wbdit.data.statistics.training_combinations`, if they were learned before.
        foretelling
            What these statistics foretell of unseen combinations of labels, if it is known.
        """
        if statistics is None:
            groups = training_groups(codes, self.label_sizes, covariates)
            combined = training_combinations(codes, self.label_sizes, cells.shape[1])
            statistics = Statistics.of(cells, "log1p", groups, combined)
        self.likelihood.init_from_data(statistics, center, scale)
        library = statistics.totals
        log_library = np.log(np.maximum(library, 1))
        self.log_library_scale.copy_(torch.tensor([log_library.mean(), max(log_library.std(), 1e-3)]))
        totals, columns = statistics.matrix_mean * len(library), len(self.label_sizes)
        rates = label_rates(totals, statistics.sums[:columns], codes, library)
        self.label_rates.copy_(torch.from_numpy(rates))
        if self.combinations is not None:
            self._init_combinations(codes, rates, statistics, foretelling)
        if covariates is not None:
            expected = ExpectedCounts(totals, codes, library, rates, self.label_sizes)
            self.trend.init_from_data(covariates, statistics.sums[columns:], expected)
        if self.denoiser.has_cell_token:
            found = components_of(cells, "log1p", COMPONENTS)
            variances, axes = torch.from_numpy(found.variances / scale**2), torch.from_numpy(found.axes)
            self.denoiser.cell_token.init_principal_components(variances, axes)

    def _init_combinations(
        self, codes: np.ndarray, rates: np.ndarray, statistics: Statistics, foretelling: Foretelling | None
    ) -> None:
        assert self.combinations is not None
        foretelling = foretelling or Foretelling.of(codes, self.label_sizes, statistics)
        assert foretelling is not None
        tables = np.split(rates.astype(np.float64), np.cumsum([labels + 1 for labels in self.label_sizes])[:-1])
        expected = self.likelihood.shares
        for table in tables:  # one more axis for each column
            expected = expected[..., None, :] * np.exp(table[:-1])
        self.combinations.init_from_data(foretelling, expected, self.likelihood, float(self.log_library_scale[0]))

    @property
    def network(self) -> Denoiser:
        """The denoiser, without the likelihood."""
        return self.denoiser

    def start(self, noise: Tensor) -> Tensor:
        """Return the initial state of sampling: Gaussian noise ``(B, 1, G)``, scaled along :attr:`noise_axes`."""
        with torch.autocast(noise.device.type, enabled=False):
            return noise + (noise @ self.noise_axes.mT * (self.noise_factors - 1)) @ self.noise_axes

    @property
    def first_timestep(self) -> int:
        """Timestep at which sampling starts in closed form; 0 where it starts from pure noise."""
        return 0 if self.gaussians is None else int(self.gaussians.timestep)

    @torch.no_grad()
    def mean_at_noise(self, noise: Tensor, rows: Tensor, log_library: Tensor, conditioning: Tensor) -> Tensor:
        """Return what :meth:`forward` gives at pure noise, with the denoiser's output from :attr:`noise_table`.

        Parameters
        ----------
        noise, conditioning
            As in :meth:`forward`.
        rows
            Combinations of labels ``(B,)``, see :meth:`LabelGaussians.rows`; not 0.
        log_library
            As in :meth:`embed`.

        Returns
        -------
        Values ``(B, 1, G)`` fp32.
        """
        assert self.noise_table is not None
        highest = torch.full((1,), self.schedule.noise_steps - 1, device=noise.device).expand(len(noise))
        return self.posterior_mean(noise, highest, self.noise_table(rows - 1, log_library), conditioning)

    def embed(self, y: Tensor | None, log_library: Tensor | None = None, covariates: Tensor | None = None) -> Tensor:
        """Return the conditioning ``(B, d + 2 G)`` fp32.

        Parameters
        ----------
        y
            Labels ``(B,)`` or ``(B, C)`` int64, as :class:`wbdit.nn.denoiser.Denoiser` takes them; None for no labels.
        log_library
            Natural logarithm of the library size over the model's genes, ``(B,)``.
        covariates
            Scaled covariates ``(B, K)`` fp32. NaN means "not given", as does None for all of them.

        Raises
        ------
        ValueError
            If `log_library` is None.
        """
        if log_library is None:
            raise ValueError("a count model is conditioned on library sizes: give log_library")
        mean, deviation = self.log_library_scale
        vector = self.library_embedder(((log_library - mean) / deviation)[:, None])
        rates = (log_library - mean)[:, None].expand(-1, self.denoiser.input_size)
        dispersion = torch.zeros_like(rates)
        y = y if self.denoiser.label_sizes else None
        if covariates is None:
            y = self.denoiser.y_embedder.drop(y) if self.training and y is not None else y
        else:
            if self.training:
                y, covariates = self.denoiser.drop_conditions(y, covariates)
            vector = vector + self.denoiser.covariate_embedder(covariates)
            rate, wider = self.trend(covariates)
            rates, dispersion = rates + rate, dispersion + wider
        if y is not None:
            columns = y.reshape(len(y), len(self.denoiser.label_sizes)).unbind(1)
            sizes = [labels + 1 for labels in self.denoiser.label_sizes]
            tables = self.label_rates.split(sizes), self.label_dispersion.split(sizes)
            of_labels = dispersion
            for rate, wider, column in zip(*tables, columns, strict=True):
                # an embedding: see CountLikelihood.dispersion_at
                rates, of_labels = rates + F.embedding(column, rate), of_labels + F.embedding(column, wider)
            if self.combinations is None:
                dispersion = of_labels
            else:
                given = self.combinations(y)
                y, vector, rates = given.shown, vector + given.vector, rates + given.rates
                at_noise = given.mixture_logits - self.likelihood.dispersion_knots[-1]
                dispersion = torch.where(given.named, dispersion + at_noise, of_labels)
            vector = vector + self.denoiser.y_embedder.embed(y)
        return torch.cat([vector, rates, dispersion], dim=1)

    def forward(self, x: Tensor, t: Tensor, *, conditioning: Tensor) -> Tensor:
        """Return the posterior mean of the clean values, without gradients; samplers use it as x_0.

        Parameters
        ----------
        x
            Noised cells ``(B, 1, G)``.
        t
            Timesteps ``(B,)``.
        conditioning
            ``(B, d + 2 G)``, see :meth:`embed`.

        Returns
        -------
        Values ``(B, 1, G)`` fp32.
        """
        with torch.no_grad():
            return ops.count_mean(*self._posterior(x, t, *self._answer(x, t, conditioning)))[:, None]

    def output(self, x: Tensor, t: Tensor, conditioning: Tensor) -> Tensor:
        """Return the denoiser's output ``(B, C, G)``, given the arguments of :meth:`forward`."""
        return self.denoiser(self._hide(x), t, conditioning=self._split(conditioning)[0])

    @torch.no_grad()
    def posterior_mean(self, x: Tensor, t: Tensor, output: Tensor, conditioning: Tensor) -> Tensor:
        """Return what :meth:`forward` does, given the denoiser's output ``(B, C, G)``."""
        return ops.count_mean(*self._posterior(x, t, *self._offset(output, conditioning)))[:, None]

    def fuse_steps(self, x: Tensor, times: Tensor, *, conditioning: Tensor) -> CountSteps | None:
        """Prepare the calls of a sampler, where one op runs the denoiser; see :meth:`wbdit.WBDiT.fuse_steps`.

        Parameters
        ----------
        x, times
            As in :meth:`wbdit.WBDiT.fuse_steps`.
        conditioning
            As in :meth:`forward`.
        """
        if self.training or self._forward_hooks or self._forward_pre_hooks:
            return None
        vector, *offsets = self._split(conditioning)
        calls = self.denoiser.fuse_steps(x, times, conditioning=vector)
        if not isinstance(calls, DenoiserSteps):
            return None
        return CountSteps(calls, self.likelihood, self.schedule, times, *offsets)

    def nll(self, x: Tensor, t: Tensor, conditioning: Tensor, levels: Tensor) -> Tensor:
        """Return the negative log-likelihood of the true levels, given noised cells.

        Parameters
        ----------
        x, t, conditioning
            As in :meth:`forward`.
        levels
            True levels ``(B, G)`` uint8, see :meth:`CountLikelihood.bin_of`.

        Returns
        -------
        Negative log-likelihood ``(B, G)`` in nats.
        """
        return self.nll_and_added(x, t, conditioning, levels)[0]

    def nll_and_added(self, x: Tensor, t: Tensor, conditioning: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Return :meth:`nll`, and what the denoiser adds to the rates of labels and library size, ``(B, G)`` each."""
        answer = self.output(x, t, conditioning)
        posterior = self._posterior(x, t, *self._offset(answer, conditioning))
        return ops.count_nll(*(*posterior, levels)), answer[:, 0]

    def fix_library(self, call: Any, log_library: Tensor) -> FixedLibrary:
        """Return a model for samplers: `call` (this model or its CUDA graph) at given library sizes."""
        return FixedLibrary(call, log_library)

    def finish(self, x: Tensor, model: Any, uniform: Callable[[], Tensor], library: Tensor) -> Tensor:
        """Draw counts ``(B, G)`` from the final state ``(B, 1, G)`` of a sampler, see :meth:`draw`."""
        t = torch.full((len(x),), self.stop, device=x.device)
        return self.draw(x, t, model.conditioning, uniform(), library)

    @torch.no_grad()
    def draw(self, x: Tensor, t: Tensor, conditioning: Tensor, u: Tensor, library: Tensor) -> Tensor:
        """Draw counts from their distribution, given noised cells.

        First, all rates of a cell are multiplied by one factor, so that its expected counts sum to its library size.
        This restores the counts that a sampler with few steps loses.

        Parameters
        ----------
        x, t, conditioning
            As in :meth:`forward`.
        u
            Uniform numbers ``(B, G)``. One number draws both the level and the count within a wide bin.
        library
            Library sizes ``(B,)``.

        Returns
        -------
        Counts ``(B, G)`` int32.
        """
        given = self._draw_terms(x, t, conditioning)
        # bf16 keeps 8 bits: too few for the sum of a cell's expected counts to match its library size
        with torch.autocast(x.device.type, enabled=False):
            return ops.count_draw(*(*given, self.likelihood.lowest, self.likelihood.highest, u, library))

    @torch.no_grad()
    def uniform_numbers(
        self, x: Tensor, t: Tensor, conditioning: Tensor, counts: Tensor, place: Tensor, library: Tensor
    ) -> Tensor:
        """Return the uniform numbers with which :meth:`draw` draws given counts.

        Of all numbers that give a count, `place` chooses one: 0 the smallest, 1 the largest. Counts that the likelihood
        cannot give, above a gene's highest level or with a probability of 0, get the number of the nearest possible.

        Parameters
        ----------
        x, t, conditioning, library
            As in :meth:`draw`.
        counts
            Counts ``(B, G)``.
        place
            Numbers ``(B, G)``, 0 to 1.

        Returns
        -------
        ``(B, G)`` fp32, 0 to 1.
        """
        given = self._draw_terms(x, t, conditioning)
        with torch.autocast(x.device.type, enabled=False):
            p, _ = count_probabilities(*given, library, rounds=4)  # type: ignore[misc,arg-type]
            level = torch.from_numpy(self.likelihood.bin_of(counts.cpu().numpy())).to(x.device, torch.int64)[..., None]
            lowest, highest = (edge[level[..., 0]] for edge in (self.likelihood.lowest, self.likelihood.highest))
            p, below = p.double(), p.double().cumsum(-1)
            inside = ((counts - lowest).clamp(min=0) + place) / (highest - lowest + 1)
            mass = p.gather(-1, level)[..., 0]
            reached = below.gather(-1, level)[..., 0] - mass + inside.clamp(max=1) * mass
            return (reached / below[..., -1]).float()

    def _draw_terms(self, x: Tensor, t: Tensor, conditioning: Tensor) -> tuple[Tensor, ...]:
        """Return the first arguments of :func:`wbdit.ops.count_draw`, up to the number of levels."""
        log_rate, dispersion = self._answer(x, t, conditioning)
        with torch.autocast(x.device.type, enabled=False):
            return x[:, 0], *self.likelihood.log_ratio(log_rate, dispersion, t), *self._tables(t)

    def _answer(self, x: Tensor, t: Tensor, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log rates and dispersions for :meth:`CountLikelihood.terms`, both ``(B, G)`` fp32."""
        return self._offset(self.output(x, t, conditioning), conditioning)

    def _offset(self, answer: Tensor, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        """Return what :meth:`_answer` does, given the denoiser's output."""
        _, rates, dispersion = self._split(conditioning)
        answer = answer.to(torch.promote_types(answer.dtype, torch.float32))
        if self.denoiser.out_channels == 2:
            dispersion = dispersion + answer[:, 1]
        return answer[:, 0] + rates, dispersion

    def _hide(self, x: Tensor) -> Tensor:
        """Return noised cells ``(B, 1, G)`` with some values hidden at random, in training mode."""
        if not self.training or self.input_dropout == 0:
            return x
        # dropout of ones: the factors for a whole batch, of which this may be a part
        return x * draw(len(x), lambda n: F.dropout(x.new_ones(n, *x.shape[1:]), self.input_dropout))

    def _split(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        """Return the denoiser's conditioning ``(B, d)``, and the offsets of rates and dispersions ``(B, G)``."""
        genes = self.denoiser.input_size
        return conditioning.split([self.denoiser.hidden_size, genes, genes], dim=1)

    def _posterior(self, x: Tensor, t: Tensor, log_rate: Tensor, dispersion: Tensor) -> tuple[Tensor, ...]:
        """Return the arguments that the ``wbdit.ops.count_*`` functions share."""
        return x[:, 0], *self.likelihood.terms(log_rate, dispersion, t), *self._tables(t)

    def _tables(self, t: Tensor) -> tuple[Tensor, ...]:
        known = self.likelihood
        return *self.schedule.level_tensors(t), *known.prior, known.values, known.middle, known.n_levels


class FixedLibrary:
    """A count model at fixed library sizes, for one run of a sampler or of :class:`wbdit.samplers.GuidedModel`.

    Labels and library sizes are embedded once: make a new one after the model's weights change.

    Parameters
    ----------
    model
        A :class:`CountDenoiser`, or a callable with its interface, such as its CUDA graph.
    log_library
        Natural logarithm of the library sizes ``(B,)``.

    Attributes
    ----------
    embeds_once
        Whether :class:`wbdit.samplers.GuidedModel` embeds labels once for all calls.
    """

    embeds_once = True

    def __init__(self, model: Any, log_library: Tensor) -> None:
        self.model = model
        self.log_library = log_library
        self.prediction: Prediction = model.prediction
        self.label_sizes: tuple[int, ...] = model.label_sizes

    @cached_property
    def conditioning(self) -> Tensor:
        """Conditioning of cells without labels, ``(B, d + 2 G)``."""
        return self.embed(None).detach()

    def embed(self, y: Tensor | None, covariates: Tensor | None = None) -> Tensor:
        """Return the conditioning at the cells' library sizes; the arguments may repeat the batch several times."""
        given = covariates if y is None else y
        times = 1 if given is None else len(given) // len(self.log_library)
        return self.model.embed(y, self.log_library.repeat(times), covariates)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, conditioning: Tensor | None = None) -> Tensor:
        """Return the posterior mean given noised cells ``(B, 1, G)``, timesteps ``(B,)`` and labels or conditioning."""
        return self.model(x, t, conditioning=self._condition(y, conditioning))

    def fuse_steps(
        self, x: Tensor, times: Tensor, y: Tensor | None = None, *, conditioning: Tensor | None = None
    ) -> FusedSteps | None:
        """Prepare the calls of a sampler, see :meth:`CountDenoiser.fuse_steps`."""
        prepare = getattr(self.model, "fuse_steps", None)
        return None if prepare is None else prepare(x, times, conditioning=self._condition(y, conditioning))

    def _condition(self, y: Tensor | None, conditioning: Tensor | None) -> Tensor:
        if conditioning is not None:
            return conditioning
        return self.conditioning if y is None else self.embed(y)
