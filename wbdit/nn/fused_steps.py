"""A denoiser's calls in a sampler: what does not depend on the sampler's state is computed once, before the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from wbdit import ops
from wbdit.profiling import span


class FusedSteps(Protocol):
    """The model calls of one run of a sampler, fused with its updates: what samplers call, and CUDA graphs record.

    Attributes
    ----------
    inputs
        The tensors that differ between runs with the same timesteps, shapes and weights.
    """

    inputs: Sequence[Tensor]

    def step(
        self, i: int, x: Tensor, *, clean: tuple[float, float] | None, **update: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Call the model at timestep i and apply the sampler's update.

        Parameters
        ----------
        i
            Index of the timestep.
        x
            State ``(B, C, G)``.
        clean
            Factors of `x` and of the model's output in the estimate of x_0; None if the estimate is not needed.
        **update
            Arguments of :func:`wbdit.ops.sampler_step` after `out`, by name.

        Returns
        -------
        The next state, and the estimate of x_0 or None, both ``(B, C, G)``.
        """


class DenoiserSteps:
    """The calls of a white-box denoiser, each one op; see :meth:`wbdit.WBDiT.fuse_steps`.

    Parameters
    ----------
    modulations
        Function of the timestep's index that returns the modulations as :func:`wbdit.ops.denoise` takes them.
    weights
        The arguments of :func:`wbdit.ops.denoise` after the modulations.
    inputs
        The tensors from which `modulations` takes its results.
    """

    def __init__(self, modulations: Callable[[int], list[Tensor]], weights: Sequence[Any], inputs: Sequence[Tensor]):
        self.modulations = modulations
        self.weights = weights
        self.inputs = inputs

    def output(self, i: int, x: Tensor) -> Tensor:
        """Return the denoiser's output ``(B, C', G)`` at timestep i."""
        with span("denoise"):
            return ops.denoise(x, self.modulations(i), *self.weights)

    def step(
        self, i: int, x: Tensor, *, clean: tuple[float, float] | None, **update: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Call the denoiser and apply the update, see :class:`FusedSteps`."""
        with span("denoise"):
            return ops.denoise_step(x, self.modulations(i), *self.weights, **update, clean=clean)
