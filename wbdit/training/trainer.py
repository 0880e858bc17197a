"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from wbdit._progress import progress_bar
from wbdit._signals import deferred_signals
from wbdit.data.loader import Batch, Batches
from wbdit.errors import InputError
from wbdit.ops import cpu
from wbdit.profiling import span
from wbdit.run_check import check_state
from wbdit.training.config import Budget, Training
from wbdit.training.distributed import LostProcess, Ranks, current
from wbdit.training.faults import SkippedSteps
from wbdit.training.losses import LossFunction
from wbdit.training.optimizer import AveragingAdamW
from wbdit.training.records import LogWindow, summary
from wbdit.training.step import BatchGradient, random_state, restore_random_state
from wbdit.training.validation import Validation

LOG_SECONDS = 2.0
SAVE_SECONDS = 300.0
DIAGNOSTICS_SHARE = 0.005  # largest share of the training time spent on diagnostics of the blocks
DIAGNOSTICS_CELLS = 16

VALIDATION_FACTS = ("validation_loss", "best_loss", "best_step", "stopped_early")

Diagnose = Callable[[Any, Tensor, Tensor, Tensor | None, Tensor | None], dict[str, list[float]]]


class Trainer:
    """Training loop of a model, until the budget is spent or the user interrupts.

    Parameters
    ----------
    loss_fn
        The model, on the device to train on, and its loss. Weights are trained in place. Timesteps are stratified over
        each batch, from ``loss_fn.lowest`` up.
    batches
        Batches of training cells.
    training, budget
        Optimizer settings and training budget.
    seed
        Seed of the order of cells, timesteps and noise.
    diagnose
        Function that measures the blocks on a few cells of a batch, such as
        :func:`wbdit.whitebox.measures.diagnostics`. It is called from time to time and its results are logged. It does
        not change the training.
    validation
        Loss of held-out cells, measured at regular steps and logged. With ``training.early_stopping``, training ends
        when it no longer decreases.
    ranks
        The processes that train together, each with a trainer of its own that has the same arguments; those of
        :func:`wbdit.training.distributed.current` by default. Their states are equal after each step.

    Attributes
    ----------
    step, seconds
        Optimizer steps and training time so far, earlier sessions included.
    low_precision
        Whether matrix products run in bf16.
    average
        Moving average of the weights, by name; the weights themselves if ``training.ema`` is 0.
    validation_loss, best_loss, best_step
        Last and lowest loss of the held-out cells, and the step of the lowest one; None before the first evaluation.
    stopped_early
        Whether the loss of the held-out cells has not decreased for ``training.early_stopping`` passes.
    skipped
        Steps that were skipped because their loss or gradient was not finite.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        batches: Batches,
        training: Training,
        budget: Budget,
        seed: int = 0,
        diagnose: Diagnose | None = None,
        validation: Validation | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or current()
        self.loss_fn = loss_fn
        self.model = model = loss_fn.model
        self.schedule = loss_fn.schedule
        self.batches = batches
        batches.own = self.ranks.part(batches.batch_size)
        self.training = training
        self.budget = budget
        self.device = batches.x.device
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().clone() if training.ema else p.detach() for n, p in self.weights.items()}
        self.optimizer = AveragingAdamW(
            loss_fn.groups(training.weight_decay),
            {p: self.average[name] for name, p in self.weights.items()} if training.ema else None,
            training.clip_norm,
            lr=training.learning_rate,
            betas=training.betas,
        )
        self.low_precision = choose_precision(training.precision, self.device) == "bf16"
        self.gradient = BatchGradient(
            loss_fn, list(self.weights.values()), self.ranks, self.low_precision, training.micro_batch
        )
        self.diagnose = diagnose
        self.validation = validation
        self.validation_loss: float | None = None
        self.best_loss: float | None = None
        self.best_step: int | None = None
        self.best: dict[str, Tensor] = {}  # averaged weights at the best step, with early stopping
        self.stopped_early = False
        self.last: tuple[Batch, Tensor] | None = None  # last step's batch and timesteps, of this process
        self.skipped = SkippedSteps()
        self.step = 0
        self.seconds = 0.0
        self._clock = 0.0  # the first process's seconds, which decide in all
        self._must_stop: Callable[[], bool] = lambda: False  # whether this process must stop
        self._is_asked = False  # whether a process was to stop during the last step
        with self._forked():
            torch.manual_seed(seed)
            self.random = random_state(self.device)

    @property
    def progress(self) -> float:
        """Used share of the budget, or of the most epochs if that is larger."""
        epochs = self.step / self.batches.per_epoch
        seconds = self.seconds if self.ranks.size == 1 else self._clock
        return max(self.budget.progress(seconds, epochs, self.step), self._share_of_most_epochs)

    @property
    def kept(self) -> dict[str, Tensor]:
        """Averaged weights that the run keeps, by name: with early stopping, those with the lowest validation loss."""
        return self.best or self.average

    @property
    def steps_in_all(self) -> int | None:
        """Optimizer steps until the training ends, earlier sessions included; None if only the clock limits them."""
        if self.budget.steps is not None:
            return self.budget.steps
        epochs = self.training.most_epochs if self.budget.epochs is None else self.budget.epochs
        return None if epochs is None else math.ceil(epochs * self.batches.per_epoch)

    @property
    def has_seen_enough(self) -> bool:
        """Whether training with a budget in minutes has reached the most epochs."""
        return self._share_of_most_epochs >= 1

    @property
    def _share_of_most_epochs(self) -> float:
        most = self.training.most_epochs
        return 0.0 if most is None or self.budget.minutes is None else self.step / (most * self.batches.per_epoch)

    def train(
        self,
        log: Callable[[dict[str, Any]], object] = lambda record: None,
        save: Callable[[], object] = lambda: None,
        bar: bool = True,
        watch: Callable[[], object] = lambda: None,
    ) -> bool:
        """Train until the budget is spent, the held-out cells' loss no longer decreases, or the user interrupts.

        Parameters
        ----------
        log
            Called every few seconds with step, epoch, loss, learning rate, cells per second and seconds, and from time
            to time with the results of `diagnose` and the loss of the held-out cells.
        save
            Called every few minutes, so that a long run can be resumed, and when another process is lost. Like `log`
            and `watch` it is called in the first process only.
        bar
            Show a progress bar on stderr.
        watch
            Called after every step.

        Returns
        -------
        True if the training is complete; False if Ctrl-C or another signal ended it early, after a complete step.

        Raises
        ------
        InputError
            If losses or gradients are not finite in several steps, see :mod:`wbdit.training.faults`, memory does not
            suffice, or another process fails.
        """
        self.model.train()
        saved = next_diagnosis = time.monotonic()
        window, first = LogWindow(saved), self.ranks.is_first
        shown = progress_bar("training", bar and first, self.progress)
        with self._forked(), deferred_signals() as self._must_stop, shown as show, self._saving_when_lost(save):
            restore_random_state(self.random, self.device)
            while self._goes_on and not self._is_stopped():
                start = time.monotonic()
                self._update()
                now = time.monotonic()
                self.seconds += now - start
                is_due = now - window.began > LOG_SECONDS or self.progress >= 1 or self._is_evaluated
                window.steps += 1
                if not first:
                    self.skipped.forget()
                elif is_due or self.device.type == "cpu":  # reading waits for a GPU
                    window.losses += self.skipped.read()
                if first:
                    watch()
                if is_due:
                    record = self._record(window, now)
                    if self._is_evaluated:
                        record |= self._validate()
                    if first and self.diagnose is not None and now >= next_diagnosis:
                        record |= self._diagnose()
                        next_diagnosis = now + (time.monotonic() - now) / DIAGNOSTICS_SHARE
                    if first:
                        log(record)
                        show(self.progress, summary(record))
                    window = LogWindow(now)
                if now - saved > SAVE_SECONDS:
                    self.random = random_state(self.device)
                    if first:
                        save()
                    saved = now
            self.random = random_state(self.device)
        self.model.eval()
        return not self._goes_on

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and metadata for a bit-exact continuation."""
        tensors = {f"weights.{name}": p.detach() for name, p in self.weights.items()}
        tensors |= {f"average.{name}": p for name, p in self.average.items() if self.training.ema}
        for name, p in self.weights.items():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[p].items()}
        tensors |= {f"best.{name}": p for name, p in self.best.items()}
        tensors |= {f"random.{device}": state for device, state in self.random.items()}
        tensors["order"] = self.batches.order
        facts = {
            "step": self.step,
            "seconds": self.seconds,
            "epoch": self.batches.epoch,
            "position": self.batches.position,
            "cells": len(self.batches.x),
            "has_best": bool(self.best),
            "skipped": self.skipped.count,
            **{name: getattr(self, name) for name in VALIDATION_FACTS},
        }
        return tensors, facts

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Restore the state returned by :meth:`state`.

        Raises
        ------
        InputError
            If the state belongs to other cells or another model.
        """
        if facts.get("cells") != len(self.batches.x):
            raise InputError(
                f"the run was trained on {facts.get('cells')} cells, not {len(self.batches.x)}: use the same cells"
            )
        try:
            check_state(tensors, facts, self.weights, len(self.batches.x), bool(self.training.ema))
            with torch.no_grad():
                for name, p in self.weights.items():
                    p.copy_(tensors[f"weights.{name}"])
                    if self.training.ema:
                        self.average[name].copy_(tensors[f"average.{name}"])
                    if facts["step"] > 0:  # the optimizer has no state before its first step
                        keys = ("step", "exp_avg", "exp_avg_sq")
                        self.optimizer.state[p] = {k: tensors[f"optimizer.{name}.{k}"].to(p.device) for k in keys}
            self.random = {k.removeprefix("random."): v for k, v in tensors.items() if k.startswith("random.")}
            self.batches.order = tensors["order"]
            self.step, self.seconds = int(facts["step"]), float(facts["seconds"])
            self._clock, self.skipped.count = self.seconds, int(facts.get("skipped", 0))
            self.batches.epoch, self.batches.position = int(facts["epoch"]), int(facts["position"])
            self.best = {
                name: tensors[f"best.{name}"].to(self.device) for name in self.weights if facts.get("has_best")
            }
            for name in VALIDATION_FACTS:
                setattr(self, name, facts.get(name, getattr(self, name)))
        except (InputError, KeyError, RuntimeError) as error:
            raise InputError(f"the saved training state does not fit this run ({error})") from error

    def _update(self) -> None:
        """Take one optimizer step; it is skipped if its loss or gradient is not finite."""
        with span("train step"):
            place = self.batches.order, self.batches.epoch, self.batches.position, random_state(self.device)
            with span("batch"):
                rows = self.batches.draw()
                t = self._timesteps(len(rows))
                own = self.ranks.part(len(rows))
                batch, own_t = self.batches.take(rows[own]), t[own]
                self.last = batch, own_t
            try:
                loss = self.gradient(batch, own_t, len(rows), self._meet)
            except LostProcess:  # back to the last complete step, so that it can be saved
                self.batches.order, self.batches.epoch, self.batches.position, random = place
                restore_random_state(random, self.device)
                raise
            with span("optimizer"):
                is_finite = self._descend(loss)
            self.skipped.note(self.step, rows, loss, is_finite)

    def _meet(self, out_of_memory: bool) -> bool:
        """Exchange with the other processes; return whether memory did not suffice in one of them."""
        met = self.ranks.exchange(self._must_stop(), out_of_memory, self.seconds if self.ranks.is_first else 0.0)
        self._is_asked, self._clock = met.stop > 0, met.number
        return met.out_of_memory > 0

    def _is_stopped(self) -> bool:
        """Whether a process must stop; all learn it during the same step."""
        return self._must_stop() if self.ranks.size == 1 else self._is_asked

    @contextmanager
    def _saving_when_lost(self, save: Callable[[], object]) -> Iterator[None]:
        """Save in the first process if another one is lost; not on a GPU, which may wait for the lost one's sum."""
        try:
            yield
        except LostProcess as error:
            self.random = random_state(self.device)
            self.model.eval()
            if self.ranks.is_first and self.device.type == "cpu":
                save()
                raise LostProcess(f"{error}; this training is saved at step {self.step}", True) from error
            raise

    @property
    def _goes_on(self) -> bool:
        return self.progress < 1 and not self.stopped_early

    @property
    def _is_evaluated(self) -> bool:
        """Whether the held-out cells are evaluated after this step: at regular steps, and at the end."""
        if self.validation is None:
            return False
        return self.step % self.validation.interval(self.batches.per_epoch) == 0 or self.progress >= 1

    def _validate(self) -> dict[str, float]:
        """Evaluate the averaged weights on the held-out cells, and keep them if they are the best."""
        assert self.validation is not None
        with self._forked(), self._averaged():
            self.validation.micro_batch = self.gradient.micro_batch
            loss = self.validation.loss(self.low_precision)
        if not math.isfinite(loss):
            raise InputError(f"training diverged: the loss of the held-out cells is {loss} at step {self.step}")
        self.seconds += self.validation.seconds or 0.0
        self.validation_loss = loss
        patience = self.training.early_stopping
        if self.best_loss is None or self.best_step is None or loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
            if patience is not None:
                self.best = {name: p.detach().clone() for name, p in self.average.items()}
        elif patience is not None:
            self.stopped_early = self.step - self.best_step >= patience * self.batches.per_epoch
        return {"validation_loss": round(loss, 6)}

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the averaged weights into the model, and its own weights back afterwards."""
        if not self.training.ema:
            yield
            return
        own = {name: p.detach().clone() for name, p in self.weights.items()}
        try:
            self._load(self.average)
            yield
        finally:
            self._load(own)

    @torch.no_grad()
    def _load(self, values: dict[str, Tensor]) -> None:
        for name, p in self.weights.items():
            p.copy_(values[name])

    @torch.no_grad()
    def _diagnose(self) -> dict[str, list[float]]:
        """Return the diagnostics for a few cells of the last batch, at widely spaced timesteps."""
        assert self.diagnose is not None
        assert self.last is not None
        batch, t = self.last
        some = slice(None, None, max(1, len(t) // DIAGNOSTICS_CELLS))
        with self._forked():  # leaves the random state of the training as it is
            return self.diagnose(*self.loss_fn.inputs(batch.rows(some), t[some]))

    def _descend(self, loss: Tensor) -> Tensor:
        """Clip the gradient, update the weights and their average; return whether loss and gradient are finite.

        The optimizer reads the flag on the device, so a GPU is not waited for. A step whose flag is false changes
        neither the weights nor the optimizer's state.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate() * group.get("factor", 1.0)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.weights.values() if p.grad is not None])
        is_finite = norm.isfinite() & loss.isfinite()
        self.step += 1
        # a smaller decay in early steps, so that the initial weights do not bias the average
        self.optimizer.decay = min(self.training.ema, (1 + self.step) / (10 + self.step))
        self.optimizer.norm, self.optimizer.found_inf = norm, is_finite.logical_not().float()
        self.optimizer.step()
        return is_finite

    def _timesteps(self, n: int) -> Tensor:
        """Draw `n` timesteps from the lowest to T - 1, one from each of `n` equal parts."""
        u = (torch.arange(n) + torch.rand(n)) / n
        lowest, beyond = self.loss_fn.lowest, self.schedule.noise_steps
        return (lowest + u * (beyond - lowest)).long().clamp(max=beyond - 1).to(self.device)

    def _learning_rate(self) -> float:
        warm = min(1.0, (self.step + 1) / max(self.training.warmup_steps, 1))
        final = self.training.final_rate
        cosine = 0.5 * (1 + math.cos(math.pi * min(self.progress, 1.0)))
        return self.training.learning_rate * warm * (final + (1 - final) * cosine)

    def _record(self, window: LogWindow, now: float) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": round(self.step / self.batches.per_epoch, 2),
            **window.facts(self.batches.batch_size, now),
            "learning_rate": self._learning_rate(),
            "seconds": round(self.seconds, 2),
        }

    @contextmanager
    def _forked(self) -> Iterator[None]:
        """Leave the user's random state unchanged."""
        with torch.random.fork_rng([self.device.index or 0] if self.device.type == "cuda" else []):
            yield


def choose_precision(precision: str, device: torch.device) -> str:
    """Return "fp32" or "bf16"; "auto" is bf16 on a GPU, and on a CPU with bf16 instructions and kernels."""
    if precision != "auto":
        return precision
    return "bf16" if cpu.prefers_bf16(device) else "fp32"
