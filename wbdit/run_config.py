"""The configuration of a run, as stored in ``config.json``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from wbdit._version import __version__
from wbdit.errors import InputError

FORMAT = 6  # of the RUN folder; increase it when older versions of wbdit cannot read the new one


class CombinationRows(NamedTuple):
    """Numbers of label combinations: with training cells, foretold for lack of them, and with them but foretold too."""

    seen: int
    foretold: int
    held_out: int


@dataclass(frozen=True)
class ForetoldFacts:
    """How well combinations of labels are foretold, see :mod:`wbdit.counts.foretell`.

    Attributes
    ----------
    left_out
        R2 of the change of mean log expression, by combination of the training cells that was left out.
    nearest
        By unseen combination, the one from which most is taken, and how alike the two are before the change.
    """

    left_out: dict[str, float] = field(default_factory=dict)
    nearest: dict[str, tuple[str, float]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> ForetoldFacts:
        """Build it from plain values."""
        nearest = {name: (donor, similarity) for name, (donor, similarity) in content["nearest"].items()}
        return cls(dict(content["left_out"]), nearest)

    def describe(self, name: str) -> str | None:
        """Return a sentence about an unseen combination; None if it is not foretold.

        Examples
        --------
        >>> from wbdit.run_config import ForetoldFacts
        >>> facts = ForetoldFacts({"B/stim": 0.8, "T/stim": 0.9}, {"NK/stim": ("T/stim", 0.91)})
        >>> facts.describe("NK/stim")  # doctest: +NORMALIZE_WHITESPACE
        'no training cell is NK/stim: it is foretold from other combinations, most from T/stim (similarity 0.91). Of 2
        combinations left out in turn, the change was foretold with an R2 of 0.85 (0.80 to 0.90)'
        """
        if name not in self.nearest:
            return None
        donor, similarity = self.nearest[name]
        known = sorted(self.left_out.values())
        of = f"Of {len(known)} combinations left out in turn, the change was foretold with an R2 of "
        judged = f". {of}{sum(known) / len(known):.2f} ({known[0]:.2f} to {known[-1]:.2f})" if known else ""
        return (
            f"no training cell is {name}: it is foretold from other combinations, most from {donor} (similarity "
            f"{similarity:.2f}){judged}"
        )


@dataclass(frozen=True)
class LikelihoodConfig:
    """Settings of the count likelihood, see :mod:`wbdit.counts`.

    Attributes
    ----------
    n_bins
        Number of count bins.
    stop
        Timestep at which sampling ends and counts are drawn.
    input_dropout
        Share of the genes that are hidden from the denoiser in training.
    learned_dispersion
        Whether the denoiser also predicts the dispersion of each count.
    combinations
        Numbers of label combinations with rates of their own; None for a run with one label column.
    gaussians
        Number of label combinations with a Gaussian of their own, see :mod:`wbdit.counts.closed_form`; None for a run
        of an older version.
    places
        Number of training cells near which generated cells start, see :mod:`wbdit.counts.cell_places`; 0 for a run of
        an older version.
    noise_table
        Whether these combinations have a table of the denoiser's output at pure noise, see
        :mod:`wbdit.counts.noise_table`.
    rate_prior
        Strength of the prior on what the denoiser adds to log rates, in counts; 0 for a run of an older version.
    """

    n_bins: int
    stop: int
    input_dropout: float
    learned_dispersion: bool
    combinations: CombinationRows | None = None
    gaussians: int | None = None
    places: int = 0
    noise_table: bool = False
    rate_prior: float = 0.0

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> LikelihoodConfig:
        """Build it from plain values."""
        rows = content.get("combinations")
        return cls(**{**content, "combinations": None if rows is None else CombinationRows(*rows)})


@dataclass(frozen=True)
class Trained:
    """Training totals of a run.

    Attributes
    ----------
    steps, seconds, epochs
        Optimizer steps, training time in seconds, and passes over the cells, summed over all resumes.
    cells
        Number of training cells, without those held out.
    validation_loss
        Loss of the held-out cells under the saved weights; None if no cells are held out.
    total_seconds, peak_gigabytes
        Duration of the last session, from the first check of the cells to the end of the calibration, and the largest
        memory of its process, on the GPU if it ran on one.
    estimated_seconds, estimated_gigabytes
        What the log foretold of them after the first seconds of the session; None if it was over before that.
    """

    steps: int = 0
    seconds: float = 0.0
    cells: int = 0
    epochs: float = 0.0
    validation_loss: float | None = None
    total_seconds: float = 0.0
    peak_gigabytes: float | None = None
    estimated_seconds: float | None = None
    estimated_gigabytes: float | None = None


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run.

    Attributes
    ----------
    preset
        Name of the preset that the run was started with; "custom" for a preset of the user's own.
    seed
        Random seed for weights, cell order, timesteps and noise.
    denoiser
        "wbdit" or "dit".
    model, schedule
        Arguments of the denoiser and of :class:`wbdit.NoiseSchedule`.
    training, budget
        Fields of :class:`wbdit.training.config.Training` and :class:`wbdit.training.config.Budget`.
    likelihood
        Settings of the count likelihood; None if the model predicts values instead of counts.
    foretold
        How well combinations of labels are foretold; None for a run with one label column.
    model_hash
        SHA-256 of the weights, see :func:`wbdit.checkpoint.state_hash`.
    trained
        Training totals.
    format
        Format version of the RUN folder.
    wbdit, torch
        Package versions that the run was started with.
    """

    preset: str
    seed: int
    denoiser: str
    model: dict[str, Any]
    schedule: dict[str, Any]
    training: dict[str, Any]
    budget: dict[str, Any]
    likelihood: LikelihoodConfig | None = None
    foretold: ForetoldFacts | None = None
    model_hash: str = ""
    trained: Trained = field(default_factory=Trained)
    format: int = FORMAT
    wbdit: str = __version__
    torch: str = str(torch.__version__)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> RunConfig:
        """Build a configuration from the dict of :meth:`to_dict`.

        Raises
        ------
        InputError
            If a field is missing or unknown, or the format is from a newer version of wbdit.
        """
        if not isinstance(content.get("format"), int):
            raise InputError("it is not the configuration of a wbdit run")
        if content["format"] > FORMAT:
            raise InputError(
                f"it was written by wbdit {content.get('wbdit', '?')} (format {content['format']}), but this version "
                f"reads formats up to {FORMAT}: update wbdit"
            )
        try:
            likelihood, foretold = content.get("likelihood"), content.get("foretold")
            parts = {
                "likelihood": LikelihoodConfig.from_dict(likelihood) if likelihood else None,
                "foretold": None if foretold is None else ForetoldFacts.from_dict(foretold),
                "trained": Trained(**content.get("trained", {})),
            }
            return cls(**{**content, **parts})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"its fields do not fit this version of wbdit ({error}): is the run complete?") from error

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of plain values for ``config.json``."""
        return dataclasses.asdict(self)
