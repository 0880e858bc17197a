"""How a run's cells are sampled: the sampler, its model calls, and where sampling starts."""

from __future__ import annotations

from typing import NamedTuple

from wbdit import samplers
from wbdit.counts.denoiser import CountDenoiser
from wbdit.errors import InputError
from wbdit.nn.denoiser import Denoiser
from wbdit.request_check import one_of, whole
from wbdit.schedule import NoiseSchedule

# Defaults for models with a count likelihood (docs/study.md): with a start in closed form, 3 calls of a second-order
# solver are as good as 15; from pure noise, 6 are, but for combinations of labels that training cells lack
# (docs/unseen.md).
COUNTS_SAMPLER: samplers.Name = "unipc"
DETERMINISTIC = ("unipc", "dpmpp")  # samplers that add no noise
COUNTS_CALLS, CALLS_FROM_NOISE, UNSEEN_CALLS = 3, 6, 15
RECAST_CALLS = 15  # down again: what a cell shares with its recast should not be lost to the solver
COUNTS_SPACING: samplers.Spacing = "uniform"


class Sampling(NamedTuple):
    """A sampler, its number of model calls and their spacing.

    Sampling starts in closed form at `start`, unless 0. The first of the calls then tells the mean there, if
    `calls_for_mean`: where no table does.
    """

    sampler: samplers.Name
    calls: int
    spacing: samplers.Spacing
    start: int = 0
    calls_for_mean: bool = False

    def timesteps(self, schedule: NoiseSchedule, stop: float) -> list[float]:
        """Return the timesteps of the calls from where sampling starts, and `stop`."""
        if not self.start:
            return [*samplers.timesteps(schedule, self.calls, self.spacing, stop=stop), stop]
        # with fewer calls, steps have the same length
        left = self.calls - self.calls_for_mean
        start = round(stop + (self.start - stop) * min(left / COUNTS_CALLS, 1))
        return [*(samplers.timesteps(schedule, left, self.spacing, stop=stop, start=start) if left else []), stop]


def choose_sampling(
    model: Denoiser | CountDenoiser,
    schedule: NoiseSchedule,
    sampler: samplers.Name | None,
    calls: int | None,
    spacing: samplers.Spacing | None,
    *,
    seen: bool,
    plain: bool,
    deterministic: bool = False,
) -> Sampling:
    """Return the requested sampler, calls and spacing, with the model's defaults in place of None.

    Parameters
    ----------
    model, schedule
        A trained model and its noise schedule.
    sampler, calls, spacing
        As in :meth:`wbdit.CellGenerator.generate`.
    seen
        Whether all cells have combinations of labels that training cells have.
    plain
        Whether they can start in closed form: they are seen and without guidance.
    deterministic
        Whether the sampler must not add noise.

    Raises
    ------
    InputError
        If a name is unknown, the number of calls does not fit, or the sampler adds noise though it must not.
    """
    start = model.first_timestep if plain else 0
    calls_for_mean = bool(start) and getattr(model, "noise_table", None) is None
    of_counts = model.stop > 0
    sampler = sampler or (COUNTS_SAMPLER if of_counts or deterministic else "ddim")
    one_of("sampler", sampler, list(samplers.BY_NAME))
    if deterministic and sampler not in DETERMINISTIC:
        raise InputError(
            f"`steer` shifts the noise that a cell starts from: use `sampler` {' or '.join(DETERMINISTIC)}"
        )
    default = samplers.BY_NAME[sampler]
    spacing = spacing or (COUNTS_SPACING if of_counts else default.spacing)
    one_of("spacing", spacing, samplers.SPACINGS)
    longest = (start + calls_for_mean if start else schedule.noise_steps - 1) - model.stop
    if calls is None:
        of_start = COUNTS_CALLS + calls_for_mean if start else CALLS_FROM_NOISE if seen else UNSEEN_CALLS
        calls = of_start if of_counts else default.calls or longest
    calls = whole("calls", calls)
    if not 1 <= calls <= longest:
        raise InputError(f"`calls` must be between 1 and {longest}, not {calls}")
    return Sampling(sampler, calls, spacing, start, calls_for_mean)
