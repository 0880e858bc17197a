"""Fast twins of CRATE's blocks, for any network that is built of them.

CRATE (Yu et al. 2023, arXiv 2306.01129) publishes ``Attention`` and ``FeedForward``, whose parameters are those of this
package's MSSA and ISTA. The classes here take the published arguments and state dicts and run on wbdit's kernels.
:func:`accelerate` puts them into a network that already exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from wbdit import ops
from wbdit.errors import InputError
from wbdit.nn.crate import ISTA

__all__ = ["Attention", "FeedForward", "accelerate"]

TOLERANCE = 1e-4  # of a block's output on random tokens, beside the block that it replaces


class Attention(nn.Module):
    """CRATE's ``Attention``: multi-head subspace self-attention, with one shared projection for query, key and value.

    Parameters
    ----------
    dim
        Width d of a token.
    heads, dim_head
        Number of heads h and their width p.
    dropout
        Share of attention weights, and of outputs, that training sets to zero. With it, training runs plain PyTorch.

    Examples
    --------
    >>> from wbdit.crate import Attention
    >>> Attention(64, heads=4, dim_head=16)(torch.randn(2, 9, 64)).shape
    torch.Size([2, 9, 64])
    """

    def __init__(self, dim: int, heads: int = 8, dim_head: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.scale = dim_head**-0.5
        self.dropout = nn.Dropout(dropout)
        self.qkv = nn.Linear(dim, inner, bias=False)
        self.to_out: nn.Module = nn.Identity()
        if heads > 1 or dim_head != dim:
            self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """Turn tokens ``(B, N, d)`` into ``(B, N, d)``."""
        w = self.qkv(x)
        if self.training and self.dropout.p > 0:
            return self.to_out(self._attend_with_dropout(w))
        return self.to_out(ops.mssa(w, self.heads))

    def _attend_with_dropout(self, w: Tensor) -> Tensor:
        heads = w.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, h, N, p)
        weights = self.dropout((heads @ heads.mT * self.scale).softmax(-1))
        return (weights @ heads).transpose(1, 2).flatten(2)


class FeedForward(ISTA):
    """CRATE's ``FeedForward``: one step of iterative shrinkage-thresholding against a learned dictionary.

    Parameters
    ----------
    dim
        Width d of a token; the dictionary is ``(d, d)``.
    hidden_dim, dropout
        Accepted and unused, as published.
    step_size
        Step size eta. The sparsity penalty is 0.1, as published.

    Examples
    --------
    >>> from wbdit.crate import FeedForward
    >>> FeedForward(64)(torch.randn(2, 9, 64)).min() >= 0
    tensor(True)
    """

    def __init__(self, dim: int, hidden_dim: int | None = None, dropout: float = 0.0, step_size: float = 0.1) -> None:
        super().__init__(dim, eta=step_size, lam=0.1)

    @property
    def step_size(self) -> float:
        """Step size eta."""
        return self.eta

    @property
    def lambd(self) -> float:
        """Sparsity penalty lambda."""
        return self.lam


def accelerate(model: nn.Module) -> nn.Module:
    """Replace CRATE's blocks inside a network by their fast twins, in place.

    A block is recognized by its parts and attributes, not by its class: an attention by ``qkv``, ``to_out`` and
    ``heads``, a feed-forward by a square ``weight``, ``step_size`` and ``lambd``. It is replaced if its twin gives the
    same output on random tokens, and if nobody hooked into it. Parameters are shared with the old block, so optimizers
    and state dicts stay valid.

    Parameters
    ----------
    model
        Any network, on any device.

    Returns
    -------
    The network.

    Raises
    ------
    InputError
        If no block can be replaced.

    Examples
    --------
    >>> from wbdit.crate import Attention, FeedForward, accelerate
    >>> network = torch.nn.Sequential(Attention(64, 4, 16), FeedForward(64))  # or a CRATE by others
    >>> accelerate(network)(torch.randn(2, 9, 64)).shape
    torch.Size([2, 9, 64])
    """
    replaced = 0
    for parent, name, block in list(_children(model)):
        twin = _attention_twin(block) or _feed_forward_twin(block)
        if twin is not None and _agree(block, twin):
            setattr(parent, name, twin)
            replaced += 1
    if replaced == 0:
        raise InputError(
            "accelerate found no CRATE block in this network: it looks for Attention (qkv, to_out, heads) and "
            "FeedForward (weight, step_size, lambd)"
        )
    return model


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def _attention_twin(block: nn.Module) -> Attention | None:
    qkv, out, heads = (getattr(block, name, None) for name in ("qkv", "to_out", "heads"))
    if not isinstance(qkv, nn.Linear) or qkv.bias is not None or not isinstance(heads, int):
        return None
    if not isinstance(out, nn.Identity | nn.Sequential) or heads < 1 or qkv.out_features % heads:
        return None
    rates = {part.p for part in block.modules() if isinstance(part, nn.Dropout)}
    if len(rates) > 1:
        return None
    with torch.device("meta"):  # no weights of its own
        twin = Attention(qkv.in_features, heads, qkv.out_features // heads, rates.pop() if rates else 0.0)
    twin.qkv, twin.to_out = qkv, out
    return twin.train(block.training)


def _feed_forward_twin(block: nn.Module) -> FeedForward | None:
    weight, step, penalty = (getattr(block, name, None) for name in ("weight", "step_size", "lambd"))
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or weight.shape[0] != weight.shape[1]:
        return None
    if not isinstance(step, float) or not isinstance(penalty, float):
        return None
    with torch.device("meta"):
        twin = FeedForward(len(weight), step_size=step)
    twin.weight, twin.lam = weight, penalty
    return twin.train(block.training)


@torch.no_grad()
def _agree(block: nn.Module, twin: nn.Module) -> bool:
    """Whether a twin can stand in for a block: no hooks, and the same output on random tokens without dropout."""
    if block._forward_hooks or block._forward_pre_hooks:
        return False
    weight = next(block.parameters())
    width = twin.qkv.in_features if isinstance(twin, Attention) else len(weight)
    x = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(0)).to(weight)
    training = block.training
    try:
        expected, found = block.eval()(x), twin.eval()(x)
    except (RuntimeError, TypeError):  # a block that takes other arguments
        return False
    finally:
        block.train(training)
        twin.train(training)
    return expected.shape == found.shape and bool((expected - found).norm() <= TOLERANCE * expected.norm())
