"""Blocks and final layer with adaLN-Zero modulation (Peebles and Xie 2023, DiT), shared by all denoisers.

Parameter names and initial values follow the published implementation, so that its checkpoints load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from wbdit import ops
from wbdit.nn.embeddings import LocalLinear


class Modulation(nn.Sequential):
    """A map from a conditioning vector to shifts, scales and gates; zero at initialization (adaLN-Zero).

    Parameters
    ----------
    hidden_size
        Width d of a token and of the conditioning vector.
    parts
        Number of output vectors of width d.
    """

    def __init__(self, hidden_size: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size))
        self.parts = parts
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Set the weights to zero."""
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, c: Tensor) -> Tensor:
        """Map ``(B, d)`` to ``(B, parts * d)``."""
        linear = cast(nn.Linear, self[1])
        # with few samples the weight is the larger operand: on the left it is read once, without a copy
        return torch.addmm(linear.bias[:, None], linear.weight, self[0](c).mT).mT.contiguous()


class ModulatedBlock(nn.Module):
    """Two residual half-steps with adaLN-Zero modulation.

    A white-box block takes MSSA and ISTA as its half-steps, a black-box block attention and a perceptron.

    Parameters
    ----------
    hidden_size
        Width d of a token.
    attn, mlp
        The half-steps, each mapping tokens ``(B, N, d)`` to ``(B, N, d)``.
    """

    def __init__(self, hidden_size: int, attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attn = attn
        self.mlp = mlp
        self.adaLN_modulation = Modulation(hidden_size, 6)

    def forward(
        self, x: Tensor, z: Tensor, modulation: Sequence[Tensor], following: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Apply both half-steps.

        Parameters
        ----------
        x
            Residual stream ``(B, N, d)``.
        z
            `x` after layer norm and this block's first shift and scale, ``(B, N, d)``.
        modulation
            This block's shift, scale, gate, shift, scale, gate, each ``(B, d)``.
        following
            First shift and scale ``(B, d)`` of the next block, or those of the final layer.

        Returns
        -------
        The new residual stream, and its layer norm modulated by `following`, both ``(B, N, d)``.
        """
        _, _, gate1, shift2, scale2, gate2 = modulation
        x, z = self.first_step(x, z, gate1, (shift2, scale2))
        return self.second_step(x, z, gate2, following)

    def first_step(self, x: Tensor, z: Tensor, gate: Tensor, following: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Apply the attention half-step."""
        return gated_adaln(x, self.attn(z), gate, following)

    def second_step(
        self, x: Tensor, z: Tensor, gate: Tensor, following: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Apply the half-step that follows attention."""
        return gated_adaln(x, self.mlp(z), gate, following)


def gated_adaln(
    x: Tensor, out: Tensor, gate: Tensor, following: tuple[Tensor, Tensor], bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Apply :func:`wbdit.ops.gated_adaln`, in place if gradients are disabled: nothing else uses the inputs."""
    step = ops.gated_adaln if torch.is_grad_enabled() else ops.gated_adaln_
    return step(x, out, gate, *following, bias=bias)


class FinalLayer(nn.Module):
    """A linear map from each modulated token back to the genes of its patch; zero at initialization.

    Parameters
    ----------
    hidden_size, patch_size
        Width d of a token and genes per patch P.
    out_channels
        Output values per gene C.
    tokens
        Number of patches N, each with its own linear map; None for one shared map, as published.
    """

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, tokens: int | None = None) -> None:
        super().__init__()
        outputs = patch_size * out_channels
        self.linear = nn.Linear(hidden_size, outputs) if tokens is None else LocalLinear(tokens, hidden_size, outputs)
        self.adaLN_modulation = Modulation(hidden_size, 2)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Set the linear map to zero."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Map tokens ``(B, N, d)``, already modulated by this layer's shift and scale, to patches ``(B, N, P C)``."""
        return self.linear(z)
