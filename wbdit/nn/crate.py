"""The two half-steps of a white-box block (Yu et al. 2023, CRATE): MSSA compresses, ISTA sparsifies."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wbdit import ops
from wbdit.nn.embeddings import xavier
from wbdit.nn.weight_cache import RemembersWeights, may_cache


class LinearMap(NamedTuple):
    """Weight ``(outputs, inputs)`` and bias ``(outputs,)`` of a linear map; the bias may be None."""

    weight: Tensor
    bias: Tensor | None


class MSSA(nn.Module):
    """Multi-head subspace self-attention: compresses the tokens toward learned subspaces.

    See :func:`wbdit.ops.mssa` for the formula.

    Parameters
    ----------
    hidden_size
        Width d of a token.
    num_heads
        Number of subspaces h, each of dimension p = d // h.
    tied
        Map back by U^T, the transpose of the projection U, as the operator is derived (Yu et al. 2023, CRATE). The
        output then lies in the subspaces themselves. By default the output map has weights of its own, as published.

    Examples
    --------
    >>> from wbdit.nn.crate import MSSA
    >>> mssa = MSSA(hidden_size=16, num_heads=4)
    >>> mssa(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    >>> sum(p.numel() for p in mssa.parameters()), sum(p.numel() for p in MSSA(16, 4, tied=True).parameters())
    (528, 256)
    """

    def __init__(self, hidden_size: int, num_heads: int, tied: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.tied = tied
        inner = hidden_size // num_heads * num_heads
        self.qkv = nn.Linear(hidden_size, inner, bias=False)
        xavier(self.qkv)
        self.to_out: nn.Module = nn.Identity()  # as published for one subspace
        if num_heads > 1 and not tied:
            self.to_out = nn.Sequential(nn.Linear(inner, hidden_size))
            xavier(cast(nn.Linear, self.to_out[0]))

    def initialize_weights(self) -> None:
        """Reinitialize the weights."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                xavier(module)

    @property
    def out(self) -> LinearMap | None:
        """The linear map after attention; None if it is the identity, as published for one subspace."""
        if self.tied:
            return LinearMap(self.qkv.weight.mT, None)
        if not isinstance(self.to_out, nn.Sequential):
            return None
        own = cast(nn.Linear, self.to_out[0])
        return LinearMap(own.weight, own.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Map tokens ``(B, N, d)`` to ``(B, N, d)``."""
        subspaces = ops.mssa(self.qkv(z), self.num_heads)
        return subspaces if self.out is None else F.linear(subspaces, *self.out)


class ISTA(RemembersWeights):
    """One step of iterative shrinkage-thresholding: makes the tokens sparse in a learned dictionary.

    See :func:`wbdit.ops.ista` for the formula.

    Parameters
    ----------
    hidden_size
        Width d of a token; the dictionary is ``(d, d)``.
    eta, lam
        Step size and sparsity penalty.

    Examples
    --------
    >>> from wbdit.nn.crate import ISTA
    >>> z = ISTA(hidden_size=16)(torch.randn(2, 5, 16))
    >>> z.shape, bool((z >= 0).all())
    (torch.Size([2, 5, 16]), True)
    """

    def __init__(self, hidden_size: int, eta: float = 0.1, lam: float = 0.1) -> None:
        super().__init__()
        self.eta = eta
        self.lam = lam
        self.weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Reinitialize the weights."""
        nn.init.kaiming_uniform_(self.weight)

    def folded(self) -> Tensor:
        """Return the folded dictionary ``(d, d)`` in the dtype of the product; cached on a CPU without gradients."""
        dtype = product_dtype(self.weight)
        if may_cache(self.weight):
            return self._cache.get(dtype, self.parameters(), lambda: ops.fold(self.weight).to(dtype))
        # fold in fp32, then round; training on a CPU rounds first: folds take 5 % of a step's FLOPs at published size
        return ops.fold(self.weight.to(dtype)) if self.weight.device.type == "cpu" else ops.fold(self.weight).to(dtype)

    def forward(self, z: Tensor) -> Tensor:
        """Map tokens ``(B, N, d)`` to non-negative, sparse tokens ``(B, N, d)``."""
        return ops.ista(z, self.folded(), self.eta, self.lam)


def product_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of products with a weight: the autocast dtype if autocast is on, else the weight's own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
