"""The configuration of a run, as stored in ``config.json``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from wbdit._version import __version__
from wbdit.errors import InputError

FORMAT = 1  # of the RUN folder; increase it when older versions of wbdit cannot read the new one


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
    """

    n_bins: int
    stop: int
    input_dropout: float
    learned_dispersion: bool


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
            likelihood, trained = content.get("likelihood"), Trained(**content.get("trained", {}))
            parts = {"likelihood": LikelihoodConfig(**likelihood) if likelihood else None, "trained": trained}
            return cls(**{**content, **parts})
        except TypeError as error:
            raise InputError(f"its fields do not fit this version of wbdit ({error}): is the run complete?") from error

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of plain values for ``config.json``."""
        return dataclasses.asdict(self)
