"""The two half-steps of a white-box block: compress the tokens, then make them sparse against a dictionary."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wbdit import ops
from wbdit.nn.embeddings import xavier
from wbdit.nn.weight_cache import RemembersWeights, may_cache


class LinearMap(NamedTuple):
    """A linear map's weight ``(outputs, inputs)`` and bias ``(outputs,)``; None for no bias."""

    weight: Tensor
    bias: Tensor | None


class MSSA(nn.Module):
    """Multi-head subspace self-attention: compress the tokens against learned subspaces.

    Parameters
    ----------
    hidden_size
        Width d of a token.
    num_heads
        Number of subspaces h, each of dimension p = d // h.
    tied
        Map back by U^T, the projection U transposed, as the operator is derived (Yu et al. 2023, CRATE), in place of
        weights of its own: what it adds then lies in the subspaces themselves.
    """

    def __init__(self, hidden_size: int, num_heads: int, tied: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.tied = tied
        inner = hidden_size // num_heads * num_heads
        self.qkv = nn.Linear(hidden_size, inner, bias=False)
        xavier(self.qkv)
        self.to_out: nn.Module = nn.Identity()  # as published: one subspace needs no mixing
        if num_heads > 1 and not tied:
            self.to_out = nn.Sequential(nn.Linear(inner, hidden_size))
            xavier(cast(nn.Linear, self.to_out[0]))

    def initialize_weights(self) -> None:
        """Draw the weights anew."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                xavier(module)

    @property
    def out(self) -> LinearMap | None:
        """The linear map after attention; None where it is the identity, as published for one subspace."""
        if self.tied:
            return LinearMap(self.qkv.weight.mT, None)
        if not isinstance(self.to_out, nn.Sequential):
            return None
        own = cast(nn.Linear, self.to_out[0])
        return LinearMap(own.weight, own.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Turn tokens ``(B, N, d)`` into ``(B, N, d)``."""
        subspaces = ops.mssa(self.qkv(z), self.num_heads)
        return subspaces if self.out is None else F.linear(subspaces, *self.out)


class ISTA(RemembersWeights):
    """One step of iterative shrinkage-thresholding: make the tokens sparse against a learned dictionary.

    Parameters
    ----------
    hidden_size
        Width d of a token; the dictionary is ``(d, d)``.
    eta, lam
        Step size and sparsity penalty.
    """

    def __init__(self, hidden_size: int, eta: float = 0.1, lam: float = 0.1) -> None:
        super().__init__()
        self.eta = eta
        self.lam = lam
        self.weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Draw the weights anew."""
        nn.init.kaiming_uniform_(self.weight)

    def folded(self) -> Tensor:
        """Return the folded dictionary ``(d, d)`` in the type of the product; kept while no gradient is wanted."""
        dtype = product_dtype(self.weight)
        if may_cache(self.weight):
            return self._cache.get(dtype, self.parameters(), lambda: ops.fold(self.weight).to(dtype))
        # folded in fp32, then rounded; but for training on a CPU: folds are 5 % of a step's FLOPs at the published size
        return ops.fold(self.weight.to(dtype)) if self.weight.device.type == "cpu" else ops.fold(self.weight).to(dtype)

    def forward(self, z: Tensor) -> Tensor:
        """Turn tokens ``(B, N, d)`` into non-negative, sparse tokens ``(B, N, d)``."""
        return ops.ista(z, self.folded(), self.eta, self.lam)


def product_dtype(weight: Tensor) -> torch.dtype:
    """Return the type that products with a weight are formed in: autocast's, else the weight's own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
