"""Embeddings of timesteps, labels, patches of genes and whole cells.

Parameter names and initial values follow the published implementation, so that its checkpoints load.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wbdit._draws import draw


class TimestepEmbedder(nn.Module):
    """A sinusoidal embedding of the timestep (Vaswani et al. 2017), followed by a two-layer perceptron.

    Parameters
    ----------
    hidden_size
        Width d of the embedding.
    frequencies
        Number of sinusoids, half cosines and half sines, with periods from 2 pi to 2 pi 10^4.
    """

    def __init__(self, hidden_size: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Reinitialize the weights."""
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
    """A learned vector per label, and one per column for "no label", which classifier-free guidance needs.

    With several columns of labels, the vectors of a sample's labels are summed.

    Parameters
    ----------
    label_sizes
        Number of labels of each column, ``(K_1 ... K_C)``; index K_c is the null label of column c.
    hidden_size
        Width d of the embedding.
    dropout
        Probability p that a label is replaced by the null label in training (Ho and Salimans 2022). With several
        columns, each column is dropped with probability p, and all columns together with probability p. Guidance also
        evaluates the model without any label, a case that independent drops would rarely produce.
    """

    def __init__(self, label_sizes: Sequence[int], hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.label_sizes = tuple(label_sizes)
        self.dropout = dropout
        # one table with the rows of all columns stacked: with one column it equals the published table
        self.embedding_table = nn.Embedding(sum(self.label_sizes) + len(self.label_sizes), hidden_size)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Reinitialize the weights."""
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y: Tensor | None, batch: int) -> Tensor:
        """Embed labels ``(B, C)``, or ``(B,)`` for one column, int64 in [0, K_c], as ``(B, d)``; None for no labels."""
        if y is None:
            tables = self.embedding_table.weight.split([labels + 1 for labels in self.label_sizes])
            return reduce(torch.add, [table[-1:] for table in tables]).expand(batch, -1)
        return self.embed(self.drop(y) if self.training else y)

    def drop(self, y: Tensor) -> Tensor:
        """Replace labels by the null label at random, as in training."""
        if self.dropout == 0:
            return y
        columns = len(self.label_sizes)
        drops = _drops(y, columns, self.dropout)
        dropped = drops[:, :columns] | drops[:, -1:]
        nulls = torch.tensor(self.label_sizes, device=y.device)
        return torch.where(dropped, nulls, y.reshape(len(y), columns)).view_as(y)

    def embed(self, y: Tensor) -> Tensor:
        """Embed labels ``(B, C)`` or ``(B,)`` as ``(B, d)``, without dropout."""
        tables = self.embedding_table.weight.split([labels + 1 for labels in self.label_sizes])
        return reduce(torch.add, map(F.embedding, y.reshape(len(y), len(tables)).unbind(1), tables))


class CovariateEmbedder(nn.Module):
    """A two-layer perceptron per continuous covariate; the vectors of a sample's covariates are summed.

    The perceptrons see the value alone, without sinusoids: these would fit the training values and oscillate between
    them. A covariate that is not given adds nothing.

    Parameters
    ----------
    n_covariates
        Number of covariates K.
    hidden_size
        Width d of the embedding.
    dropout
        Probability that a covariate is hidden in training, as in :class:`LabelEmbedder`.
    """

    def __init__(self, n_covariates: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.n_covariates = n_covariates
        self.dropout = dropout
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(1, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
            for _ in range(n_covariates)
        )
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Reinitialize the weights."""
        for mlp in cast(Iterable[nn.Sequential], self.mlps):
            first, _, last = cast(tuple[nn.Linear, nn.SiLU, nn.Linear], tuple(mlp))
            first.reset_parameters()
            nn.init.normal_(last.weight, std=0.02)
            nn.init.zeros_(last.bias)

    def drop(self, covariates: Tensor) -> Tensor:
        """Hide covariates ``(B, K)`` at random, as in training: each one, and all of a sample together."""
        columns = self.n_covariates
        drops = _drops(covariates, columns, self.dropout)
        return covariates.masked_fill(drops[:, :columns] | drops[:, -1:], torch.nan)

    def forward(self, covariates: Tensor) -> Tensor:
        """Embed scaled covariates ``(B, K)`` as ``(B, d)``; NaN stands for "not given"."""
        given = covariates.isfinite()
        values = torch.where(given, covariates, 0.0)
        vectors = [mlp(values[:, k, None]) * given[:, k, None] for k, mlp in enumerate(self.mlps)]
        return reduce(torch.add, vectors)


class LocalLinear(nn.Module):
    """A separate linear map per token: a locally connected layer, where :class:`torch.nn.Linear` shares one map.

    Parameters
    ----------
    tokens
        Number of tokens N.
    inputs, outputs
        Input and output width per token.
    """

    def __init__(self, tokens: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(tokens, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(tokens, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, N, inputs)`` to ``(B, N, outputs)``."""
        return torch.baddbmm(self.bias, x.transpose(0, 1), self.weight).transpose(0, 1)


def per_patch(layer: nn.Module) -> list[Tensor]:
    """Return weight ``(1 or N, outputs, inputs)`` and bias ``(1 or N, outputs)`` of a linear map of patches or tokens.

    `layer` is a :class:`LocalLinear`, or one map for all patches: a linear layer or a published convolution.
    """
    weight, bias = cast(Tensor, layer.weight), cast(Tensor, layer.bias)
    return [weight.mT, bias[:, 0]] if isinstance(layer, LocalLinear) else [weight.flatten(1)[None], bias[None]]


class PatchEmbed(nn.Module):
    """A projection of each patch of genes to a token.

    Parameters
    ----------
    input_size, patch_size
        Genes G and genes per patch P. If P does not divide G, the last patch is padded with zeros.
    in_channels
        Values per gene C.
    hidden_size
        Width d of a token.
    shared
        Use one projection for all patches, as published, or one per patch. Unlike patches of an image, each patch
        holds different genes.
    """

    def __init__(
        self, input_size: int, patch_size: int, in_channels: int, hidden_size: int, shared: bool = True
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.patch_size = patch_size
        self.num_patches = math.ceil(input_size / patch_size)
        # the Conv2d only stores the weights: published checkpoints hold the projection as a (d, C, P, 1) kernel
        self.proj: nn.Conv2d | LocalLinear
        if shared:
            self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=(patch_size, 1), stride=(patch_size, 1))
        else:
            self.proj = LocalLinear(self.num_patches, in_channels * patch_size, hidden_size)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Reinitialize the weights."""
        if isinstance(self.proj, LocalLinear):
            nn.init.normal_(self.proj.weight, std=self.proj.weight.shape[1] ** -0.5)
        else:
            nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, G)`` to tokens ``(B, N, d)``."""
        x = F.pad(x, (0, self.num_patches * self.patch_size - self.input_size))
        patches = x.unflatten(-1, (self.num_patches, self.patch_size)).transpose(1, 2).flatten(2)  # [B, N, C P]
        if isinstance(self.proj, LocalLinear):
            return self.proj(patches)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class CellToken(nn.Module):
    """A token for the whole cell: a projection of all genes to one token, and a linear map back to all genes.

    Patches exchange information only in the blocks; this token depends on all genes from the start.

    Parameters
    ----------
    inputs
        Values per cell.
    hidden_size
        Width d of a token.
    outputs
        Outputs per cell; zero at initialization.
    """

    def __init__(self, inputs: int, hidden_size: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, hidden_size)
        self.linear = nn.Linear(hidden_size, outputs)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Reinitialize the weights, such that the outputs are zero."""
        nn.init.normal_(self.proj.weight, std=self.proj.in_features**-0.5)
        for zeros in (self.proj.bias, self.linear.weight, self.linear.bias):
            nn.init.zeros_(zeros)

    def embed(self, x: Tensor) -> Tensor:
        """Map ``(B, C, G)`` to the token ``(B, 1, d)``."""
        return self.proj(x.flatten(1))[:, None]

    def read(self, z: Tensor) -> Tensor:
        """Map the token ``(B, d)`` to outputs ``(B, outputs)``."""
        return self.linear(z)

    @torch.no_grad()
    def init_principal_components(self, variances: Tensor, axes: Tensor) -> None:
        """Set the first rows of the projection to the leading principal axes of the training cells.

        Each axis is divided by its component's standard deviation, but only where that exceeds 1, so that noise is
        not amplified.

        Parameters
        ----------
        variances, axes
            Variances ``(K,)`` and axes ``(K, inputs)``, leading ones first. At most `hidden_size` are used.
        """
        k = min(len(axes), len(self.proj.weight))
        self.proj.weight[:k] = (axes[:k] / variances[:k, None].clamp(min=1).sqrt()).to(self.proj.weight)


def sincos_positions(tokens: int, hidden_size: int) -> Tensor:
    """Return the fixed position embeddings ``(1, N, d)``: the 2-D sine-cosine embedding of a grid of N by 1.

    The width coordinate is zero everywhere, so the first half of each row is constant, as in the published
    checkpoints. The second half is the 1-D embedding of the patch index.
    """
    quarter = hidden_size // 4
    rates = 1e4 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    waves = [
        fn(torch.outer(position, rates))
        for position in (torch.zeros(tokens, dtype=torch.float64), torch.arange(tokens, dtype=torch.float64))
        for fn in (torch.sin, torch.cos)
    ]
    return torch.cat(waves, dim=1).float()[None]


def _drops(of: Tensor, columns: int, dropout: float) -> Tensor:
    """Return which columns of samples to hide, and in one more column, which samples to hide whole."""
    width = columns + (columns > 1)
    return draw(len(of), lambda n: torch.rand(n, width, device=of.device)) < dropout


def xavier(*layers: nn.Linear) -> None:
    """Initialize linear maps with Xavier-uniform weights (Glorot and Bengio 2010) and zero biases."""
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
