"""What one of several processes does in tests/training/test_distributed.py: ranks_worker.py SCENARIO FOLDER."""

import logging
import os
import signal
import sys
from pathlib import Path

import torch
from helpers import make_cells, tiny_preset

import wbdit
from wbdit.checkpoint import state_hash
from wbdit.data.sources import TrainingData
from wbdit.errors import InputError
from wbdit.training import calibration
from wbdit.training.distributed import joined
from wbdit.training.losses import CountNLL
from wbdit.training.trainer import Trainer

RANK = int(os.environ.get("RANK", 0))
CELLS = make_cells(240, 30)
LOSS, UPDATE = CountNLL.__call__, Trainer._update


def fitted(folder=None, resume=False, steps=6, **training):
    given = {} if resume else {"label": "type", "preset": tiny_preset(precision="fp32", **training), "validation": 0.1}
    return wbdit.fit(CELLS, out=folder, resume=resume, steps=steps, progress=False, **given)


def at_step(step, action):
    """Let the last process do something before a step."""

    def update(trainer):
        if trainer.step == step - 1 and RANK == trainer.ranks.size - 1 > 0:
            action()
        return UPDATE(trainer)

    Trainer._update = update


def equal(folder):
    """Train, save, and train on from a save of other processes, if there is one."""
    calibration.CELLS = 200
    fitted(folder / "run", resume=(folder / "run").exists(), steps=12 if (folder / "run").exists() else 6)


def calibrate(folder):
    """Calibrate the noise of the run anew, in as many processes as there are."""
    calibration.CELLS = 300
    with joined():
        generator = wbdit.load(folder / "run")
        noise = calibration.calibrate_noise(generator, TrainingData.of(generator.preprocessor, CELLS))
    (folder / f"{RANK}.txt").write_text(state_hash(noise))


def memory(folder):
    """Run out of memory in one process only, then train as the log says."""

    def loss(loss_fn, batch, t):
        if len(t) > 10 and RANK == 1:
            raise torch.OutOfMemoryError("injected")
        return LOSS(loss_fn, batch, t)

    CountNLL.__call__ = loss
    one = fitted()
    CountNLL.__call__ = LOSS
    other = fitted(micro_batch=one.config.training["micro_batch"])
    assert one.config.training["micro_batch"] == 8
    assert one.config.model_hash == other.config.model_hash
    (folder / f"{RANK}.txt").write_text(one.config.model_hash)


def not_finite(folder):
    """Get a loss of one process that is not finite: all skip the step."""

    def loss(loss_fn, batch, t):
        spoilt = RANK == 1 and loss_fn.calls == 2
        loss_fn.calls += 1
        return LOSS(loss_fn, batch, t) * (torch.nan if spoilt else 1)

    CountNLL.calls, CountNLL.__call__ = 0, loss
    made = fitted(folder / "run")
    (folder / f"{RANK}.txt").write_text(made.config.model_hash)


def raises(folder):
    def fail():
        raise ValueError("a shape is wrong")

    at_step(4, fail)
    fitted(folder / "run")


def stop(folder):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT))
    made = fitted(folder / "run")
    (folder / f"{RANK}.txt").write_text(str(made.config.trained.steps))


def kill(folder):
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL))
    fitted(folder / "run")


if __name__ == "__main__":
    try:
        globals()[sys.argv[1]](Path(sys.argv[2]))
    except InputError as error:
        if getattr(error, "reports", True):
            print(f"wbdit: {error}", file=sys.stderr)
        logging.shutdown()
        sys.exit(2)
