"""Presets: model, noise schedule, preprocessing and training settings."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from wbdit.errors import InputError
from wbdit.schedule import Kind

PRECISIONS = ("auto", "fp32", "bf16")


def check_precision(name: str) -> None:
    """Raise an InputError if the name is not in :data:`PRECISIONS`."""
    if name not in PRECISIONS:
        raise InputError(f"unknown `precision` {name!r}: choose one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class Budget:
    """Training budget over all sessions of a run, in exactly one of three units.

    Attributes
    ----------
    minutes, epochs, steps
        Minutes of training time, passes over the cells, or optimizer steps.

    Raises
    ------
    InputError
        If not exactly one is given, or it is not positive.
    """

    minutes: float | None = None
    epochs: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.minutes, self.epochs, self.steps) if value is not None]
        if len(given) != 1:
            raise InputError("give exactly one of `minutes`, `epochs` and `steps`")
        if given[0] <= 0:
            raise InputError(f"the training budget must be positive, not {given[0]:g}")

    def progress(self, seconds: float, epochs: float, steps: int) -> float:
        """Return the used share of the budget; 1 or more if it is spent."""
        if self.minutes is not None:
            return seconds / (60 * self.minutes)
        return epochs / self.epochs if self.epochs is not None else steps / self.steps  # type: ignore[operator]


@dataclass(frozen=True)
class Training:
    """Settings of the optimizer and of the weight average.

    Attributes
    ----------
    batch_size
        Cells per step.
    learning_rate
        Peak learning rate of AdamW (Loshchilov and Hutter 2019).
    betas, weight_decay
        Other settings of AdamW.
    warmup_steps
        Steps over which the learning rate rises from zero.
    final_rate
        Final learning rate of the cosine decay, as a share of the peak; 1 for no decay.
    ema
        Decay per step of the exponential moving average of the weights. The run keeps the averaged weights; 0 for no
        average.
    clip_norm
        Largest norm of the gradient; 0 for no clipping.
    precision
        "fp32", "bf16" (bf16 products under autocast; weights, residual stream and optimizer stay fp32), or "auto": bf16
        on devices with fast bf16 products.
    most_epochs
        Passes over the cells after which training with a budget in minutes ends early: by then the likelihood of
        held-out cells no longer improves. Ignored with a budget in epochs or steps.

    Raises
    ------
    InputError
        If the precision is unknown.
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
    """Settings of the count likelihood, see :class:`wbdit.counts.denoiser.CountDenoiser`.

    Attributes
    ----------
    stop
        Timestep at which sampling ends and counts are drawn.
    input_dropout
        Share of the genes that are hidden from the denoiser in training.
    learned_dispersion
        Whether the denoiser also predicts the dispersion of each count.
    """

    stop: int = 500
    input_dropout: float = 0.3
    learned_dispersion: bool = True


@dataclass(frozen=True)
class Preset:
    """Settings of a run that do not depend on the cells.

    Attributes
    ----------
    model
        Arguments of the denoiser, except the numbers of genes and labels.
    schedule
        Kind of :class:`wbdit.schedule.NoiseSchedule`.
    lognorm, centered, max_genes
        Arguments of :meth:`wbdit.data.preprocessor.Preprocessor.fit`.
    training
        Optimizer settings.
    budget
        Default training budget.
    likelihood
        Settings of the count likelihood; ignored if the model is not trained on counts.
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
    # as published by Cui, Dong and Liu: uncentered log values, epsilon prediction, no weight average
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
    # minutes on two CPU cores
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
# control: black-box blocks of the same width and depth, otherwise identical
PRESETS["dit"] = replace(PRESETS["small"], denoiser="dit")


def find_preset(name: str) -> Preset:
    """Return a preset by its name.

    Raises
    ------
    InputError
        If the name is unknown.
    """
    if name not in PRESETS:
        raise InputError(f"unknown `preset` {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
