"""Presets: model, noise schedule, preprocessing and training settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from wbdit.errors import InputError
from wbdit.schedule import Kind
from wbdit.training.checks import check_choice, check_model, check_range, check_types

PRECISIONS = ("auto", "fp32", "bf16")
NOISE_STEPS = 1000
MOST_RATE_PRIOR = 200.0  # counts
PATCH_MULTIPLE = 16  # genes; wide patches are multiples of this, as vector units like them


def check_precision(name: str) -> None:
    """Raise an InputError if the name is not in :data:`PRECISIONS`."""
    check_choice("`precision`", name, PRECISIONS)


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
        if not 0 < given[0] < float("inf"):
            raise InputError(f"the training budget must be positive and finite, not {given[0]:g}")

    def progress(self, seconds: float, epochs: float, steps: int) -> float:
        """Return the used share of the budget; 1 or more if it is spent."""
        if self.minutes is not None:
            return seconds / (60 * self.minutes)
        return epochs / self.epochs if self.epochs is not None else steps / self.steps  # type: ignore[operator]


@dataclass(frozen=True)
class Training:
    """Settings of the optimizer, of the weight average and of the held-out cells.

    Attributes
    ----------
    batch_size
        Cells per step, in all processes together.
    micro_batch
        Cells per forward and backward pass of a process, whose gradients are summed: for batches that do not fit into
        memory. None for all of its cells at once. Results are equal up to rounding.
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
    validation
        Share of the cells, up to a half, that are held out. Their loss is logged, see
        :class:`wbdit.training.validation.Validation`. They are a random share of each label combination; combinations
        with fewer than four cells keep all of them.
    early_stopping
        Number of passes over the cells without a lower loss of the held-out cells after which training ends. The run
        then keeps the averaged weights with the lowest loss. None to train until the budget is spent.

    Raises
    ------
    InputError
        If a value has another type or is out of range.
    """

    batch_size: int = 64
    micro_batch: int | None = None
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 50
    final_rate: float = 0.05
    ema: float = 0.999
    clip_norm: float = 1.0
    precision: str = "auto"
    most_epochs: float | None = None
    validation: float = 0.0
    early_stopping: float | None = None

    def __post_init__(self) -> None:
        check_precision(self.precision)
        check_types("training.", vars(self), Training)
        check_range("training.batch_size", self.batch_size, 1)
        check_range("training.micro_batch", self.micro_batch, 1)
        check_range("training.learning_rate", self.learning_rate, 0, above=True)
        for beta in self.betas:
            check_range("training.betas", beta, 0, 1, below=True)
        check_range("training.weight_decay", self.weight_decay, 0)
        check_range("training.warmup_steps", self.warmup_steps, 0)
        check_range("training.final_rate", self.final_rate, 0, 1)
        check_range("training.ema", self.ema, 0, 1, below=True)
        check_range("training.clip_norm", self.clip_norm, 0)
        check_range("training.most_epochs", self.most_epochs, 0, above=True)
        check_range("`validation`", self.validation, 0, 0.5)
        check_range("`early_stopping`", self.early_stopping, 0, above=True)
        if self.early_stopping is not None and self.validation == 0:
            raise InputError("`early_stopping` needs held-out cells: give a share of them, such as `validation=0.1`")


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
    rate_prior
        Strength of the prior on what the denoiser adds to the log rates of rare genes, in counts, see
        :class:`wbdit.training.losses.CountNLL`: genes with far more counts in the training cells are hardly affected.
        0 for none; None for a tenth of the number of training cells, at most :data:`MOST_RATE_PRIOR`, since with few
        cells a strong prior holds back nearly all genes (docs/study.md).
    """

    stop: int = 500
    input_dropout: float = 0.3
    learned_dispersion: bool = True
    rate_prior: float | None = None

    def __post_init__(self) -> None:
        check_types("likelihood.", vars(self), Likelihood)
        check_range("likelihood.stop", self.stop, 1, NOISE_STEPS - 2)
        check_range("likelihood.input_dropout", self.input_dropout, 0, 1, below=True)
        check_range("likelihood.rate_prior", self.rate_prior, 0)

    def rate_prior_of(self, cells: int) -> float:
        """Return the strength of the prior for a number of training cells."""
        return min(MOST_RATE_PRIOR, cells / 10) if self.rate_prior is None else self.rate_prior


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
    most_patches
        Maximum number of patches: with more genes, patches hold more than ``model["patch_size"]``, see
        :meth:`model_for`. None for no maximum.

    Raises
    ------
    InputError
        If a setting is unknown, has another type or is out of range.

    Examples
    --------
    Change one setting of the preset "small", and train with it:

    >>> from dataclasses import replace
    >>> small = wbdit.Preset.from_name("small")
    >>> slow = replace(small, training=replace(small.training, learning_rate=3e-4))
    >>> narrow = replace(slow, model={**slow.model, "hidden_size": 64})
    >>> few = cells[cells.obs["bulk_labels"].isin(["Dendritic", "CD19+ B"])][:40, :128]
    >>> wbdit.fit(few, label="bulk_labels", preset=narrow, steps=1, progress=False).denoiser.hidden_size
    64
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
    most_patches: int | None = None

    def __post_init__(self) -> None:
        check_types("", vars(self), Preset)
        check_range("max_genes", self.max_genes, 1)
        check_range("most_patches", self.most_patches, 1)
        check_model(self.denoiser, self.model)

    def model_for(self, genes: int) -> dict[str, Any]:
        """Return the arguments of the denoiser for a number of genes.

        The cost of a step grows with the number of patches, and that of attention with its square. So patches widen
        beyond :attr:`most_patches`, to a multiple of :data:`PATCH_MULTIPLE` genes.

        Examples
        --------
        >>> small = wbdit.Preset.from_name("small")
        >>> [small.model_for(genes)["patch_size"] for genes in (2000, 4096, 14000)]
        [64, 64, 224]
        """
        sizes = {**self.model, "input_size": genes}
        if self.most_patches is not None:
            widest = PATCH_MULTIPLE * math.ceil(genes / self.most_patches / PATCH_MULTIPLE)
            own = self.model.get("patch_size", 10)
            sizes["patch_size"] = own if genes <= own * self.most_patches else widest
        return sizes

    @classmethod
    def from_name(cls, name: str) -> Preset:
        """Return a preset by its name.

        Raises
        ------
        InputError
            If the name is unknown.

        Examples
        --------
        >>> wbdit.Preset.from_name("small").model["depth"]
        3
        """
        check_choice("`preset`", name, PRESETS)
        return PRESETS[name]


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
    # laptops; after 50 passes the likelihood of held-out cells no longer improves (docs/study.md)
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
        budget=Budget(epochs=50),
        training=Training(weight_decay=0.1, most_epochs=50),
        most_patches=64,
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
        most_patches=64,
    ),
}
# control: black-box blocks of the same width and depth, otherwise identical
PRESETS["dit"] = replace(PRESETS["small"], denoiser="dit")
