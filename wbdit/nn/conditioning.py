"""Shifts, scales and gates per timestep and label, computed once for samples that share them, and cached."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from wbdit.nn.blocks import FinalLayer, Modulation
from wbdit.nn.embeddings import LabelEmbedder, TimestepEmbedder
from wbdit.nn.weight_cache import RemembersWeights, may_cache


class Conditioned(RemembersWeights):
    """A denoiser's conditioning on timesteps and labels.

    Attributes
    ----------
    hidden_size
        Width d of a token.
    label_sizes
        Number of labels K_c of each column; empty for an unconditional model.
    """

    hidden_size: int
    label_sizes: tuple[int, ...]
    t_embedder: TimestepEmbedder
    y_embedder: LabelEmbedder
    blocks: nn.ModuleList
    final_layer: FinalLayer

    def modulations(
        self, t: Tensor, y: Tensor | None = None, conditioning: Tensor | None = None
    ) -> list[Sequence[Tensor]]:
        """Return the shifts, scales and gates of every block and the shift and scale of the final layer.

        Parameters
        ----------
        t, y, conditioning
            As in :meth:`forward`.

        Returns
        -------
        Six tensors ``(B, d)`` per block, then two for the final layer.

        Notes
        -----
        On a CPU, in evaluation mode without gradients, each pair of timestep and labels is computed once and cached:
        while sampling, all cells of a type share it. Results from conditioning vectors are not cached, because every
        sample may have its own vector.
        """
        tables: Sequence[Tensor]
        if conditioning is not None:
            tables = self._condition(t, None, conditioning)
        elif not self.training and len(t) > 0 and may_cache(t, *self._conditioning_weights()):
            tables = self._remembered(t, y)
        elif not torch.is_grad_enabled() and len(t) > 1 and t.stride(0) == 0:
            tables = self._of_one_timestep(t, y)
        else:
            tables = self._condition(t, y)
        return [table.chunk(part.parts, dim=1) for table, part in zip(tables, self._modulated(), strict=True)]

    def _condition(self, t: Tensor, y: Tensor | None, conditioning: Tensor | None = None) -> list[Tensor]:
        """Compute the modulations per sample: ``(B, 6 d)`` for each block, then ``(B, 2 d)``."""
        # on a CPU, casting the weights to a lower precision takes longer than multiplying a few rows by them
        with torch.autocast(t.device.type, enabled=t.is_cuda and torch.is_autocast_enabled("cuda")):
            c = self.t_embedder(t)
            if conditioning is not None:
                c = c + conditioning
            elif self.label_sizes:
                c = c + self.y_embedder(y, t.shape[0])
            return [modulation(c) for modulation in self._modulated()]

    def _of_one_timestep(self, t: Tensor, y: Tensor | None) -> list[Tensor]:
        """Compute the modulations of one timestep shared by all samples: one row per label combination, then a gather.

        There is no host sync, so CUDA graphs can capture it. With more combinations than samples, compute one row per
        sample instead.
        """
        if y is None:
            return [table.expand(len(t), -1) for table in self._condition(t[:1], None)]
        if math.prod(k + 1 for k in self.label_sizes) > len(t):
            return self._condition(t, y)
        labels = torch.cartesian_prod(*(torch.arange(k + 1, device=t.device) for k in self.label_sizes))
        row = torch.zeros_like(t, dtype=torch.long)
        for k, column in zip(self.label_sizes, y.reshape(len(t), -1).unbind(1), strict=True):
            row = row * (k + 1) + column
        return [table[row] for table in self._condition(t[:1].expand(len(labels)), labels)]

    def _remembered(self, t: Tensor, y: Tensor | None) -> Sequence[Tensor]:
        """Return the modulations from the cache, computing only new pairs of timestep and labels."""
        labels = [()] * len(t) if y is None else map(tuple, y.reshape(len(t), len(self.label_sizes)).tolist())
        pairs = list(zip(t.tolist(), labels, strict=True))
        rows = self._cache.values(self._conditioning_weights())
        fresh = {pair: i for i, pair in reversed(list(enumerate(pairs))) if pair not in rows}  # first index of each
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
