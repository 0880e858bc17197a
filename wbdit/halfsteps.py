"""The two half-steps of a white-box block: compress the tokens, then make them sparse against a dictionary."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wbdit import ops
from wbdit.weight_cache import RemembersWeights, may_cache


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
        nn.init.xavier_uniform_(self.qkv.weight)
        self.to_out: nn.Module = nn.Identity()  # as published: one subspace needs no mixing
        if num_heads > 1 and not tied:
            out = nn.Linear(inner, hidden_size)
            nn.init.xavier_uniform_(out.weight)
            nn.init.zeros_(out.bias)
            self.to_out = nn.Sequential(out)

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


class Shrinkage(RemembersWeights):
    """Step size and sparsity penalty of iterative shrinkage-thresholding, fixed or learned.

    Parameters
    ----------
    eta, lam
        Step size and sparsity penalty, at the start where they are learned.
    learned
        Learn both, each as the exponential of a parameter: positive, and zero at the start, so that weight decay draws
        to where they began.
    """

    def __init__(self, eta: float, lam: float, learned: bool) -> None:
        super().__init__()
        self._start = eta, lam
        self.register_parameter("log_step", nn.Parameter(torch.zeros(2)) if learned else None)

    log_step: nn.Parameter | None

    @property
    def eta(self) -> float | Tensor:
        """Step size; a scalar tensor where it is learned."""
        return self._start[0] if self.log_step is None else self._start[0] * self.log_step[0].exp()

    @property
    def lam(self) -> float | Tensor:
        """Sparsity penalty; a scalar tensor where it is learned."""
        return self._start[1] if self.log_step is None else self._start[1] * self.log_step[1].exp()

    def threshold(self, log_scale: Tensor | None = None) -> float | Tensor:
        """Return what a coefficient must exceed, ``eta lam``; times ``exp(log_scale)`` where that is given.

        Parameters
        ----------
        log_scale
            ``(B, d)``, of each sample and channel.

        Returns
        -------
        A number or scalar tensor; ``(B, 1, d)`` with `log_scale`.
        """
        threshold = self.eta * self.lam
        return threshold if log_scale is None else threshold * log_scale.exp()[:, None]

    def step_numbers(self) -> tuple[float, float] | None:
        """Return eta and lam as the ops take them; None where they take gradients, or a GPU would be waited for."""
        if self.log_step is None:
            return self._start
        if not may_cache(self.log_step):
            return None
        return self._cache.get("step", self.parameters(), lambda: (float(self.eta), float(self.lam)))


class ISTA(Shrinkage):
    """One step of iterative shrinkage-thresholding: make the tokens sparse against a learned dictionary.

    Parameters
    ----------
    hidden_size
        Width d of a token; the dictionary is ``(d, d)``.
    eta, lam, learned
        Step size and sparsity penalty, see :class:`Shrinkage`.
    """

    def __init__(self, hidden_size: int, eta: float = 0.1, lam: float = 0.1, learned: bool = False) -> None:
        super().__init__(eta, lam, learned)
        self.weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        nn.init.kaiming_uniform_(self.weight)

    def folded(self) -> Tensor:
        """Return the folded dictionary ``(d, d)`` in the type of the product; kept while no gradient is wanted."""
        dtype = product_dtype(self.weight)
        if may_cache(self.weight):
            return self._cache.get(dtype, self.parameters(), lambda: ops.fold(self.weight).to(dtype))
        # folded in fp32, then rounded; but for training on a CPU: folds are 5 % of a step's FLOPs at the published size
        return ops.fold(self.weight.to(dtype)) if self.weight.device.type == "cpu" else ops.fold(self.weight).to(dtype)

    def forward(self, z: Tensor, log_scale: Tensor | None = None) -> Tensor:
        """Turn tokens ``(B, N, d)`` into non-negative, sparse tokens ``(B, N, d)``.

        Parameters
        ----------
        z
            The tokens.
        log_scale
            Logarithm of what the threshold is multiplied by ``(B, d)``, 0 by default.
        """
        step, folded = self.step_numbers(), self.folded()
        if step is not None and log_scale is None:
            return ops.ista(z, folded, *step)
        wide = torch.promote_types(z.dtype, torch.float32)
        moved = z.to(wide) + self.eta * (z.to(folded.dtype) @ folded).to(wide)
        return F.relu(moved - self.threshold(log_scale)).to(z.dtype)


class OvercompleteISTA(Shrinkage):
    """Two steps of iterative shrinkage-thresholding in an over-complete dictionary D, read out by another D1.

    The block of CRATE-alpha (Yang et al. 2024, arXiv 2405.20299). From zero, with tokens z as rows::

        z1 = relu(eta z D - eta lam)
        z2 = relu(z1 - eta (z1 D^T - z) D - eta lam)

    and ``z2 D1^T`` is what the block adds.

    Parameters
    ----------
    hidden_size
        Width d of a token.
    times
        Atoms over dimensions C; both dictionaries are ``(d, C d)``.
    eta, lam, learned
        Step size and sparsity penalty, see :class:`Shrinkage`.
    """

    def __init__(self, hidden_size: int, times: int, eta: float = 0.1, lam: float = 0.1, learned: bool = False) -> None:
        super().__init__(eta, lam, learned)
        self.weight = nn.Parameter(torch.empty(hidden_size, times * hidden_size))
        self.decoder = nn.Parameter(torch.empty(hidden_size, times * hidden_size))
        # As in CRATE-alpha. With variance 2 / (C d), |D|^2 is about 2 (1 + 1 / sqrt(C))^2, at most 8: a step of 0.1 is
        # shorter than 1 / |D|^2 and so descends. Through D1 it is the variance that keeps the size of rectified codes.
        nn.init.kaiming_uniform_(self.weight)
        nn.init.kaiming_uniform_(self.decoder)

    def code(self, z: Tensor) -> Tensor:
        """Return the sparse, non-negative code z2 ``(B, N, C d)`` of tokens ``(B, N, d)``."""
        eta, threshold = self.eta, self.threshold()
        first = F.relu(eta * (z @ self.weight) - threshold)
        residual = F.linear(first, self.weight) - z
        return F.relu(first - eta * (residual @ self.weight) - threshold)

    def forward(self, z: Tensor) -> Tensor:
        """Turn tokens ``(B, N, d)`` into ``(B, N, d)``."""
        return F.linear(self.code(z), self.decoder)


def product_dtype(weight: Tensor) -> torch.dtype:
    """Return the type that products with a weight are formed in: autocast's, else the weight's own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
