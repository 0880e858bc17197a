"""The noise schedule, and the conversions between model outputs, clean cells and noise.

A noised cell is ``x_t = alpha x_0 + sigma noise`` with ``alpha^2 = alpha_hat[t]`` and ``sigma^2 = 1 - alpha_hat[t]``,
for timesteps t in 0 ... noise_steps - 1. As published, training draws t from 1 upward, and samplers end at t = 0.
Samplers may use fractional timesteps: "linear" interpolates ln(alpha_hat), "cosine" evaluates its formula at t.
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
        "linear", or "cosine": ``alpha = cos(pi/2 * t/(T-1))`` (Nichol and Dhariwal 2021, without their offset).
        "cosine" starts without noise and ends without signal (zero terminal SNR, Lin et al. 2024). Its last timestep is
        therefore exactly the pure noise that samplers start from. There an "epsilon" model gives no estimate of x_0,
        so use "v" or "x0".

    Attributes
    ----------
    alpha_hat
        Share of the signal's variance left at each timestep, ``(T,)`` fp64.
    beta
        Variance of the noise added at each timestep, ``(T,)`` fp64.

    Raises
    ------
    ValueError
        If the kind is unknown or there are fewer than two timesteps.

    Examples
    --------
    >>> schedule = wbdit.NoiseSchedule(1000, kind="cosine")
    >>> schedule.alpha_hat[[0, 333, 999]]
    tensor([1.0000, 0.7500, 0.0000], dtype=torch.float64)
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
        """Return ``(alpha, sigma)`` at a timestep in [0, T - 1], which may be fractional.

        Examples
        --------
        >>> alpha, sigma = wbdit.NoiseSchedule(kind="cosine").levels(333)
        >>> round(alpha, 3), round(sigma, 3)
        (0.866, 0.5)
        """
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
        """Return ``(alpha, sigma)``, both ``(B,)`` fp32, at timesteps ``(B,)``, which may be fractional.

        After the first call on a device there is no host sync, so CUDA graphs can capture the call.

        Examples
        --------
        >>> alpha, sigma = wbdit.NoiseSchedule().level_tensors(torch.tensor([0, 500.5, 999]))
        >>> alpha
        tensor([0.9999, 0.2782, 0.0064])
        """
        if t.device not in self._log_alpha_hat:
            smallest = torch.finfo(torch.float64).tiny  # keeps the logarithm finite where no signal is left
            self._log_alpha_hat[t.device] = self.alpha_hat.clamp(min=smallest).log().to(t.device)
        table, at = self._log_alpha_hat[t.device], t.double()
        whole = at.long().clamp(max=self.noise_steps - 2)
        if t.is_floating_point() and self.kind == "cosine":
            angle = math.pi / 2 * at / (self.noise_steps - 1)
            return angle.cos().float(), angle.sin().float()
        log_alpha_hat = torch.lerp(table[whole], table[whole + 1], at - whole)
        return (log_alpha_hat / 2).exp().float(), (-torch.expm1(log_alpha_hat)).sqrt().float()

    def log_snr(self, t: float) -> float:
        """Return ``ln(alpha / sigma)`` at a timestep: -inf where no signal is left, inf where there is no noise.

        Examples
        --------
        >>> round(wbdit.NoiseSchedule().log_snr(500), 3)
        -1.236
        """
        alpha, sigma = self.levels(t)
        if min(alpha, sigma) == 0:
            return math.inf if sigma == 0 else -math.inf
        return math.log(alpha / sigma)

    def timestep(self, log_snr: float) -> float:
        """Return the timestep with this ``ln(alpha / sigma)``, limited to [0, T - 1].

        Examples
        --------
        >>> round(wbdit.NoiseSchedule(kind="cosine").timestep(0.0), 3)
        499.5
        """
        highest = self.noise_steps - 1
        if self.kind == "cosine":
            return highest * 2 / math.pi * math.atan(math.exp(-log_snr))
        lost = math.log1p(math.exp(-2 * log_snr))  # -ln(alpha_hat), which increases with t
        return float(np.interp(lost, -self.alpha_hat.log().numpy(), np.arange(self.noise_steps)))

    def noising(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return the noised cells ``x_t = alpha x0 + sigma noise``.

        Parameters
        ----------
        x0
            Clean cells ``(B, ...)``.
        t
            Timesteps ``(B,)`` int64.
        noise
            Gaussian noise of the shape and dtype of `x0`.

        Examples
        --------
        >>> x0, t = torch.ones(2, 1, 3), torch.tensor([0, 333])
        >>> wbdit.NoiseSchedule(kind="cosine").noising(x0, t, torch.zeros(2, 1, 3))[:, 0]
        tensor([[1.0000, 1.0000, 1.0000],
                [0.8660, 0.8660, 0.8660]])
        """
        alpha_hat = self.alpha_hat.to(x0.device)[t]
        return ops.noising(x0, noise, alpha_hat.sqrt().to(x0.dtype), (1 - alpha_hat).sqrt().to(x0.dtype))

    def target(self, prediction: Prediction, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return the training target of a model at ``x_t``: `noise`, `x0`, or ``v = alpha noise - sigma x0``.

        The velocity v is from Salimans and Ho 2022, appendix D. Shapes and dtypes are those of :meth:`noising`.

        Examples
        --------
        >>> x0, t, noise = torch.ones(2, 1, 3), torch.tensor([0, 999]), torch.zeros(2, 1, 3)
        >>> wbdit.NoiseSchedule(kind="cosine").target("v", x0, t, noise)[1]
        tensor([[-1., -1., -1.]])
        """
        if prediction == "epsilon":
            return noise
        if prediction == "x0":
            return x0
        alpha_hat = self.alpha_hat.to(x0.device)[t]
        return ops.noising(noise, x0, alpha_hat.sqrt().to(x0.dtype), -(1 - alpha_hat).sqrt().to(x0.dtype))

    def clean(self, prediction: Prediction, t: float) -> Mix:
        """Return the linear combination of ``x_t`` and the model's output that estimates x_0.

        Raises
        ------
        ValueError
            If the prediction is "epsilon" and no signal is left at `t`.

        Examples
        --------
        >>> x, out = wbdit.NoiseSchedule(kind="cosine").clean("v", 333)
        >>> round(x, 3), round(out, 3)
        (0.866, -0.5)
        """
        alpha, sigma = self.levels(t)
        if prediction == "x0":
            return Mix(0.0, 1.0)
        if prediction == "v":
            return Mix(alpha, -sigma)
        if alpha == 0:
            raise ValueError(f"at t = {t} no signal is left to estimate x_0 from the noise: use prediction 'v' or 'x0'")
        return Mix(1 / alpha, -sigma / alpha)

    def noise(self, prediction: Prediction, t: float) -> Mix:
        """Return the linear combination of ``x_t`` and the model's output that estimates the noise.

        Raises
        ------
        ZeroDivisionError
            If the prediction is "x0" and sigma is 0 at `t`.

        Examples
        --------
        >>> wbdit.NoiseSchedule().noise("epsilon", 500)
        Mix(x=0.0, out=1.0)
        """
        alpha, sigma = self.levels(t)
        if prediction == "epsilon":
            return Mix(0.0, 1.0)
        if prediction == "v":
            return Mix(sigma, alpha)
        return Mix(1 / sigma, -alpha / sigma)
