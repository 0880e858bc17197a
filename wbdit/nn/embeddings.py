"""Embeddings of timesteps, labels, patches of genes and whole cells.

Parameter names and initial values follow the published implementation, so that its checkpoints load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep (Vaswani et al. 2017), then a two-layer perceptron.

    Parameters
    ----------
    hidden_size
        Width d of the embedding.
    frequencies
        Number of sinusoids; half of them cosines, with periods from 2 pi to 2 pi 10^4.
    """

    def __init__(self, hidden_size: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Draw the weights anew."""
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, t: Tensor) -> Tensor:
        """Embed timesteps ``(B,)``, integers or floats, as ``(B, d)``."""
        half = self.frequencies // 2
        rates = torch.exp(-math.log(1e4) / half * torch.arange(half, device=t.device, dtype=torch.float32))
        angles = t[:, None].float() * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """A learned vector for each label, and one more for "no label" that classifier-free guidance starts from.

    With several columns of labels the vectors of a sample's labels are summed.

    Parameters
    ----------
    label_sizes
        Number of labels of each column, ``(K_1 ... K_C)``; index K_c is the null label of column c.
    hidden_size
        Width d of the embedding.
    dropout
        Share p of labels replaced by the null label in training (Ho and Salimans 2022). With several columns each is
        dropped by itself with p, and all of them at once with p: guidance asks for any of them without the others, and
        for none, which drops of single columns alone would hardly ever show.
    """

    def __init__(self, label_sizes: Sequence[int], hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.label_sizes = tuple(label_sizes)
        self.dropout = dropout
        # one table, a column's rows below another's: with one column it is the published one
        self.embedding_table = nn.Embedding(sum(self.label_sizes) + len(self.label_sizes), hidden_size)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Draw the weights anew."""
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y: Tensor | None, batch: int) -> Tensor:
        """Embed labels ``(B, C)``, or ``(B,)`` of one column, int64 in [0, K_c], as ``(B, d)``; None is null alone."""
        if y is None:
            tables = self.embedding_table.weight.split([labels + 1 for labels in self.label_sizes])
            return reduce(torch.add, [table[-1:] for table in tables]).expand(batch, -1)
        return self.embed(self.drop(y) if self.training else y)

    def drop(self, y: Tensor) -> Tensor:
        """Replace labels by null as often as training does."""
        if self.dropout == 0:
            return y
        columns = len(self.label_sizes)
        drops = torch.rand(len(y), columns + (columns > 1), device=y.device) < self.dropout
        dropped = drops[:, :columns] | drops[:, -1:]
        nulls = torch.tensor(self.label_sizes, device=y.device)
        return torch.where(dropped, nulls, y.reshape(len(y), columns)).view_as(y)

    def embed(self, y: Tensor) -> Tensor:
        """Embed labels as they are."""
        tables = self.embedding_table.weight.split([labels + 1 for labels in self.label_sizes])
        return reduce(torch.add, map(F.embedding, y.reshape(len(y), len(tables)).unbind(1), tables))


class LocalLinear(nn.Module):
    """A linear map of its own for each token: a locally connected layer, where nn.Linear shares one.

    Parameters
    ----------
    tokens
        Number of tokens N.
    inputs, outputs
        Widths before and after.
    """

    def __init__(self, tokens: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(tokens, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(tokens, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Turn ``(B, N, inputs)`` into ``(B, N, outputs)``."""
        return torch.baddbmm(self.bias, x.transpose(0, 1), self.weight).transpose(0, 1)


class PatchEmbed(nn.Module):
    """Cut the genes into patches and project each to a token.

    Parameters
    ----------
    input_size, patch_size
        Genes G and genes a patch P; where P does not divide G, the last patch is filled with zeros.
    in_channels
        Values a gene C.
    hidden_size
        Width d of a token.
    shared
        One projection for all patches, as published, or one for each: genes are not pixels, patch 7 holds other genes
        than patch 8.
    """

    def __init__(
        self, input_size: int, patch_size: int, in_channels: int, hidden_size: int, shared: bool = True
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.patch_size = patch_size
        self.num_patches = math.ceil(input_size / patch_size)
        # a convolution in name only: the published checkpoints hold the projection as a (d, C, P, 1) kernel
        self.proj: nn.Conv2d | LocalLinear
        if shared:
            self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=(patch_size, 1), stride=(patch_size, 1))
        else:
            self.proj = LocalLinear(self.num_patches, in_channels * patch_size, hidden_size)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Draw the weights anew."""
        if isinstance(self.proj, LocalLinear):
            nn.init.normal_(self.proj.weight, std=self.proj.weight.shape[1] ** -0.5)
        else:
            nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Turn ``(B, C, G)`` into tokens ``(B, N, d)``."""
        x = F.pad(x, (0, self.num_patches * self.patch_size - self.input_size))
        patches = x.unflatten(-1, (self.num_patches, self.patch_size)).transpose(1, 2).flatten(2)  # [B, N, C P]
        if isinstance(self.proj, LocalLinear):
            return self.proj(patches)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class CellToken(nn.Module):
    """A token for the whole cell: a projection of all genes at once, and a linear map back to all of them.

    Patches meet in the blocks alone; what all genes say together of a cell is one product away here.

    Parameters
    ----------
    inputs
        Values a cell.
    hidden_size
        Width d of a token.
    outputs
        Answers a cell; zero at the start.
    """

    def __init__(self, inputs: int, hidden_size: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, hidden_size)
        self.linear = nn.Linear(hidden_size, outputs)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Draw the weights anew; answers are zero."""
        nn.init.normal_(self.proj.weight, std=self.proj.in_features**-0.5)
        for zeros in (self.proj.bias, self.linear.weight, self.linear.bias):
            nn.init.zeros_(zeros)

    def embed(self, x: Tensor) -> Tensor:
        """Turn ``(B, C, G)`` into the token ``(B, 1, d)``."""
        return self.proj(x.flatten(1))[:, None]

    def read(self, z: Tensor) -> Tensor:
        """Turn the token ``(B, d)`` into answers ``(B, outputs)``."""
        return self.linear(z)

    @torch.no_grad()
    def init_principal_components(self, x: Tensor, components: int = 64) -> None:
        """Let the first rows of the projection be principal components of cells ``(n, G)``, in their deviations.

        A component of less than unit variance keeps its own scale, so that noise is not enlarged.
        """
        centered = x.double() - x.double().mean(0)
        variances, axes = torch.linalg.eigh(centered.T @ centered / len(x))
        k = min(components, len(variances), len(self.proj.weight))
        deviations = variances.flip(0)[:k].clamp(min=1).sqrt()
        self.proj.weight[:k] = (axes.flip(1)[:, :k] / deviations).T.to(self.proj.weight)


def sincos_positions(tokens: int, hidden_size: int) -> Tensor:
    """Return the fixed positions ``(1, N, d)``: the 2-D sine-cosine embedding of a grid N high and one wide.

    The width coordinate is zero everywhere, so the first half of each row is constant, as it is in the published
    checkpoints; the second half is the 1-D embedding of the patch's index.
    """
    quarter = hidden_size // 4
    rates = 1e4 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    waves = [
        fn(torch.outer(position, rates))
        for position in (torch.zeros(tokens, dtype=torch.float64), torch.arange(tokens, dtype=torch.float64))
        for fn in (torch.sin, torch.cos)
    ]
    return torch.cat(waves, dim=1).float()[None]


def xavier(*layers: nn.Linear) -> None:
    """Draw the weights of linear maps (Glorot and Bengio 2010); their biases are zero."""
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
