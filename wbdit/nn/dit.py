"""The black-box baseline: the Diffusion Transformer (Peebles and Xie 2023)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from wbdit.nn.blocks import ModulatedBlock
from wbdit.nn.denoiser import Denoiser
from wbdit.nn.embeddings import xavier


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) with one linear map for query, key and value.

    Parameters
    ----------
    hidden_size, num_heads
        Width d of a token and number of heads h; h must divide d.

    Raises
    ------
    ValueError
        If `num_heads` does not divide `hidden_size`.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide hidden_size ({hidden_size})")
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def initialize_weights(self) -> None:
        """Reinitialize the weights."""
        xavier(self.qkv, self.proj)

    def forward(self, z: Tensor) -> Tensor:
        """Map tokens ``(B, N, d)`` to ``(B, N, d)``."""
        q, k, v = self.qkv(z).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear maps with a GELU (tanh form) between them."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def initialize_weights(self) -> None:
        """Reinitialize the weights."""
        xavier(self.fc1, self.fc2)

    def forward(self, z: Tensor) -> Tensor:
        """Map tokens ``(B, N, d)`` to ``(B, N, d)``."""
        return self.fc2(F.gelu(self.fc1(z), approximate="tanh"))


class DiTBlock(ModulatedBlock):
    """A black-box block: attention, then a perceptron."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        attn, mlp = Attention(hidden_size, num_heads), Mlp(hidden_size, int(hidden_size * mlp_ratio))
        for half in (attn, mlp):
            half.initialize_weights()
        super().__init__(hidden_size, attn, mlp)


class DiT(Denoiser):
    """The Diffusion Transformer on patches of genes: the black-box baseline for :class:`wbdit.WBDiT`.

    It takes the published arguments and state dicts. See :class:`wbdit.nn.denoiser.Denoiser` for the arguments, the
    shapes of a call and the errors. Its blocks take no options.

    Examples
    --------
    >>> model = wbdit.DiT(input_size=2000, hidden_size=64, num_heads=4, depth=2, label_sizes=[3])
    >>> x, t = torch.randn(4, 1, 2000), torch.randint(1, 1000, (4,))
    >>> model(x, t, torch.tensor([0, 1, 2, 3])).shape  # label 3 stands for "no label"
    torch.Size([4, 1, 2000])
    """

    def make_block(self, mlp_ratio: float, **options: Any) -> DiTBlock:
        """Return a black-box block."""
        return DiTBlock(self.hidden_size, self.num_heads, mlp_ratio, **options)
