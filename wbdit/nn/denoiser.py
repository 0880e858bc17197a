"""What :class:`wbdit.WBDiT` and the black-box :class:`wbdit.DiT` share: all but their blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from wbdit import ops
from wbdit.nn.blocks import FinalLayer
from wbdit.nn.conditioning import Conditioned
from wbdit.nn.crate import product_dtype
from wbdit.nn.embeddings import CellToken, LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_positions
from wbdit.profiling import span
from wbdit.schedule import Prediction


class Denoiser(Conditioned, ABC):
    """All that :class:`WBDiT` and the black-box :class:`wbdit.DiT` share: they differ in their blocks alone.

    Parameters
    ----------
    input_size
        Genes G; any number of one or more.
    patch_size
        Genes a token P; where it does not divide G, the last token is filled up with zeros, unseen from outside.
    in_channels
        Values a gene C.
    hidden_size
        Width d of a token; a multiple of 4.
    depth
        Number of blocks.
    num_heads
        Number of attention heads h; d // h is their width.
    mlp_ratio
        Width of a DiT block's perceptron over d. A white-box block has none and ignores it, as published.
    class_dropout_prob
        Share of labels replaced by the null label in training mode, see :class:`wbdit.nn.embeddings.LabelEmbedder`.
    num_classes
        Number of labels K; 0 for an unconditional model; for several columns of labels the number of each.
    learn_sigma
        Give two output channels for each input channel, as in DiT.
    prediction
        What the output means: the noise ("epsilon"), the velocity ("v", Salimans and Ho 2022) or the clean cell ("x0").
    shared_patches
        Embed all patches by one projection and read them out by one, as published, or give each patch its own.
    cell_token
        One more token, after the patches': embedded from all genes at once and read out to all of them.
    **options
        What else a model's own kind of block takes, see :meth:`make_block`.

    Raises
    ------
    ValueError
        If the sizes do not fit each other, or there is no such prediction.
    TypeError
        If the blocks take no such option.
    """

    def __init__(
        self,
        input_size: int = 2000,
        patch_size: int = 10,
        in_channels: int = 1,
        hidden_size: int = 768,
        depth: int = 1,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        *,
        num_classes: int | Sequence[int] = 0,
        learn_sigma: bool = False,
        prediction: Prediction = "epsilon",
        shared_patches: bool = True,
        cell_token: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_sizes(input_size, patch_size, in_channels, hidden_size, depth, num_heads, prediction)
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.label_sizes = _label_sizes(num_classes)
        self.num_classes = num_classes if isinstance(num_classes, int) else self.label_sizes
        self.prediction: Prediction = prediction
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, shared_patches)
        self.t_embedder = TimestepEmbedder(hidden_size)
        if self.label_sizes:
            self.y_embedder = LabelEmbedder(self.label_sizes, hidden_size, class_dropout_prob)
        positions = sincos_positions(self.x_embedder.num_patches, hidden_size)
        if cell_token:
            self.cell_token = CellToken(in_channels * input_size, hidden_size, self.out_channels * input_size)
            positions = torch.cat([positions, torch.zeros(1, 1, hidden_size)], dim=1)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(self.make_block(mlp_ratio, **options) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, input_size, self.out_channels, shared_patches)

    @abstractmethod
    def make_block(self, mlp_ratio: float, **options: Any) -> nn.Module:
        """Return one block of this model's kind, see :class:`wbdit.nn.embeddings.ModulatedBlock`."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict what :attr:`prediction` names.

        Parameters
        ----------
        x
            Noised cells ``(B, C, G)``, floating.
        t
            Timesteps ``(B,)``, integers or floats in [0, 1000).
        y
            Labels ``(B,)``, int64 in [0, K); K, or None for all, means "no label". ``(B, C)`` for several columns, each
            with its own K. Or conditioning vectors ``(B, d)``, floating, see :meth:`embed_labels`.

        Returns
        -------
        ``(B, C, G)``, or ``(B, 2 C, G)`` with `learn_sigma`.

        Raises
        ------
        ValueError
            If the shapes do not fit the model, or `y` is given to an unconditional one.
        """
        if x.ndim != 3 or x.shape[1:] != (self.in_channels, self.input_size):
            raise ValueError(f"x is {tuple(x.shape)}, the model takes (B, {self.in_channels}, {self.input_size})")
        if t.shape != (x.shape[0],):
            raise ValueError(f"t is {tuple(t.shape)}, one timestep a sample is ({x.shape[0]},)")
        if y is not None:
            self._check_labels(y, len(t))
        with span("denoiser"):
            return self._denoise(x, t, y)

    def embed_labels(self, y: Tensor) -> Tensor:
        """Return the conditioning vectors ``(B, d)`` of labels, which :meth:`forward` takes in place of labels.

        What lies between two sets of labels is conditioned on a mixture of their vectors.

        Parameters
        ----------
        y
            As in :meth:`forward`.
        """
        self._check_labels(y, len(y))
        return self.y_embedder(y, len(y))

    def _check_labels(self, y: Tensor, batch: int) -> None:
        columns = len(self.label_sizes)
        if y.is_floating_point():
            if y.shape != (batch, self.hidden_size):
                raise ValueError(f"y is {tuple(y.shape)}, one vector a sample is ({batch}, {self.hidden_size})")
        elif columns == 0:
            raise ValueError("this model was made without labels (num_classes=0)")
        elif y.shape != (batch, columns) and (columns > 1 or y.shape != (batch,)):
            expected = f"({batch},)" if columns == 1 else f"({batch}, {columns})"
            raise ValueError(f"y is {tuple(y.shape)}, one label a sample is {expected}")

    def _denoise(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        with span("conditioning"):
            modulations = self.modulations(t, y)
        with span("embedding"):
            tokens = self.embed(x)
        z = self.run_blocks(tokens, modulations)
        with span("read-out"):
            if not self.has_cell_token:
                return self.final_layer(z)
            return self.final_layer(z[:, :-1]) + self.cell_token.read(z[:, -1]).view(len(x), self.out_channels, -1)

    def embed(self, x: Tensor) -> Tensor:
        """Turn noised cells ``(B, C, G)`` into the tokens ``(B, N, d)`` that the blocks take."""
        tokens = self.x_embedder(x)
        if self.has_cell_token:
            tokens = torch.cat([tokens, self.cell_token.embed(x).to(tokens.dtype)], dim=1)
        # the residual stream is summed in fp32, whatever the products' type
        wide = torch.promote_types(tokens.dtype, torch.float32)
        return tokens.to(wide, memory_format=torch.contiguous_format).contiguous() + self.pos_embed

    @property
    def has_cell_token(self) -> bool:
        """Whether one token stands for the whole cell."""
        return hasattr(self, "cell_token")

    def run_blocks(self, x: Tensor, modulations: Sequence[Sequence[Tensor]]) -> Tensor:
        """Turn embedded tokens ``(B, N, d)`` into what the final layer reads, by all blocks.

        Parameters
        ----------
        x
            The tokens; without gradients their memory is used again.
        modulations
            As :meth:`modulations` returns them.
        """
        shift, scale = modulations[0][:2]
        z = ops.adaln(x, shift, scale, dtype=product_dtype(self.pos_embed))
        for block, (modulation, (shift, scale, *_)) in zip(self.blocks, pairwise(modulations), strict=True):
            x, z = block(x, z, modulation, (shift, scale))
        return z


def _label_sizes(num_classes: int | Sequence[int]) -> tuple[int, ...]:
    """Return the number of labels of each column; none for an unconditional model."""
    if isinstance(num_classes, int):
        return (num_classes,) if num_classes > 0 else ()
    if any(labels < 1 for labels in num_classes):
        raise ValueError(f"each column of labels must have at least one, not {tuple(num_classes)}")
    return tuple(num_classes)


def _check_sizes(
    input_size: int, patch_size: int, in_channels: int, hidden_size: int, depth: int, num_heads: int, prediction: str
) -> None:
    if min(input_size, patch_size, in_channels, depth, num_heads) < 1:
        raise ValueError("input_size, patch_size, in_channels, depth and num_heads must be at least 1")
    if hidden_size % 4 or hidden_size < max(4, num_heads):
        raise ValueError(f"hidden_size must be a multiple of 4 and at least num_heads, not {hidden_size}")
    if prediction not in ("epsilon", "v", "x0"):
        raise ValueError(f"prediction must be 'epsilon', 'v' or 'x0', not {prediction!r}")
