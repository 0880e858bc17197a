"""Forecast of a training's duration and memory, from the first steps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from wbdit.training.memory import GIGABYTE, peak_memory
from wbdit.training.trainer import Trainer
from wbdit.training.validation import COST

WARMUP_STEPS = 5  # not measured: the first steps of a session may compile kernels
FEWEST_STEPS, FEWEST_SECONDS = 10, 3.0  # measured before the first estimate
SECOND_SHARE, SECOND_SECONDS = 0.2, 20.0  # of the budget, and measured anew, before the estimate is checked
TOLERANCE = 0.2  # a second estimate that differs by less is not logged
MARGIN = 1.1  # of the advised minutes, since the speed varies

logger = logging.getLogger("wbdit")


class Forecast:
    """Estimate of a session's total time and peak memory, logged after the first seconds and checked once.

    The time is the time spent so far, the mean duration of a step after warm-up times the steps that are left, the
    evaluations of held-out cells, and the calibration. A step's duration is measured over the whole loop, since a GPU
    works on after a step was launched.

    Parameters
    ----------
    trainer
        The training to watch: pass :meth:`watch` to :meth:`Trainer.train`.
    began
        Start of the session by :func:`time.monotonic`.
    calibration
        Function that measures how long the calibration will take in seconds; called once, at the first estimate.
    later_bytes
        Main memory that the calibration will add to what its measurement took.

    Attributes
    ----------
    seconds, gigabytes
        First estimate of the session's total time and peak memory; None before it, or if unknown.
    """

    def __init__(self, trainer: Trainer, began: float, calibration: Callable[[], float], later_bytes: int = 0) -> None:
        self.trainer = trainer
        self.began = began
        self.calibration = calibration
        self.later_bytes = later_bytes
        self.seconds: float | None = None
        self.gigabytes: float | None = None
        self._calibration_seconds: float | None = None
        self._warmup = WARMUP_STEPS
        self._first = 0  # step after which the measurement began, and its time
        self._since = began
        self._steps = 0  # measured since then
        self._measured = 0.0
        self._is_checked = False

    def watch(self) -> None:
        """Take note of a step that was just taken; log an estimate when it is time."""
        if self._warmup > 0:
            self._warmup -= 1
            self._restart()
            return
        self._steps = self.trainer.step - self._first
        self._measured = time.monotonic() - self._since - self._evaluated()
        if self.seconds is None:
            if self._steps >= FEWEST_STEPS and self._measured >= FEWEST_SECONDS and self.trainer.progress < 1:
                self.seconds, self.gigabytes = self._estimate(), self._memory()
                self._log(self.seconds)
                self._restart()
        elif not self._is_checked and self.trainer.progress >= SECOND_SHARE and self._measured >= SECOND_SECONDS:
            self._is_checked = True
            again = self._estimate()
            if abs(again / self.seconds - 1) > TOLERANCE:
                self._log(again)

    @property
    def minutes_for_all(self) -> float | None:
        """Minutes that all passes take, with a margin; None without a limit to passes or before the first step."""
        trainer = self.trainer
        if trainer.steps_in_all is None or trainer.step == 0:
            return None
        rate = self._rate if self._steps >= FEWEST_STEPS else trainer.seconds / trainer.step
        calibration = self._calibration_seconds
        if calibration is None:  # known in advance for a budget in minutes; no estimate needed it yet otherwise
            calibration = 0.0 if trainer.budget.minutes is None else self.calibration()
        minutes = MARGIN * (rate * trainer.steps_in_all + calibration) / 60
        return math.ceil(minutes) if minutes > 3 else math.ceil(10 * minutes) / 10

    def _restart(self) -> None:
        """Measure the steps from now on."""
        self._first, self._since, self._steps, self._measured = self.trainer.step, time.monotonic(), 0, 0.0

    def _evaluated(self) -> float:
        """Return the seconds of the evaluations that followed measured steps, except the one just taken."""
        validation = self.trainer.validation
        if validation is None:
            return 0.0
        interval = validation.interval(self.trainer.batches.per_epoch)
        times = (self.trainer.step - 1) // interval - (self._first - 1) // interval
        return times * (validation.seconds or 0.0)

    @property
    def _rate(self) -> float:
        """Mean duration of a step in seconds."""
        return self._measured / self._steps

    def _estimate(self) -> float:
        """Return the estimated total time of the session in seconds."""
        if self._calibration_seconds is None:
            self._calibration_seconds = self.calibration()
        spent = time.monotonic() - self.began
        return spent + self._steps_left() * (self._rate + self._evaluation()) + self._calibration_seconds

    def _steps_left(self) -> float:
        trainer = self.trainer
        left: list[float] = [] if trainer.steps_in_all is None else [trainer.steps_in_all - trainer.step]
        if trainer.budget.minutes is not None:
            left.append((60 * trainer.budget.minutes - trainer.seconds) / (self._rate + self._evaluation()))
        return max(0.0, min(left))

    def _evaluation(self) -> float:
        """Return the seconds per step that evaluations of held-out cells take."""
        validation = self.trainer.validation
        if validation is None:
            return 0.0
        each = validation.seconds or validation.batches * COST * self._rate
        return each / validation.interval(self.trainer.batches.per_epoch)

    def _memory(self) -> float | None:
        peak, device = peak_memory(self.trainer.device), self.trainer.device
        return None if peak is None else (peak + (self.later_bytes if device.type == "cpu" else 0)) / GIGABYTE

    def _log(self, seconds: float) -> None:
        per_epoch = self.trainer.batches.per_epoch
        passes = (self.trainer.step + self._steps_left()) / per_epoch
        of_all = short(passes)
        advice = ""
        if self.trainer.steps_in_all is not None and passes < 0.99 * self.trainer.steps_in_all / per_epoch:
            of_all += f" of {short(self.trainer.steps_in_all / per_epoch)}"
            advice = f" (give `minutes={self.minutes_for_all:g}` for all)"
        most = "at most " if self.trainer.training.early_stopping is not None else ""
        memory = "" if self.gigabytes is None else f"; {self.gigabytes:.1f} GB"
        logger.info(f"{most}about {duration(seconds)} for {of_all} passes over the cells{advice}{memory}")


def duration(seconds: float) -> str:
    """Return a duration in words, to two digits.

    Examples
    --------
    >>> from wbdit.training.forecast import duration
    >>> duration(47.3), duration(840), duration(9000)
    ('47 s', '14 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{short(seconds / 60, 2)} min" if seconds < 90 * 60 else f"{short(seconds / 3600, 2)} h"


def short(number: float, digits: int = 3) -> str:
    """Return a number with a few digits, and never with an exponent.

    Examples
    --------
    >>> from wbdit.training.forecast import short
    >>> short(12.345), short(2400), short(0.5)
    ('12.3', '2400', '0.5')
    """
    return f"{number:.0f}" if number >= 10 ** (digits - 1) else f"{number:.{digits}g}"
