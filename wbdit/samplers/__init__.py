"""Samplers: flat functions from noise to cells.

Every step of every sampler is ``a x + b out + c previous + d earlier + e z``: the model's output, whatever it predicts,
and its earlier estimates of x_0 enter linearly, and the factors are host scalars worked out from the schedule
(:func:`wbdit.ops.sampler_step`). :mod:`wbdit.samplers.ancestral` has the factors of the published samplers,
:mod:`wbdit.samplers.multistep` those of the solvers for few steps; :mod:`wbdit.samplers.loop` applies them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from wbdit.samplers.ancestral import ddim, ddpm
from wbdit.samplers.guidance import GuidedModel
from wbdit.samplers.loop import Callback, Model
from wbdit.samplers.multistep import dpmpp_2m, sde_dpmpp_2m, unipc
from wbdit.samplers.noise import Noise, PhiloxNoise
from wbdit.samplers.timesteps import SPACINGS, Spacing, timesteps

__all__ = [
    "BY_NAME",
    "SPACINGS",
    "Callback",
    "Choice",
    "GuidedModel",
    "Model",
    "Name",
    "Noise",
    "PhiloxNoise",
    "Spacing",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "sde_dpmpp_2m",
    "timesteps",
    "unipc",
]


class Choice(NamedTuple):
    """A sampler with what it takes where nothing else is asked for; no `calls` means every timestep."""

    sample: Callable[..., Tensor]
    calls: int | None
    spacing: Spacing


Name = Literal["ddim", "ddpm", "unipc", "dpmpp", "sde-dpmpp"]

# for sampling down to x_0: ddim and ddpm go their published way, the others' numbers are first guesses, not measured on
# trained models; where counts are drawn on the way, wbdit.generator has measured ones of its own
BY_NAME: dict[Name, Choice] = {
    "ddim": Choice(ddim, 50, "uniform"),
    "ddpm": Choice(ddpm, None, "uniform"),
    "unipc": Choice(unipc, 15, "logsnr"),
    "dpmpp": Choice(dpmpp_2m, 20, "logsnr"),
    "sde-dpmpp": Choice(sde_dpmpp_2m, 20, "logsnr"),
}
