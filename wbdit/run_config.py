"""What is known of a run besides its weights and its cells: the content of ``config.json``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from wbdit._version import __version__
from wbdit.errors import InputError

FORMAT = 1  # of the RUN folder; raised when an older wbdit could not read it


@dataclass(frozen=True)
class LikelihoodConfig:
    """How counts come from a denoiser, see :mod:`wbdit.counts`.

    Attributes
    ----------
    n_bins
        Number of bins of counts.
    stop
        Timestep at which sampling ends and counts are drawn.
    input_dropout
        Share of the genes that the denoiser does not see in training.
    learned_dispersion
        Whether the denoiser answers how wide each count's distribution is, too.
    """

    n_bins: int
    stop: int
    input_dropout: float
    learned_dispersion: bool


@dataclass(frozen=True)
class Trained:
    """How long a run was trained.

    Attributes
    ----------
    steps, seconds, epochs
        Optimizer steps, training time, and passes over the cells, all sessions together.
    cells
        Number of training cells.
    """

    steps: int = 0
    seconds: float = 0.0
    cells: int = 0
    epochs: float = 0.0


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run.

    Attributes
    ----------
    preset
        Name of the preset it was begun with.
    seed
        Of weights, order, timesteps and noise.
    denoiser
        "wbdit" or "dit".
    model, schedule
        Arguments of the denoiser and of :class:`wbdit.NoiseSchedule`.
    training, budget
        Fields of :class:`wbdit.training.config.Training` and :class:`wbdit.training.config.Budget`.
    likelihood
        How counts come from the denoiser; None where it sees values of another kind.
    model_hash
        SHA-256 of the weights, see :func:`wbdit.checkpoint.state_hash`.
    trained
        How long it was trained.
    format
        Of the RUN folder.
    wbdit, torch
        Versions that the run was begun with.
    """

    preset: str
    seed: int
    denoiser: str
    model: dict[str, Any]
    schedule: dict[str, Any]
    training: dict[str, Any]
    budget: dict[str, Any]
    likelihood: LikelihoodConfig | None = None
    model_hash: str = ""
    trained: Trained = field(default_factory=Trained)
    format: int = FORMAT
    wbdit: str = __version__
    torch: str = str(torch.__version__)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> RunConfig:
        """Read what :meth:`to_dict` returned.

        Raises
        ------
        InputError
            If a field is missing or unknown, or the run is of a newer wbdit.
        """
        if not isinstance(content.get("format"), int):
            raise InputError("it is not the configuration of a wbdit run")
        if content["format"] > FORMAT:
            raise InputError(
                f"it was written by wbdit {content.get('wbdit', '?')} (format {content['format']}), this one reads up "
                f"to format {FORMAT}: update wbdit"
            )
        try:
            likelihood, trained = content.get("likelihood"), Trained(**content.get("trained", {}))
            parts = {"likelihood": LikelihoodConfig(**likelihood) if likelihood else None, "trained": trained}
            return cls(**{**content, **parts})
        except TypeError as error:
            raise InputError(f"it does not fit this wbdit ({error}): is the run complete?") from error

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as they go into ``config.json``."""
        return dataclasses.asdict(self)
