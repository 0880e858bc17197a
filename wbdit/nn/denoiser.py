"""The White-Box Diffusion Transformer (Cui, Dong and Liu, arXiv 2411.06785)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wbdit import ops
from wbdit.nn.crate import ISTA, MSSA, LinearMap, product_dtype
from wbdit.nn.embeddings import (
    CellToken,
    FinalLayer,
    LabelEmbedder,
    ModulatedBlock,
    Modulation,
    PatchEmbed,
    TimestepEmbedder,
    gated_adaln,
    sincos_positions,
)
from wbdit.nn.weight_cache import RemembersWeights, may_cache
from wbdit.profiling import span
from wbdit.schedule import Prediction


class WhiteBoxBlock(ModulatedBlock):
    """One white-box layer: compress (MSSA), then sparsify (ISTA).

    Parameters
    ----------
    hidden_size, num_heads
        Width d of a token and number of subspaces h.
    tie_out
        See :class:`WBDiT`.
    """

    attn: MSSA
    mlp: ISTA

    def __init__(self, hidden_size: int, num_heads: int, *, tie_out: bool = False) -> None:
        super().__init__(hidden_size, MSSA(hidden_size, num_heads, tie_out), ISTA(hidden_size))

    @property
    def fits_trunk(self) -> bool:
        """Whether :func:`wbdit.ops.trunk` knows such a block: one of several subspaces."""
        return self.attn.num_heads > 1

    def first_step(self, x: Tensor, z: Tensor, gate: Tensor, following: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Take the compressing half-step, its bias in one pass with what follows."""
        with span("mssa"):
            out = self.attn.out
            if out is None or out.bias is None:
                return super().first_step(x, z, gate, following)
            subspaces = ops.mssa(self.attn.qkv(z), self.attn.num_heads)
            return gated_adaln(x, F.linear(subspaces, out.weight), gate, following, out.bias)

    def second_step(
        self, x: Tensor, z: Tensor, gate: Tensor, following: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Take the sparsifying half-step, its threshold in one pass with what follows."""
        with span("ista"):
            step = ops.ista_adaln if torch.is_grad_enabled() else ops.ista_adaln_
            return step(x, z, self.mlp.folded(), gate, *following, self.mlp.eta, self.mlp.lam)


class Denoiser(RemembersWeights, ABC):
    """The trunk that :class:`WBDiT` and the black-box baseline share: they differ in their blocks alone.

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
        z = self.trunk(tokens, modulations)
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

    def trunk(self, x: Tensor, modulations: Sequence[Sequence[Tensor]]) -> Tensor:
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

    def modulations(self, t: Tensor, y: Tensor | None = None) -> list[Sequence[Tensor]]:
        """Return the shifts, scales and gates of every block and the shift and scale of the final layer.

        Parameters
        ----------
        t, y
            As in :meth:`forward`.

        Returns
        -------
        For each block six tensors ``(B, d)``, then two. Without gradients each pair of
        timestep and labels is computed once and remembered: while sampling, all cells of a type share theirs. Vectors
        in place of labels are not.
        """
        vectors = y is not None and y.is_floating_point()  # these may be as many as samples, at each timestep
        remember = not self.training and not vectors and len(t) > 0 and may_cache(t, *self._conditioning_weights())
        if remember:
            tables = self._remembered(t, y)
        elif not torch.is_grad_enabled() and len(t) > 1 and t.stride(0) == 0:
            tables = self._of_one_timestep(t, y)
        else:
            tables = self._condition(t, y)
        return [table.chunk(part.parts, dim=1) for table, part in zip(tables, self._modulated(), strict=True)]

    def _condition(self, t: Tensor, y: Tensor | None) -> list[Tensor]:
        """Compute the modulations of each sample, for each block ``(B, 6 d)``, then ``(B, 2 d)``."""
        # few rows and many weights: casting these to a lower type would take longer than the products
        with torch.autocast(t.device.type, enabled=False):
            c = self.t_embedder(t)
            if y is not None and y.is_floating_point():
                c = c + y
            elif self.label_sizes:
                c = c + self.y_embedder(y, t.shape[0])
            return [modulation(c) for modulation in self._modulated()]

    def _of_one_timestep(self, t: Tensor, y: Tensor | None) -> list[Tensor]:
        """Give what :meth:`_condition` gives where `t` is one number for all, by a row for each combination of labels.

        For each that can be, since a CUDA graph that is being recorded cannot ask which there are; where these are more
        than the samples, a row a sample.
        """
        if y is None:
            return [table.expand(len(t), -1) for table in self._condition(t[:1], None)]
        if y.is_floating_point() or math.prod(k + 1 for k in self.label_sizes) > len(t):
            return self._condition(t, y)
        labels = torch.cartesian_prod(*(torch.arange(k + 1, device=t.device) for k in self.label_sizes))
        row = torch.zeros_like(t, dtype=torch.long)
        for k, column in zip(self.label_sizes, y.reshape(len(t), -1).unbind(1), strict=True):
            row = row * (k + 1) + column
        return [table[row] for table in self._condition(t[:1].expand(len(labels)), labels)]

    def _remembered(self, t: Tensor, y: Tensor | None) -> Sequence[Tensor]:
        """Look up what :meth:`_condition` gives, computing only the pairs of timestep and labels not met before."""
        labels = [()] * len(t) if y is None else map(tuple, y.reshape(len(t), len(self.label_sizes)).tolist())
        pairs = list(zip(t.tolist(), labels, strict=True))
        rows = self._cache.values(self._conditioning_weights())
        fresh = {pair: i for i, pair in reversed(list(enumerate(pairs))) if pair not in rows}  # where each is first
        if fresh:
            where = sorted(fresh.values())
            computed = torch.cat(self._condition(t[where], None if y is None else y[where]), dim=1)
            rows.update(zip([pairs[i] for i in where], computed, strict=True))
        if len(set(pairs)) == 1:
            table = rows[pairs[0]].expand(len(t), -1)
        else:
            table = torch.stack([rows[pair] for pair in pairs])
        return table.split([part.parts * self.hidden_size for part in self._modulated()], dim=1)

    def _modulated(self) -> Iterator[Modulation]:
        for part in (*self.blocks, self.final_layer):
            yield part.adaLN_modulation

    def _conditioning_weights(self) -> Iterator[Tensor]:
        for module in (self.t_embedder, getattr(self, "y_embedder", None), *self._modulated()):
            if module is not None:
                yield from module.parameters()


class WBDiT(Denoiser):
    """The White-Box Diffusion Transformer: every block compresses by MSSA and sparsifies by ISTA.

    Takes the published arguments and state dicts; what goes beyond the paper is keyword-only and off by default. See
    :class:`Denoiser` for the arguments but these.

    Parameters
    ----------
    tie_out
        Map what the subspaces give back by U^T, the transposed projection itself, without weights of its own: MSSA as
        it is derived (Yu et al. 2023, CRATE).

    Examples
    --------
    >>> model = WBDiT(depth=3)
    >>> x, t = torch.randn(16, 1, 2000), torch.randint(1, 1000, (16,))
    >>> model(x, t).shape
    torch.Size([16, 1, 2000])
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
        tie_out: bool = False,
    ) -> None:
        super().__init__(
            *(input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio, class_dropout_prob),
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            prediction=prediction,
            shared_patches=shared_patches,
            cell_token=cell_token,
            tie_out=tie_out,
        )

    def make_block(self, mlp_ratio: float, **options: Any) -> WhiteBoxBlock:
        """Return a white-box block."""
        return WhiteBoxBlock(self.hidden_size, self.num_heads, **options)

    def trunk(self, x: Tensor, modulations: Sequence[Sequence[Tensor]]) -> Tensor:
        """Turn embedded tokens into what the final layer reads; on a GPU, without gradients, by one op."""
        if not self._is_one_op(x):
            return super().trunk(x, modulations)
        with span("trunk"):
            blocks = cast(list[WhiteBoxBlock], list(self.blocks))
            steps = [block.mlp for block in blocks]
            outs = [cast(LinearMap, block.attn.out) for block in blocks]
            folded = [step.folded() for step in steps]
            low, no_bias = folded[0].dtype, x.new_zeros(self.hidden_size)
            return ops.trunk(
                x,
                [part for modulation in modulations for part in modulation],
                [block.attn.qkv.weight.to(low) for block in blocks],
                [out.weight.to(low).contiguous() for out in outs],
                [no_bias if out.bias is None else out.bias for out in outs],
                folded,
                self.num_heads,
                steps[0].eta,
                steps[0].lam,
            )

    def _is_one_op(self, x: Tensor) -> bool:
        """Whether the blocks can be taken all at once: nobody looks into them, and products are in bf16."""
        if torch.is_grad_enabled() or not x.is_cuda or product_dtype(self.pos_embed) != torch.bfloat16:
            return False
        watched = any(module._forward_hooks or module._forward_pre_hooks for module in self.blocks.modules())
        return not watched and all(block.fits_trunk for block in cast(list[WhiteBoxBlock], self.blocks))


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
