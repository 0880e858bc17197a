"""The noise schedule, and what a model's output means under it.

A noised cell is ``x_t = alpha x_0 + sigma noise`` with ``alpha^2 = alpha_hat[t]`` and ``sigma^2 = 1 - alpha_hat[t]``,
for timesteps t in 0 ... noise_steps - 1. As published, training draws t from 1 on, and a sampler lands on t = 0.
Samplers may stop between whole timesteps: "linear" interpolates ln(alpha_hat) there, "cosine" is a formula in t.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wbdit import ops

Kind = Literal["linear", "cosine"]
Prediction = Literal["epsilon", "v", "x0"]


class Mix(NamedTuple):
    """A linear combination ``x * x_t + out * model_output``, as host scalars."""

    x: float
    out: float


class NoiseSchedule:
    """Signal and noise levels over the timesteps.

    Parameters
    ----------
    noise_steps
        Number of timesteps T.
    beta_start, beta_end
        Ends of the published linear schedule of beta (Ho et al. 2020); not used by "cosine".
    kind
        "linear", or "cosine": ``alpha = cos(pi/2 * t/(T-1))`` (Nichol and Dhariwal 2021, without their offset). It
        starts at no noise and ends at no signal (zero terminal SNR, Lin et al. 2024), so pure noise is exactly what a
        sampler starts from; its last step says nothing about x_0 to an "epsilon" model, so it takes "v" or "x0".

    Attributes
    ----------
    alpha_hat
        Share of the signal's variance left at each timestep, ``(T,)`` fp64.
    beta
        Variance added at each timestep, ``(T,)`` fp64.

    Raises
    ------
    ValueError
        If the kind is unknown or there are fewer than two steps.
    """

    def __init__(
        self, noise_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, kind: Kind = "linear"
    ) -> None:
        if noise_steps < 2:
            raise ValueError(f"noise_steps must be at least 2, not {noise_steps}")
        self.noise_steps = noise_steps
        self.kind: Kind = kind
        self._log_alpha_hat: dict[torch.device, Tensor] = {}
        if kind == "linear":
            self.beta = torch.linspace(beta_start, beta_end, noise_steps, dtype=torch.float64)
            self.alpha_hat = torch.cumprod(1 - self.beta, 0)
        elif kind == "cosine":
            self.alpha_hat = torch.linspace(0, math.pi / 2, noise_steps, dtype=torch.float64).cos().square()
            self.alpha_hat[-1] = 0  # cos(pi/2) is 6e-17 in floating point
            self.beta = 1 - self.alpha_hat / torch.cat([self.alpha_hat[:1], self.alpha_hat[:-1]])
        else:
            raise ValueError(f"kind must be 'linear' or 'cosine', not {kind!r}")

    def levels(self, t: float) -> tuple[float, float]:
        """Return ``(alpha, sigma)`` at a timestep in [0, T - 1], whole or not."""
        whole = int(t)
        if whole == t:
            alpha_hat = float(self.alpha_hat[whole])
            return math.sqrt(alpha_hat), math.sqrt(1 - alpha_hat)
        if self.kind == "cosine":
            angle = math.pi / 2 * t / (self.noise_steps - 1)
            return math.cos(angle), math.sin(angle)
        below, above = self.alpha_hat[whole : whole + 2].log().tolist()
        log_alpha_hat = below + (t - whole) * (above - below)
        return math.exp(log_alpha_hat / 2), math.sqrt(-math.expm1(log_alpha_hat))

    def level_tensors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(alpha, sigma)``, both ``(B,)`` fp32, at timesteps ``(B,)``, whole or not, by operations alone.

        Nothing is asked of the host after a device's first call, so that a CUDA graph can record it.
        """
        if t.device not in self._log_alpha_hat:
            smallest = torch.finfo(torch.float64).tiny  # in place of no signal, whose logarithm is infinite
            self._log_alpha_hat[t.device] = self.alpha_hat.clamp(min=smallest).log().to(t.device)
        table, at = self._log_alpha_hat[t.device], t.double()
        whole = at.long().clamp(max=self.noise_steps - 2)
        if t.is_floating_point() and self.kind == "cosine":
            angle = math.pi / 2 * at / (self.noise_steps - 1)
            return angle.cos().float(), angle.sin().float()
        log_alpha_hat = torch.lerp(table[whole], table[whole + 1], at - whole)
        return (log_alpha_hat / 2).exp().float(), (-torch.expm1(log_alpha_hat)).sqrt().float()

    def log_snr(self, t: float) -> float:
        """Return ``ln(alpha / sigma)`` at a timestep; infinite where there is no signal, or no noise."""
        alpha, sigma = self.levels(t)
        if min(alpha, sigma) == 0:
            return math.inf if sigma == 0 else -math.inf
        return math.log(alpha / sigma)

    def timestep(self, log_snr: float) -> float:
        """Return the timestep in [0, T - 1] with this ``ln(alpha / sigma)``, or the end next to it."""
        highest = self.noise_steps - 1
        if self.kind == "cosine":
            return highest * 2 / math.pi * math.atan(math.exp(-log_snr))
        lost = math.log1p(math.exp(-2 * log_snr))  # -ln(alpha_hat), which rises with t
        return float(np.interp(lost, -self.alpha_hat.log().numpy(), np.arange(self.noise_steps)))

    def noising(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noise cells ``x0`` ``(B, ...)`` to timesteps `t` ``(B,)`` int64 with Gaussian `noise` of the same shape."""
        alpha_hat = self.alpha_hat.to(x0.device)[t]
        return ops.noising(x0, noise, alpha_hat.sqrt().to(x0.dtype), (1 - alpha_hat).sqrt().to(x0.dtype))

    def target(self, prediction: Prediction, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return what a model should answer at ``x_t``: `noise`, `x0`, or ``v = alpha noise - sigma x0``.

        The velocity is Salimans and Ho 2022, appendix D. Shapes and types as in :meth:`noising`.
        """
        if prediction == "epsilon":
            return noise
        if prediction == "x0":
            return x0
        alpha_hat = self.alpha_hat.to(x0.device)[t]
        return ops.noising(noise, x0, alpha_hat.sqrt().to(x0.dtype), -(1 - alpha_hat).sqrt().to(x0.dtype))

    def clean(self, prediction: Prediction, t: float) -> Mix:
        """Return the combination of ``x_t`` and the model's output that estimates x_0.

        Raises
        ------
        ValueError
            For "epsilon" where no signal is left.
        """
        alpha, sigma = self.levels(t)
        if prediction == "x0":
            return Mix(0.0, 1.0)
        if prediction == "v":
            return Mix(alpha, -sigma)
        if alpha == 0:
            raise ValueError(f"at t = {t} no signal is left: noise alone does not tell x_0; use prediction 'v' or 'x0'")
        return Mix(1 / alpha, -sigma / alpha)

    def noise(self, prediction: Prediction, t: float) -> Mix:
        """Return the combination of ``x_t`` and the model's output that estimates the noise; needs sigma > 0."""
        alpha, sigma = self.levels(t)
        if prediction == "epsilon":
            return Mix(0.0, 1.0)
        if prediction == "v":
            return Mix(sigma, alpha)
        return Mix(1 / sigma, -alpha / sigma)
