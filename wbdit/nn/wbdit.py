"""The White-Box Diffusion Transformer (Cui, Dong and Liu, arXiv 2411.06785)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from wbdit import ops
from wbdit.nn.blocks import ModulatedBlock, Modulation, gated_adaln
from wbdit.nn.crate import ISTA, MSSA, LinearMap, product_dtype
from wbdit.nn.denoiser import Denoiser
from wbdit.nn.embeddings import per_patch
from wbdit.nn.fused_steps import DenoiserSteps
from wbdit.nn.weight_cache import may_pack
from wbdit.profiling import span
from wbdit.schedule import Prediction


class WhiteBoxBlock(ModulatedBlock):
    """A white-box block: compress (MSSA), then sparsify (ISTA).

    Parameters
    ----------
    hidden_size, num_heads
        Width d of a token and number of subspaces h.
    tie_out
        As in :class:`WBDiT`.
    """

    attn: MSSA
    mlp: ISTA

    def __init__(self, hidden_size: int, num_heads: int, *, tie_out: bool = False) -> None:
        super().__init__(hidden_size, MSSA(hidden_size, num_heads, tie_out), ISTA(hidden_size))

    @property
    def fits_denoise(self) -> bool:
        """Whether :func:`wbdit.ops.denoise` supports this block: it needs several subspaces."""
        return self.attn.num_heads > 1

    def first_step(self, x: Tensor, z: Tensor, gate: Tensor, following: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Apply the MSSA half-step; its output bias is fused into the residual update and adaLN."""
        with span("mssa"):
            out = self.attn.out
            if out is None or out.bias is None:
                return super().first_step(x, z, gate, following)
            subspaces = ops.mssa(self.attn.qkv(z), self.attn.num_heads)
            return gated_adaln(x, F.linear(subspaces, out.weight), gate, following, out.bias)

    def second_step(
        self, x: Tensor, z: Tensor, gate: Tensor, following: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Apply the ISTA half-step; its threshold is fused into the residual update and adaLN."""
        with span("ista"):
            step = ops.ista_adaln if torch.is_grad_enabled() else ops.ista_adaln_
            return step(x, z, self.mlp.folded(), gate, *following, self.mlp.eta, self.mlp.lam)


# of which the blocks consist, if nobody replaced a part: by an adapter, for example, or a parametrization
PARTS = (nn.ModuleList, WhiteBoxBlock, MSSA, ISTA, Modulation, nn.Sequential, nn.Linear, nn.Identity, nn.SiLU)


class WBDiT(Denoiser):
    """The White-Box Diffusion Transformer: every block compresses by MSSA and sparsifies by ISTA.

    It takes the published arguments and state dicts. Extensions beyond the paper are keyword-only and off by default.
    See :class:`wbdit.nn.denoiser.Denoiser` for the shapes of a call, the errors, and all arguments except `tie_out`.

    Parameters
    ----------
    tie_out
        Map back from the subspaces by U^T, the transpose of the projection, without weights of its own: MSSA as it is
        derived (Yu et al. 2023, CRATE).

    Examples
    --------
    >>> model = wbdit.WBDiT(input_size=2000, hidden_size=64, depth=3, label_sizes=[3])
    >>> x, t = torch.randn(4, 1, 2000), torch.randint(1, 1000, (4,))
    >>> model(x, t, torch.tensor([0, 1, 2, 3])).shape  # label 3 stands for "no label"
    torch.Size([4, 1, 2000])
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
        num_classes: int = 1000,
        learn_sigma: bool = False,
        *,
        label_sizes: Sequence[int] = (),
        n_outputs: int = 1,
        prediction: Prediction = "epsilon",
        shared_patches: bool = True,
        cell_token: bool = False,
        n_covariates: int = 0,
        tie_out: bool = False,
    ) -> None:
        super().__init__(
            *(input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio, class_dropout_prob),
            num_classes,
            learn_sigma,
            label_sizes=label_sizes,
            n_outputs=n_outputs,
            prediction=prediction,
            shared_patches=shared_patches,
            cell_token=cell_token,
            n_covariates=n_covariates,
            tie_out=tie_out,
        )

    def make_block(self, mlp_ratio: float, **options: Any) -> WhiteBoxBlock:
        """Return a white-box block."""
        return WhiteBoxBlock(self.hidden_size, self.num_heads, **options)

    def fuse_steps(
        self, x: Tensor, times: Tensor, y: Tensor | None = None, *, conditioning: Tensor | None = None
    ) -> DenoiserSteps | None:
        """Prepare the calls of a sampler: where one op runs the model, another one also applies the sampler's update.

        The modulations of all timesteps are computed here, if they fit into memory.

        Parameters
        ----------
        x
            State ``(B, C, G)``, of which only shape, dtype and device are used.
        times
            Timesteps of the calls ``(T,)``, as :meth:`forward` takes them, on a CPU.
        y, conditioning
            As in :meth:`forward`.

        Returns
        -------
        The prepared calls; None where one op cannot run the model.
        """
        if not self._is_one_op(x) or self.training or self._forward_hooks or self._forward_pre_hooks:
            return None
        batch, times = len(x), times.to(x.device)
        self._check_inputs(x, times[:1].expand(batch), y, conditioning)
        with span("conditioning"):
            tables = self.tables(times, batch, y, conditioning)
        if tables is None:
            given = [t for t in (y, conditioning) if t is not None]
            return DenoiserSteps(
                lambda i: _flat(self.modulations(times[i : i + 1].expand(batch), y, conditioning)),
                self._network(),
                [times, *given],
            )
        return DenoiserSteps(lambda i: self.at_timestep(tables, i, batch), self._network(), tables)

    def _denoise(self, x: Tensor, t: Tensor, y: Tensor | None, conditioning: Tensor | None) -> Tensor:
        if not self._is_one_op(x):
            return super()._denoise(x, t, y, conditioning)
        with span("conditioning"):
            modulations = self.modulations(t, y, conditioning)
        with span("denoise"):
            return ops.denoise(x, _flat(modulations), *self._network())

    def _network(self) -> tuple[Any, ...]:
        """Return the arguments of :func:`wbdit.ops.denoise` after the modulations; kept until a weight changes."""
        low = product_dtype(self.pos_embed)
        if not may_pack(self.parameters()):
            return self._pack(low)
        return self._packed.get(("network", low), self.parameters(), lambda: self._pack(low))

    def _pack(self, low: torch.dtype) -> tuple[Any, ...]:
        """Fold the dictionaries, and cast the matrices to the dtype of the products."""
        blocks = cast(list[WhiteBoxBlock], list(self.blocks))
        outs = [cast(LinearMap, block.attn.out) for block in blocks]
        no_bias = self.pos_embed.new_zeros(self.hidden_size)
        embedding, readout = [*per_patch(self.x_embedder.proj), self.pos_embed[0]], per_patch(self.final_layer.linear)
        if self.has_cell_token:
            embedding += [self.cell_token.proj.weight, self.cell_token.proj.bias]
            readout += [self.cell_token.linear.weight, self.cell_token.linear.bias]
        for maps, matrices in ((embedding, (0, 3)), (readout, (0, 2))):
            maps[:] = [t.to(low) if i in matrices else t for i, t in enumerate(maps)]
        return (
            embedding,
            [block.attn.qkv.weight.to(low) for block in blocks],
            [out.weight.to(low).contiguous() for out in outs],
            [no_bias if out.bias is None else out.bias for out in outs],
            [block.mlp.folded() for block in blocks],
            readout,
            self.num_heads,
            blocks[0].mlp.eta,
            blocks[0].mlp.lam,
        )

    def run_blocks(self, x: Tensor, modulations: Sequence[Sequence[Tensor]]) -> Tensor:
        """Apply all blocks, on a CPU as one op if possible; see :meth:`Denoiser.run_blocks`."""
        if not self._is_one_op_on_cpu(x):
            return super().run_blocks(x, modulations)
        with span("run_blocks"):
            blocks = cast(list[WhiteBoxBlock], list(self.blocks))
            steps = [block.mlp for block in blocks]
            outs = [cast(LinearMap, block.attn.out) for block in blocks]
            no_bias = x.new_zeros(self.hidden_size)
            parts, projections = _flat(modulations), [block.attn.qkv.weight for block in blocks]
            matrices, biases = [out.weight for out in outs], [no_bias if out.bias is None else out.bias for out in outs]
            scalars = self.num_heads, steps[0].eta, steps[0].lam
            if torch.is_grad_enabled():
                given = projections, matrices, biases, [step.weight for step in steps]
                return ops.training_blocks(x, parts, *given, *scalars, dtype=product_dtype(self.pos_embed))
            return ops.run_blocks(x, parts, projections, matrices, biases, [step.folded() for step in steps], *scalars)

    def _is_one_op_on_cpu(self, x: Tensor) -> bool:
        """Return whether one op runs all blocks on a CPU: with all gradients, or in fp32 without any."""
        if x.device.type != "cpu" or _is_recorded():
            return False
        if not torch.is_grad_enabled():
            wanted = product_dtype(self.pos_embed) == torch.float32
        else:  # op by op, frozen weights take no time for gradients
            wanted = all(weight.requires_grad for weight in self.blocks.parameters())
        plain = wanted and all(type(part) in PARTS and not _is_watched(part) for part in self.blocks.modules())
        return plain and all(block.fits_denoise for block in cast(list[WhiteBoxBlock], self.blocks))

    def _is_one_op(self, x: Tensor) -> bool:
        """Return whether one op can run the model: on a GPU in bf16, without gradients or hooks on its parts."""
        if torch.is_grad_enabled() or not x.is_cuda or product_dtype(self.pos_embed) != torch.bfloat16:
            return False
        parts = (module for module in self.modules() if module is not self)
        watched = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
        return not watched and all(block.fits_denoise for block in cast(list[WhiteBoxBlock], self.blocks))


def _is_recorded() -> bool:
    """Return whether the ops of a call are compiled, traced, counted or seen by hooks on all modules."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()
    return recorded or bool(_has_any_global_hook())


def _is_watched(part: nn.Module) -> bool:
    return any((part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks))


def _flat(modulations: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [part for modulation in modulations for part in modulation]
