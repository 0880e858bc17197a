"""The two half-steps of a white-box block: compress the tokens, then make them sparse against a dictionary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wbdit import ops
from wbdit.weight_cache import RemembersWeights, may_cache


class MSSA(nn.Module):
    """Multi-head subspace self-attention: compress the tokens against learned subspaces.

    Parameters
    ----------
    hidden_size
        Width d of a token.
    num_heads
        Number of subspaces h, each of dimension p = d // h.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = hidden_size // num_heads * num_heads
        self.qkv = nn.Linear(hidden_size, inner, bias=False)
        nn.init.xavier_uniform_(self.qkv.weight)
        self.to_out: nn.Module = nn.Identity()  # as published: one subspace needs no mixing
        if num_heads > 1:
            out = nn.Linear(inner, hidden_size)
            nn.init.xavier_uniform_(out.weight)
            nn.init.zeros_(out.bias)
            self.to_out = nn.Sequential(out)

    @property
    def out(self) -> nn.Linear | None:
        """The linear map that mixes the subspaces; None where there is one subspace."""
        return self.to_out[0] if isinstance(self.to_out, nn.Sequential) else None  # type: ignore[return-value]

    def forward(self, z: Tensor) -> Tensor:
        """Turn tokens ``(B, N, d)`` into ``(B, N, d)``."""
        return self.to_out(ops.mssa(self.qkv(z), self.num_heads))


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
        nn.init.kaiming_uniform_(self.weight)

    def folded(self) -> Tensor:
        """Return the folded dictionary ``(d, d)`` in the type of the product; kept while no gradient is wanted."""
        dtype = product_dtype(self.weight)
        if may_cache(self.weight):
            return self._cache.get(dtype, [self.weight], lambda: ops.fold(self.weight).to(dtype))
        return ops.fold(self.weight.to(dtype))

    def forward(self, z: Tensor) -> Tensor:
        """Turn tokens ``(B, N, d)`` into non-negative, sparse tokens ``(B, N, d)``."""
        return ops.ista(z, self.folded(), self.eta, self.lam)


def product_dtype(weight: Tensor) -> torch.dtype:
    """Return the type that products with a weight are formed in: autocast's, else the weight's own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
