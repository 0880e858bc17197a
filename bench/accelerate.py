"""A CRATE network as its authors write it, and how much faster `wbdit.accelerate` makes it.

    python -m bench.accelerate                # 12 layers of width 384, 197 tokens, on the threads of OMP_NUM_THREADS

Times both networks in turns, forward and training step, after checking that their outputs agree.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wbdit

ROUNDS = 9


class Attention(nn.Module):
    """MSSA by its formula (Yu et al. 2023), in plain PyTorch and the published parameters."""

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.attend, self.dropout = nn.Softmax(dim=-1), nn.Dropout(dropout)
        self.qkv = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each subspace."""
        w = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        weights = self.dropout(self.attend(w @ w.transpose(-1, -2) * self.scale))
        return self.to_out((weights @ w).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """ISTA by its formula (Yu et al. 2023): a gradient step, then a non-negative threshold."""

    def __init__(self, dim: int, step_size: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.weight)
        self.step_size, self.lambd = step_size, 0.1

    def forward(self, x: Tensor) -> Tensor:
        """Take the step."""
        back = F.linear(F.linear(x, self.weight), self.weight.t())
        gradient = F.linear(x, self.weight.t()) - back
        return F.relu(x + self.step_size * gradient - self.step_size * self.lambd)


class Layer(nn.Module):
    """One layer: attention with a residual connection, then the sparse step, each after a LayerNorm."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.attention = Attention(dim, heads, dim // heads, dropout)
        self.sparsify = FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both half-steps."""
        x = x + self.attention(self.norms[0](x))
        return self.sparsify(self.norms[1](x))


def crate(layers: int = 12, dim: int = 384, heads: int = 6, dropout: float = 0.0) -> nn.Sequential:
    """Return a CRATE encoder, by default of the size that its authors call tiny."""
    return nn.Sequential(*(Layer(dim, heads, dropout) for _ in range(layers)))


def _turns(steps: list[Callable[[], object]]) -> list[float]:
    """Return each step's median seconds over rounds in which all take their turn."""
    for step in steps:
        step()
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(ROUNDS):
        for taken, step in zip(times, steps, strict=True):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def main() -> None:
    """Print the agreement and the ratios."""
    torch.manual_seed(0)
    plain = crate()
    fast = wbdit.accelerate(copy.deepcopy(plain))
    x = torch.randn(4, 197, 384)
    with torch.no_grad():
        error = (plain(x) - fast(x)).norm() / plain(x).norm()
        seconds = _turns([lambda: plain(x), lambda: fast(x)])
    print(f"outputs differ by {float(error):.1e}")
    steps = _turns([lambda: plain(x).square().mean().backward(), lambda: fast(x).square().mean().backward()])
    for name, (slow, quick) in {"forward": seconds, "training step": steps}.items():
        print(f"{name}: {slow * 1e3:.0f} ms, accelerated {quick * 1e3:.0f} ms: {slow / quick:.2f} times as fast")


if __name__ == "__main__":
    main()
