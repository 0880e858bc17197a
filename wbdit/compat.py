"""The interface of the authors' scripts, on wbdit's samplers and kernels.

Cui, Dong and Liu (arXiv 2411.06785) publish a class ``DiffusionGene`` that noises cells while training and draws cells
afterwards. This one takes the same arguments, spelled the same way. A script changes its imports and nothing else::

    from wbdit import WBDiT
    from wbdit.compat import DiffusionGene
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from tqdm import tqdm

from wbdit.samplers import ddim, ddpm
from wbdit.schedule import NoiseSchedule

__all__ = ["DiffusionGene"]

logger = logging.getLogger("wbdit")


class DiffusionGene:
    """Noise cells for training and sample new ones, with the authors' names.

    Parameters
    ----------
    noise_steps
        Number of timesteps T.
    beta_start, beta_end
        First and last variance of the linear schedule.
    gene_size
        Number of genes G.
    device
        Device of the schedule's tensors and of the samples.

    Attributes
    ----------
    beta, alpha, alpha_hat
        Variance added per timestep, ``1 - beta``, and the running product of alpha: ``(T,)`` fp32 on `device`.

    Examples
    --------
    >>> from wbdit.compat import DiffusionGene
    >>> diffusion = DiffusionGene(noise_steps=50, gene_size=40, device="cpu")
    >>> t = diffusion.sample_timesteps(8)
    >>> x_t, noise = diffusion.noise_genes(torch.rand(8, 1, 40), t)
    >>> model = wbdit.WBDiT(input_size=40, hidden_size=32, num_heads=4)
    >>> diffusion.sample(model, n=2).shape
    torch.Size([2, 1, 40])
    """

    def __init__(
        self,
        noise_steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        gene_size: int = 2000,
        device: str | torch.device = "cuda",
    ) -> None:
        self.noise_steps = noise_steps
        self.beta_start = beta_start
        self.beta_end = beta_end
        self.gene_size = gene_size
        self.device = device
        self._schedule = NoiseSchedule(noise_steps, beta_start, beta_end)
        self.beta = self._schedule.beta.float().to(device)
        self.alpha = 1 - self.beta
        self.alpha_hat = self._schedule.alpha_hat.float().to(device)

    def noise_genes(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Noise cells to timesteps.

        Parameters
        ----------
        x
            Cells ``(B, 1, G)``, floating.
        t
            Timesteps ``(B,)``, integers in [0, T), on any device.

        Returns
        -------
        The noised cells and the Gaussian noise, both like `x`.
        """
        epsilon = torch.randn_like(x)
        return self._schedule.noising(x, t.to(x.device), epsilon), epsilon

    def sample_timesteps(self, n: int) -> Tensor:
        """Draw `n` timesteps, ``(n,)`` int64, evenly from 1 to T - 1."""
        return torch.randint(1, self.noise_steps, (n,))

    def sample(self, model: nn.Module, n: int, seed: Tensor | None = None, nonnagative: bool = True) -> Tensor:
        """Sample cells by DDPM, in all T - 1 steps.

        Parameters
        ----------
        model
            Predicts the noise, as ``model(x, t)``. It is in evaluation mode meanwhile, and in training mode afterwards.
        n
            Number of cells.
        seed
            Starting noise ``(n, 1, G)``; drawn by PyTorch's generator if None.
        nonnagative
            Replace values below zero by zero. The spelling is the authors'.

        Returns
        -------
        Cells ``(n, 1, G)`` on the device.
        """
        x = self._start(n, seed)
        with self._sampling(model, "DDPM", self.noise_steps - 1) as advance:
            return ddpm(model, x, self._schedule, clamp_min=0.0 if nonnagative else None, callback=advance)

    def sample_ddim(
        self,
        model: nn.Module,
        n: int,
        eta: float = 1.0,
        sub_time_seq: Iterable[int] | None = None,
        seed: Tensor | None = None,
        nonnagative: bool = True,
    ) -> Tensor:
        """Sample cells by DDIM.

        Parameters
        ----------
        model, n, seed, nonnagative
            As in :meth:`sample`.
        eta
            Share of fresh noise per step, from 0 (deterministic) to 1.
        sub_time_seq
            Rising timesteps from 0 on, such as ``[0, 1, 10, 20, ..., 1000]``; all of them if None. The model is called
            at those from 1 to T - 1.

        Returns
        -------
        Cells ``(n, 1, G)`` on the device.

        Raises
        ------
        ValueError
            If the timesteps do not rise from 0, or none is from 1 to T - 1.
        """
        path = self._path(sub_time_seq)
        x = self._start(n, seed)
        with self._sampling(model, "DDIM", len(path)) as advance:
            x = ddim(model, x, self._schedule, path, eta=eta, clamp_min=None, callback=advance)
            if path[-1] > 1:  # as published: every step adds noise but the one from t = 1
                x = x + self._last_noise(path[-1], eta) * torch.randn_like(x)
        return x.clamp(min=0) if nonnagative else x

    def _path(self, sub_time_seq: Iterable[int] | None) -> list[int]:
        rising = list(range(self.noise_steps)) if sub_time_seq is None else [int(t) for t in sub_time_seq]
        path = [t for t in reversed(rising) if 1 <= t < self.noise_steps]
        if not path or rising[0] != 0 or any(a >= b for a, b in pairwise(rising)):
            raise ValueError(f"sub_time_seq must rise from 0 and name a timestep from 1 to {self.noise_steps - 1}")
        return path

    def _last_noise(self, t: int, eta: float) -> float:
        """Return the standard deviation of the fresh noise that DDIM's step from `t` to 0 adds."""
        alpha_hat, landing = float(self._schedule.alpha_hat[t]), float(self._schedule.alpha_hat[0])
        return eta * ((1 - landing) / (1 - alpha_hat) * (1 - alpha_hat / landing)) ** 0.5

    def _start(self, n: int, seed: Tensor | None) -> Tensor:
        # drawn on the CPU and then moved, as published: one seed, the same noise on every device
        return (torch.randn(n, 1, self.gene_size) if seed is None else seed).to(self.device)

    @contextmanager
    def _sampling(self, model: nn.Module, name: str, steps: int) -> Iterator[Callable[..., object]]:
        """Put the model into evaluation mode, then into training mode; yield what advances the progress bar."""
        logger.info(f"sampling by {name}, {steps} steps")
        model.eval()
        try:
            with tqdm(total=steps, disable=None, desc=name) as bar:
                yield lambda *_: bar.update()
        finally:
            model.train()
