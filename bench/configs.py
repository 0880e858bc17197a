"""Configurations that are measured: models with seeded weights, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flops
import torch
from torch import Tensor

from wbdit import NoiseSchedule
from wbdit.schedule import Kind
from wbdit.training.config import PRESETS

GENES = 2000


@dataclass(frozen=True)
class Config:
    """A model, its batch size, and the number of cells to sample."""

    name: str
    model: dict[str, Any]
    schedule: Kind
    clamp_min: float | None
    batch: int
    cells: int = 64

    @property
    def tokens(self) -> int:
        return -(-self.model["input_size"] // self.model["patch_size"])

    @property
    def classes(self) -> int:
        return sum(self.model["label_sizes"])

    def sizes(self, kind: str = "white", batch: int | None = None, conditions: int | None = None) -> flops.Sizes:
        """Return the sizes that determine the FLOP count; by default every sample has its own condition."""
        batch, model = batch or self.batch, self.model
        shape = batch, self.tokens, model["hidden_size"], model["depth"], model["patch_size"]
        return flops.Sizes(*shape, conditions or batch, kind)


class Inputs(NamedTuple):
    x: Tensor  # [B, 1, G]
    t: Tensor  # [B]
    y: Tensor | None  # [B]
    target: Tensor  # [B, 1, G]

    def to(self, device: torch.device) -> Inputs:
        return Inputs(*(None if v is None else v.to(device) for v in self))


def configs(quick: bool) -> dict[str, Config]:
    """Return the configurations by name; `quick` makes them tiny, to test the benchmark code."""
    both = [
        _config("published", "paper", 0, 0.0, 16),
        _config("small", "small", 8, None, 64),
    ]
    return {c.name: _tiny(c) if quick else c for c in both}


def gpu_configs(quick: bool) -> dict[str, Config]:
    """Return the configurations for a GPU, by name."""
    both = [_config("published", "paper", 0, 0.0, 16), _config("base", "base", 8, None, 16)]
    return {c.name: _tiny(c) if quick else c for c in both}


def make_model(kind: type, config: Config) -> torch.nn.Module:
    """Return a model in which every path carries signal: zero-initialized parameters (adaLN-Zero) are drawn."""
    torch.manual_seed(0)
    model = kind(**config.model, class_dropout_prob=0.0)  # no dropped labels, so that a train step can be checked
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and not p.any():
                p.normal_(std=0.2)
    return model


def make_inputs(config: Config, batch: int | None = None) -> Inputs:
    """Return random inputs, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch or config.batch, 1, config.model["input_size"])
    x, target = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    t = torch.randint(1, 999, shape[:1], generator=generator).float()
    y = torch.randint(0, config.classes, shape[:1], generator=generator) if config.classes else None
    return Inputs(x, t, y, target)


def make_schedule(config: Config) -> NoiseSchedule:
    return NoiseSchedule(kind=config.schedule)


APART = ("cell_token", "class_dropout_prob")  # the published formula has no cell token; labels are never dropped here


def _config(name: str, preset: str, classes: int, clamp_min: float | None, batch: int) -> Config:
    model = {"input_size": GENES, "label_sizes": [classes] if classes else [], **PRESETS[preset].model}
    model = {name: value for name, value in model.items() if name not in APART}
    return Config(name, model, PRESETS[preset].schedule, clamp_min, batch)


def _tiny(config: Config) -> Config:
    model = {**config.model, "input_size": 60, "patch_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 4}
    return replace(config, model=model, batch=4, cells=4)
