"""Presets: a model, its schedule, how cells are brought to it, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from wbdit.errors import InputError
from wbdit.schedule import Kind

PRECISIONS = ("auto", "fp32", "bf16")


def check_precision(name: str) -> None:
    """Raise an InputError if there is no precision of that name."""
    if name not in PRECISIONS:
        raise InputError(f"no precision {name!r}: choose one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class Budget:
    """How long to train, all resumed sessions together: give one of the three.

    Attributes
    ----------
    minutes, epochs, steps
        Minutes of training time, passes over the cells, or optimizer steps.
    """

    minutes: float | None = None
    epochs: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.minutes, self.epochs, self.steps) if value is not None]
        if len(given) != 1:
            raise InputError("give one of minutes, epochs and steps")
        if given[0] <= 0:
            raise InputError(f"the training budget must be positive, not {given[0]:g}")

    def progress(self, seconds: float, epochs: float, steps: int) -> float:
        """Return the share of the budget that is used, 1 or more when it is spent."""
        if self.minutes is not None:
            return seconds / (60 * self.minutes)
        return epochs / self.epochs if self.epochs is not None else steps / self.steps  # type: ignore[operator]


@dataclass(frozen=True)
class Training:
    """Settings of the optimizer and the average.

    Attributes
    ----------
    batch_size
        Cells a step.
    learning_rate
        Peak rate of AdamW (Loshchilov and Hutter 2019).
    betas, weight_decay
        Its other settings.
    warmup_steps
        Steps over which the rate rises from zero.
    final_rate
        Share of the peak rate that a cosine falls to by the end of the budget; 1 for no decay.
    ema
        Decay a step of the exponential moving average of the weights, which is what is kept; 0 for none.
    clip_norm
        Longest gradient; 0 for no clipping.
    precision
        "fp32", "bf16" (bf16 products under autocast; weights, residual stream and optimizer stay fp32), or "auto": bf16
        where the device multiplies it fast.
    most_epochs
        Passes over the cells after which training by the clock ends early: by then held-out cells no longer become
        likelier. Not asked where epochs or steps are given.

    Raises
    ------
    InputError
        If there is no such precision.
    """

    batch_size: int = 64
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 50
    final_rate: float = 0.05
    ema: float = 0.999
    clip_norm: float = 1.0
    precision: str = "auto"
    most_epochs: float | None = None

    def __post_init__(self) -> None:
        check_precision(self.precision)


@dataclass(frozen=True)
class Likelihood:
    """How counts come from a denoiser, see :mod:`wbdit.counts.denoiser`.

    Attributes
    ----------
    stop
        Timestep at which sampling ends and counts are drawn.
    input_dropout
        Share of the genes that the denoiser does not see in training.
    learned_dispersion
        Whether the denoiser answers how wide each count's distribution is, too.
    """

    stop: int = 500
    input_dropout: float = 0.3
    learned_dispersion: bool = True


@dataclass(frozen=True)
class Preset:
    """Everything that is chosen before the cells are seen.

    Attributes
    ----------
    model
        Arguments of the denoiser but for the numbers of genes and labels.
    schedule
        Kind of :class:`wbdit.schedule.NoiseSchedule`.
    lognorm, centered, max_genes
        Arguments of :meth:`wbdit.data.preprocessor.Preprocessor.fit`.
    training
        Optimizer.
    budget
        How long to train where nothing is said.
    likelihood
        How counts come from the denoiser; not used where it sees values of another kind.
    denoiser
        "wbdit" for :class:`wbdit.WBDiT`, "dit" for the black-box :class:`wbdit.DiT`.
    """

    model: dict[str, Any]
    schedule: Kind
    budget: Budget
    training: Training = field(default_factory=Training)
    lognorm: bool = False
    centered: bool = True
    max_genes: int = 2000
    likelihood: Likelihood = field(default_factory=Likelihood)
    denoiser: Literal["wbdit", "dit"] = "wbdit"


PRESETS = {
    # what Cui, Dong and Liu published: raw log values, epsilon, no average
    "paper": Preset(
        model={"patch_size": 10, "hidden_size": 768, "depth": 3, "num_heads": 8, "prediction": "epsilon"},
        schedule="linear",
        budget=Budget(epochs=2400),
        training=Training(
            batch_size=16,
            learning_rate=1e-4,
            betas=(0.9, 0.999),
            warmup_steps=0,
            final_rate=1.0,
            ema=0.0,
            clip_norm=0.0,
        ),
        lognorm=True,
        centered=False,
    ),
    # real cells in minutes on two cores
    "small": Preset(
        model={
            "patch_size": 64,
            "hidden_size": 256,
            "depth": 3,
            "num_heads": 4,
            "prediction": "v",
            "shared_patches": False,
            "cell_token": True,
            "class_dropout_prob": 0.02,
        },
        schedule="cosine",
        budget=Budget(minutes=3),
        training=Training(weight_decay=0.1, most_epochs=50),
    ),
    # one GPU
    "base": Preset(
        model={
            "patch_size": 32,
            "hidden_size": 768,
            "depth": 6,
            "num_heads": 12,
            "prediction": "v",
            "shared_patches": False,
            "cell_token": True,
            "class_dropout_prob": 0.02,
        },
        schedule="cosine",
        budget=Budget(epochs=60),
        training=Training(batch_size=256, learning_rate=3e-4, warmup_steps=1000, ema=0.9999, weight_decay=0.1),
    ),
}
# the control: black-box blocks of the same width and depth, all else the same
PRESETS["dit"] = replace(PRESETS["small"], denoiser="dit")


def find_preset(name: str) -> Preset:
    """Return a preset by its name.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
