"""Samplers: plain functions that turn noise into cells.

Every step of every sampler is ``a x + b out + c previous + d earlier + e noise`` (:func:`wbdit.ops.sampler_step`). The
model's output ``out``, whatever it predicts, and the x_0 estimates of the two preceding steps enter linearly.

The factors are host scalars computed from the schedule. :mod:`wbdit.samplers.ancestral` computes those of the published
samplers, :mod:`wbdit.samplers.multistep` those of the few-step solvers; :mod:`wbdit.samplers.loop` applies them.
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
    """A sampler with its default settings.

    Attributes
    ----------
    sample
        The sampler, such as :func:`ddim`.
    calls
        Number of model calls; None for one at every timestep.
    spacing
        Spacing of the timesteps, see :func:`timesteps`.

    Examples
    --------
    >>> list(wbdit.samplers.BY_NAME)
    ['ddim', 'ddpm', 'unipc', 'dpmpp', 'sde-dpmpp']
    >>> wbdit.samplers.BY_NAME["unipc"].calls, wbdit.samplers.BY_NAME["unipc"].spacing
    (15, 'logsnr')
    """

    sample: Callable[..., Tensor]
    calls: int | None
    spacing: Spacing


Name = Literal["ddim", "ddpm", "unipc", "dpmpp", "sde-dpmpp"]

# Defaults for sampling down to x_0: ddim and ddpm as published; the others are initial guesses, not measured on trained
# models. For models that stop early and draw counts, wbdit.generator has its own, measured defaults.
BY_NAME: dict[Name, Choice] = {
    "ddim": Choice(ddim, 50, "uniform"),
    "ddpm": Choice(ddpm, None, "uniform"),
    "unipc": Choice(unipc, 15, "logsnr"),
    "dpmpp": Choice(dpmpp_2m, 20, "logsnr"),
    "sde-dpmpp": Choice(sde_dpmpp_2m, 20, "logsnr"),
}
