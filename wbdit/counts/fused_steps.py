"""A count model's calls in a sampler: the denoiser, then the posterior mean of its answer with the update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from wbdit import ops
from wbdit.counts.likelihood import CountLikelihood
from wbdit.nn.fused_steps import DenoiserSteps
from wbdit.profiling import span
from wbdit.schedule import NoiseSchedule


class CountSteps:
    """The calls of a count model, see :class:`wbdit.nn.fused_steps.FusedSteps`.

    Parameters
    ----------
    denoiser
        The calls of the denoiser.
    likelihood, schedule
        Of the count model.
    times
        Timesteps of the calls ``(T,)`` on a CPU.
    rates, dispersion
        Offsets ``(B, G)`` that the conditioning gives.
    """

    def __init__(
        self,
        denoiser: DenoiserSteps,
        likelihood: CountLikelihood,
        schedule: NoiseSchedule,
        times: Tensor,
        rates: Tensor,
        dispersion: Tensor,
    ) -> None:
        self.denoiser = denoiser
        self.offsets = rates, dispersion
        self.inputs: Sequence[Tensor] = [*denoiser.inputs, rates, dispersion]
        self.levels = [schedule.levels(t) for t in times.tolist()]
        self.knots = likelihood.dispersion_at(times.to(rates.device, rates.dtype)).unbind(0)
        tables = *likelihood.prior.unbind(0), likelihood.values, likelihood.middle, likelihood.n_levels
        self.known = likelihood.log_size, likelihood.log_mean, *tables

    def step(
        self, i: int, x: Tensor, *, clean: tuple[float, float] | None, **update: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Call the model and apply the update; the model's output is the estimate of x_0 itself."""
        answer, (alpha, sigma) = self.denoiser.output(i, x), self.levels[i]
        with span("counts"):
            return ops.count_mean_step(
                *(x, answer, *self.offsets, self.knots[i], *self.known),
                **{"alpha": alpha, "sigma": sigma, **update, "keep": clean is not None},
            )
