"""What :class:`wbdit.WBDiT` and the black-box :class:`wbdit.DiT` share: all but their blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from wbdit import ops
from wbdit.nn.blocks import FinalLayer
from wbdit.nn.conditioning import Conditioned
from wbdit.nn.crate import product_dtype
from wbdit.nn.embeddings import CellToken, LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_positions
from wbdit.profiling import span
from wbdit.schedule import Prediction


class Denoises(Protocol):
    """What generating and training ask of a model: a :class:`Denoiser`, or one with a likelihood of counts.

    Attributes
    ----------
    prediction
        What its output means.
    label_sizes
        Number of labels of each column.
    stop
        Timestep at which sampling ends.
    training
        Whether it is in training mode, as modules know it.
    network
        The network itself, without the likelihood that makes counts of its answers.
    """

    prediction: Prediction
    label_sizes: tuple[int, ...]
    stop: int
    training: bool

    @property
    def network(self) -> Denoiser:
        """The network."""

    def __call__(self, x: Tensor, t: Tensor, **given: Any) -> Tensor:
        """Answer for noised cells at timesteps, given labels or conditioning."""

    def embed(self, y: Tensor | None, log_library: Tensor | None) -> Tensor:
        """Return the conditioning of labels, one row per sample."""

    def start(self, noise: Tensor) -> Tensor:
        """Return what sampling starts from."""

    def fix_library(self, call: Any, log_library: Tensor) -> Any:
        """Return what samplers call for cells of given library sizes, ``(B,)`` natural logarithms."""

    def finish(self, x: Tensor, model: Any, uniform: Callable[[], Tensor], library: Tensor) -> Tensor:
        """Return cells ``(B, G)`` where sampling has ended.

        Parameters
        ----------
        x
            Where it ended, ``(B, 1, G)``.
        model
            What the sampler called.
        uniform
            Draws uniform numbers ``(B, G)``, if they are needed.
        library
            Library sizes ``(B,)``.
        """


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
        Accepted and unused, as published.
    learn_sigma
        Give two output channels for each input channel, as in DiT.
    label_sizes
        Number of labels K_c of each column of labels; none for an unconditional model.
    n_outputs
        Answers per value; two with `learn_sigma`.
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

    stop = 0

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
        num_classes: int = 1000,
        learn_sigma: bool = False,
        *,
        label_sizes: Sequence[int] = (),
        n_outputs: int = 1,
        prediction: Prediction = "epsilon",
        shared_patches: bool = True,
        cell_token: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_sizes(
            input_size, patch_size, in_channels, hidden_size, depth, num_heads, n_outputs, prediction, label_sizes
        )
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels * (2 if learn_sigma else n_outputs)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.label_sizes = tuple(label_sizes)
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
        tokens = self.x_embedder.num_patches
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, None if shared_patches else tokens)

    @abstractmethod
    def make_block(self, mlp_ratio: float, **options: Any) -> nn.Module:
        """Return one block of this model's kind, see :class:`wbdit.nn.blocks.ModulatedBlock`."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, conditioning: Tensor | None = None) -> Tensor:
        """Predict what :attr:`prediction` names.

        Parameters
        ----------
        x
            Noised cells ``(B, C, G)``, floating.
        t
            Timesteps ``(B,)``, integers or floats in [0, 1000).
        y
            Labels ``(B,)``, int64 in [0, K); K, or None for all, means "no label". ``(B, C)`` for several columns, each
            with its own K.
        conditioning
            In place of labels their conditioning vectors ``(B, d)``, see :meth:`embed`.

        Returns
        -------
        ``(B, C, G)``, or ``(B, n_outputs C, G)``.

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
        if conditioning is not None and conditioning.shape != (len(t), self.hidden_size):
            expected = len(t), self.hidden_size
            raise ValueError(f"conditioning is {tuple(conditioning.shape)}, one vector per sample is {expected}")
        with span("denoiser"):
            return self._denoise(x, t, y, conditioning)

    def embed(self, y: Tensor | None, log_library: Tensor | None = None) -> Tensor:
        """Return the conditioning vectors ``(B, d)`` of labels.

        What lies between two sets of labels is conditioned on a mixture of their vectors.

        Parameters
        ----------
        y
            Labels as in :meth:`forward`.
        log_library
            Not used: library sizes are no condition here.

        Raises
        ------
        ValueError
            If there are no labels, or they do not fit the model.
        """
        if y is None:
            raise ValueError("there are no labels to embed")
        self._check_labels(y, len(y))
        return self.y_embedder(y, len(y))

    @property
    def network(self) -> Denoiser:
        """The network itself: this."""
        return self

    def start(self, noise: Tensor) -> Tensor:
        """Return what sampling starts from, given Gaussian noise ``(B, C, G)``: the noise."""
        return noise

    def fix_library(self, call: Any, log_library: Tensor) -> Any:
        """Return what samplers call for cells of given library sizes: `call`, this model or its CUDA graph."""
        return call

    def finish(self, x: Tensor, model: Any, uniform: Callable[[], Tensor], library: Tensor) -> Tensor:
        """Return cells ``(B, G)`` where sampling has ended at ``x`` ``(B, 1, G)``."""
        return x[:, 0]

    def _check_labels(self, y: Tensor, batch: int) -> None:
        columns = len(self.label_sizes)
        if columns == 0:
            raise ValueError("this model was made without labels (label_sizes=())")
        if y.shape != (batch, columns) and (columns > 1 or y.shape != (batch,)):
            expected = f"({batch},)" if columns == 1 else f"({batch}, {columns})"
            raise ValueError(f"y is {tuple(y.shape)}, one label a sample is {expected}")

    def _denoise(self, x: Tensor, t: Tensor, y: Tensor | None, conditioning: Tensor | None) -> Tensor:
        with span("conditioning"):
            modulations = self.modulations(t, y, conditioning)
        with span("embedding"):
            tokens = self.embed_cells(x)
        z = self.run_blocks(tokens, modulations)
        with span("read-out"):
            if not self.has_cell_token:
                return self.unpatchify(self.final_layer(z))
            out = self.unpatchify(self.final_layer(z[:, :-1]))
            return out + self.cell_token.read(z[:, -1]).view(len(x), self.out_channels, -1)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Turn the patches' answers ``(B, N, P C)``, C the output channels, into ``(B, C, G)``."""
        x = x.unflatten(-1, (self.patch_size, self.out_channels)).permute(0, 3, 1, 2).flatten(2)
        return x[..., : self.input_size]

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw all weights anew, as when the model was made: adaLN-Zero, so that it answers zero."""
        for module in self.modules():
            if module is not self and hasattr(module, "initialize_weights"):
                cast(Any, module).initialize_weights()

    def embed_cells(self, x: Tensor) -> Tensor:
        """Turn noised cells ``(B, C, G)`` into the tokens ``(B, N, d)`` that the blocks take."""
        tokens = self.x_embedder(x)
        if self.has_cell_token:
            tokens = torch.cat([tokens, self.cell_token.embed(x).to(tokens.dtype)], dim=1)
        dtype = self.stream_dtype(tokens)
        return tokens.to(dtype, memory_format=torch.contiguous_format).contiguous() + self.pos_embed.to(dtype)

    def stream_dtype(self, tokens: Tensor) -> torch.dtype:
        """Return the type that the residual stream is summed in: fp32 at least, whatever the products' type."""
        return torch.promote_types(tokens.dtype, torch.float32)

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


def _check_sizes(
    input_size: int,
    patch_size: int,
    in_channels: int,
    hidden_size: int,
    depth: int,
    num_heads: int,
    n_outputs: int,
    prediction: str,
    label_sizes: Sequence[int],
) -> None:
    if min(input_size, patch_size, in_channels, depth, num_heads, n_outputs) < 1:
        raise ValueError("input_size, patch_size, in_channels, depth, num_heads and n_outputs must be at least 1")
    if hidden_size % 4 or hidden_size < max(4, num_heads):
        raise ValueError(f"hidden_size must be a multiple of 4 and at least num_heads, not {hidden_size}")
    if prediction not in ("epsilon", "v", "x0"):
        raise ValueError(f"prediction must be 'epsilon', 'v' or 'x0', not {prediction!r}")
    if any(labels < 1 for labels in label_sizes):
        raise ValueError(f"each column of labels must have at least one, not {tuple(label_sizes)}")
