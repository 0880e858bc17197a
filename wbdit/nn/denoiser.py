"""The base class of :class:`wbdit.WBDiT` and the black-box :class:`wbdit.DiT`: everything except their blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from wbdit import ops
from wbdit._draws import draw
from wbdit.nn.blocks import FinalLayer
from wbdit.nn.conditioning import Conditioned
from wbdit.nn.crate import product_dtype
from wbdit.nn.embeddings import (
    CellToken,
    CovariateEmbedder,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    sincos_positions,
)
from wbdit.nn.fused_steps import FusedSteps
from wbdit.profiling import span
from wbdit.schedule import Prediction


class Denoises(Protocol):
    """The interface of models for training and generation: a :class:`Denoiser`, with or without a count likelihood.

    Attributes
    ----------
    prediction
        Quantity that the output predicts.
    label_sizes
        Number of labels of each column.
    stop
        Timestep at which sampling ends.
    training
        Whether the model is in training mode, as in :class:`torch.nn.Module`.
    network
        The network itself, without a count likelihood.
    """

    prediction: Prediction
    label_sizes: tuple[int, ...]
    stop: int
    training: bool

    @property
    def first_timestep(self) -> int:
        """Timestep to which the first call leads in closed form; 0 if sampling starts from pure noise."""

    @property
    def network(self) -> Denoiser:
        """The network, without a count likelihood."""

    def __call__(self, x: Tensor, t: Tensor, **given: Any) -> Tensor:
        """Return the output for noised cells at timesteps, given labels or conditioning."""

    def embed(self, y: Tensor | None, log_library: Tensor | None, covariates: Tensor | None = None) -> Tensor:
        """Return the conditioning for labels, library sizes and covariates, one row per sample."""

    @property
    def fuse_steps(self) -> Callable[..., FusedSteps | None]:
        """Function of the initial state, the timesteps and labels or conditioning, see :meth:`WBDiT.fuse_steps`."""

    def parameters(self) -> Iterator[Tensor]:
        """Return the weights."""

    def buffers(self) -> Iterator[Tensor]:
        """Return the constants of the model."""

    def start(self, noise: Tensor) -> Tensor:
        """Return the initial state of sampling, given Gaussian noise."""

    def fix_library(self, call: Any, log_library: Tensor) -> Any:
        """Return the model for samplers at fixed library sizes, given as natural logarithms ``(B,)``."""

    def finish(self, x: Tensor, model: Any, uniform: Callable[[], Tensor], library: Tensor) -> Tensor:
        """Return cells ``(B, G)`` from the final state of sampling.

        Parameters
        ----------
        x
            Final state ``(B, 1, G)``.
        model
            The model that the sampler called.
        uniform
            Function that draws uniform numbers ``(B, G)``; called only if they are needed.
        library
            Library sizes ``(B,)``.
        """


class Denoiser(Conditioned, ABC):
    """The base class of :class:`wbdit.WBDiT` and :class:`wbdit.DiT`, which differ only in their blocks.

    Parameters
    ----------
    input_size
        Number of genes G, at least 1.
    patch_size
        Genes per token P. If P does not divide G, the last token is padded with zeros; the output still has G genes.
    in_channels
        Values per gene C.
    hidden_size
        Width d of a token; a multiple of 4.
    depth
        Number of blocks.
    num_heads
        Number of attention heads h, each of width d // h.
    mlp_ratio
        Width of a DiT block's perceptron, divided by d. White-box blocks have none and ignore it, as published.
    class_dropout_prob
        Share of labels replaced by the null label in training mode; see :class:`wbdit.nn.embeddings.LabelEmbedder`.
    num_classes
        Accepted and unused, as published.
    learn_sigma
        Output two channels per input channel, as in DiT.
    label_sizes
        Number of labels K_c of each column of labels; empty for an unconditional model.
    n_outputs
        Output channels per input channel; `learn_sigma` overrides it with 2.
    prediction
        Predicted quantity: the noise ("epsilon"), the velocity ("v", Salimans and Ho 2022) or the clean cell ("x0").
    shared_patches
        Share one input projection and one output map among all patches, as published. Otherwise each patch has its own.
    cell_token
        Append a token that is embedded from all genes at once and mapped back to all of them.
    n_covariates
        Number of continuous covariates K, which :meth:`embed` takes.
    **options
        Options of the model's own block type; see :meth:`make_block`.

    Raises
    ------
    ValueError
        If the sizes are inconsistent or the prediction is unknown.
    TypeError
        If the blocks do not take one of the options.
    """

    stop = first_timestep = 0

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
        n_covariates: int = 0,
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
        self.n_covariates = n_covariates
        if n_covariates:
            self.covariate_embedder = CovariateEmbedder(n_covariates, hidden_size, class_dropout_prob)
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
        """Return one block of this model's type; see :class:`wbdit.nn.blocks.ModulatedBlock`."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, conditioning: Tensor | None = None) -> Tensor:
        """Predict the quantity that :attr:`prediction` names.

        Parameters
        ----------
        x
            Noised cells ``(B, C, G)``, floating.
        t
            Timesteps ``(B,)``, integers or floats in [0, 1000).
        y
            Labels ``(B,)``, int64 in [0, K). K stands for "no label"; None means no label for all samples. With
            several columns of labels ``(B, C)``, each with its own K.
        conditioning
            Conditioning vectors ``(B, d)`` in place of labels; see :meth:`embed`.

        Returns
        -------
        ``(B, C, G)``, or ``(B, n_outputs C, G)``.

        Raises
        ------
        ValueError
            If the shapes do not fit the model, or if `y` is given to an unconditional model.
        """
        self._check_inputs(x, t, y, conditioning)
        with span("denoiser"):
            return self._denoise(x, t, y, conditioning)

    def fuse_steps(
        self, x: Tensor, times: Tensor, y: Tensor | None = None, *, conditioning: Tensor | None = None
    ) -> FusedSteps | None:
        """Return the calls of a sampler at the timesteps `times`, prepared for it; None: call the model step by step.

        See :meth:`wbdit.WBDiT.fuse_steps`.
        """
        return None

    def embed(self, y: Tensor | None, log_library: Tensor | None = None, covariates: Tensor | None = None) -> Tensor:
        """Return the conditioning vectors ``(B, d)`` of labels and covariates.

        A linear interpolation of two vectors conditions the model on a state between two sets of labels.

        Parameters
        ----------
        y
            Labels as in :meth:`forward`; with covariates, None means no label.
        log_library
            Unused: this model is not conditioned on library sizes.
        covariates
            Scaled covariates ``(B, K)`` fp32. NaN means "not given", as does None for all of them.

        Raises
        ------
        ValueError
            If neither is given, or they do not fit the model.
        """
        if y is None and covariates is None:
            raise ValueError("y is None: embed needs labels or covariates")
        if y is not None:
            self._check_labels(y, len(y))
        if covariates is not None and (covariates.ndim != 2 or covariates.shape[1] != self.n_covariates):
            raise ValueError(f"covariates have shape {tuple(covariates.shape)}; expected (B, {self.n_covariates})")
        if covariates is None:
            assert y is not None
            return self.y_embedder(y, len(y))
        batch = len(covariates)
        if self.training:
            y, covariates = self.drop_conditions(y, covariates)
        vector = self.covariate_embedder(covariates)
        if self.label_sizes:
            vector = vector + (self.y_embedder(None, batch) if y is None else self.y_embedder.embed(y))
        return vector

    def drop_conditions(self, y: Tensor | None, covariates: Tensor) -> tuple[Tensor | None, Tensor]:
        """Hide labels and covariates at random, as guidance needs in training: each one, and all of a sample."""
        y = None if y is None else self.y_embedder.drop(y)
        covariates = self.covariate_embedder.drop(covariates)
        if y is None:
            return None, covariates
        u = draw(len(covariates), lambda n: torch.rand(n, 1, device=covariates.device))
        together = u < self.covariate_embedder.dropout
        nulls = torch.tensor(self.label_sizes, device=y.device)
        hidden = torch.where(together, nulls, y.reshape(len(y), len(nulls))).view_as(y)
        return hidden, covariates.masked_fill(together, torch.nan)

    @property
    def network(self) -> Denoiser:
        """The model itself."""
        return self

    def start(self, noise: Tensor) -> Tensor:
        """Return the initial state of sampling, given Gaussian noise ``(B, C, G)``: the noise itself."""
        return noise

    def fix_library(self, call: Any, log_library: Tensor) -> Any:
        """Return the model for samplers: `call` (this model or its CUDA graph), which takes no library sizes."""
        return call

    def finish(self, x: Tensor, model: Any, uniform: Callable[[], Tensor], library: Tensor) -> Tensor:
        """Return cells ``(B, G)`` from the final state ``x`` ``(B, 1, G)`` of sampling."""
        return x[:, 0]

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor | None, conditioning: Tensor | None) -> None:
        if x.ndim != 3 or x.shape[1:] != (self.in_channels, self.input_size):
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, {self.in_channels}, {self.input_size})")
        if t.shape != (x.shape[0],):
            raise ValueError(f"t has shape {tuple(t.shape)}; expected one timestep per sample: ({x.shape[0]},)")
        if y is not None:
            self._check_labels(y, len(t))
        if conditioning is not None and conditioning.shape != (len(t), self.hidden_size):
            expected = len(t), self.hidden_size
            raise ValueError(f"conditioning has shape {tuple(conditioning.shape)}; expected {expected}")

    def _check_labels(self, y: Tensor, batch: int) -> None:
        columns = len(self.label_sizes)
        if columns == 0:
            raise ValueError("y was given to a model without labels (label_sizes=()): leave it out")
        if y.shape != (batch, columns) and (columns > 1 or y.shape != (batch,)):
            expected = f"({batch},)" if columns == 1 else f"({batch}, {columns})"
            raise ValueError(f"y has shape {tuple(y.shape)}; expected {expected}")

    def _denoise(self, x: Tensor, t: Tensor, y: Tensor | None, conditioning: Tensor | None) -> Tensor:
        with span("conditioning"):
            modulations = self.modulations(t, y, conditioning)
        with span("embedding"):
            tokens = self.embed_cells(x)
        z = self.run_blocks(tokens, modulations)
        with span("read-out"):
            return self.read_out(z)

    def read_out(self, z: Tensor) -> Tensor:
        """Map tokens ``(B, N, d)``, modulated by the final layer's shift and scale, to the output ``(B, C, G)``."""
        if not self.has_cell_token:
            return self.unpatchify(self.final_layer(z))
        out = self.unpatchify(self.final_layer(z[:, :-1]))
        return out + self.cell_token.read(z[:, -1]).view(len(z), self.out_channels, -1)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Turn the patches' outputs ``(B, N, P C)``, C the output channels, into ``(B, C, G)``."""
        x = x.unflatten(-1, (self.patch_size, self.out_channels)).permute(0, 3, 1, 2).flatten(2)
        return x[..., : self.input_size]

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Reinitialize all weights as the constructor does: with adaLN-Zero, the output is zero."""
        for module in self.modules():
            if module is not self and hasattr(module, "initialize_weights"):
                cast(Any, module).initialize_weights()

    def embed_cells(self, x: Tensor) -> Tensor:
        """Embed noised cells ``(B, C, G)`` as tokens ``(B, N, d)``, the input of the blocks."""
        tokens = self.x_embedder(x)
        if self.has_cell_token:
            tokens = torch.cat([tokens, self.cell_token.embed(x).to(tokens.dtype)], dim=1)
        dtype = torch.promote_types(tokens.dtype, torch.float32)  # the residual stream's, whatever the products'
        return tokens.to(dtype, memory_format=torch.contiguous_format).contiguous() + self.pos_embed.to(dtype)

    @property
    def has_cell_token(self) -> bool:
        """Whether the last token represents the whole cell."""
        return hasattr(self, "cell_token")

    def run_blocks(self, x: Tensor, modulations: Sequence[Sequence[Tensor]]) -> Tensor:
        """Apply all blocks to embedded tokens ``(B, N, d)`` and return the final layer's input ``(B, N, d)``.

        Parameters
        ----------
        x
            The tokens. Without gradients they may be overwritten.
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
        raise ValueError(f"each entry of label_sizes must be at least 1, not {tuple(label_sizes)}")
