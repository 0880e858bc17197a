"""Shifts, scales and gates per timestep and label, computed once for samples that share them, and cached."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wbdit.nn.blocks import FinalLayer, Modulation
from wbdit.nn.crate import product_dtype
from wbdit.nn.embeddings import LabelEmbedder, TimestepEmbedder
from wbdit.nn.weight_cache import RemembersWeights, WeightCache, is_cheap_to_read, may_cache, may_pack

TABLE_BYTES = 2**28  # of the modulations of all timesteps of a sampler run; larger ones are computed step by step


class Conditioned(RemembersWeights):
    """A denoiser's conditioning on timesteps and labels.

    Attributes
    ----------
    hidden_size
        Width d of a token.
    label_sizes
        Number of labels K_c of each column; empty for an unconditional model.
    generation
        Number of times that the caches were cleared on request, as :meth:`eval` does.
    """

    hidden_size: int
    label_sizes: tuple[int, ...]
    t_embedder: TimestepEmbedder
    y_embedder: LabelEmbedder
    blocks: nn.ModuleList
    final_layer: FinalLayer

    def __init__(self) -> None:
        super().__init__()
        self._packed = WeightCache()  # tensors made from all weights, on a GPU too
        self.generation = 0

    def forget(self) -> None:
        """Clear both caches."""
        super().forget()
        self._packed.clear()
        self.generation += 1

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
        elif not self.training and is_cheap_to_read(t) and len(t) > 0 and may_cache(t, *self._conditioning_weights()):
            tables = self._remembered(t, y)
        elif not torch.is_grad_enabled() and len(t) > 1 and t.stride(0) == 0:
            tables = self._of_one_timestep(t, y)
        else:
            tables = self._condition(t, y)
        vectors, parts = self._vectors(tables), [part.parts for part in self._modulated()]
        return [vectors[end - n : end] for n, end in zip(parts, accumulate(parts), strict=True)]

    def tables(
        self, times: Tensor, batch: int, y: Tensor | None = None, conditioning: Tensor | None = None
    ) -> list[Tensor] | None:
        """Return the modulations of a batch at all timesteps of a sampler run; None if they exceed :data:`TABLE_BYTES`.

        Parameters
        ----------
        times
            Timesteps ``(T,)``.
        batch
            Number of samples B.
        y, conditioning
            As in :meth:`forward`.

        Returns
        -------
        Tensors ``(T, B, n)`` whose columns are those of :meth:`modulations`, side by side; ``(T, 1, n)`` if all samples
        share their modulations. :meth:`at_timestep` takes them apart.
        """
        rows = 1 if y is None and conditioning is None else batch
        numbers = len(times) * rows * self.hidden_size * sum(part.parts for part in self._modulated())
        if numbers * product_dtype(next(self.t_embedder.parameters())).itemsize > TABLE_BYTES:
            return None
        with self._autocast(times):
            c = self.t_embedder(times)[:, None]
            if conditioning is not None:
                c = c + conditioning
            elif self.label_sizes:
                c = c + self.y_embedder(y, rows)
            return [table.unflatten(0, (-1, rows)) for table in self._modulate(c.flatten(0, 1))]

    def at_timestep(self, tables: Sequence[Tensor], step: int, batch: int) -> list[Tensor]:
        """Return the modulations ``(B, d)`` of one timestep of :meth:`tables` in one list, as views."""
        return self._vectors([table[step].expand(batch, -1) for table in tables])

    def _vectors(self, tables: Sequence[Tensor]) -> list[Tensor]:
        return [vector for table in tables for vector in table.split(self.hidden_size, dim=1)]

    def _condition(self, t: Tensor, y: Tensor | None, conditioning: Tensor | None = None) -> list[Tensor]:
        """Compute the modulations per sample: ``(B, 6 d)`` for each block, then ``(B, 2 d)``; or all side by side."""
        with self._autocast(t):
            c = self.t_embedder(t)
            if conditioning is not None:
                c = c + conditioning
            elif self.label_sizes:
                c = c + self.y_embedder(y, t.shape[0])
            return self._modulate(c)

    def _autocast(self, t: Tensor) -> torch.autocast:
        # on a CPU, casting the weights to a lower precision takes longer than multiplying a few rows by them
        return torch.autocast(t.device.type, enabled=t.is_cuda and torch.is_autocast_enabled("cuda"))

    def _modulate(self, c: Tensor) -> list[Tensor]:
        """Map vectors ``(B, d)`` to the modulations of all blocks: on a GPU without gradients by one product."""
        if is_cheap_to_read(c) or not may_pack(self.parameters()):
            return [modulation(c) for modulation in self._modulated()]
        low = product_dtype(c)

        def stack() -> tuple[Tensor, Tensor]:
            maps = [cast(nn.Linear, modulation[1]) for modulation in self._modulated()]
            return torch.cat([own.weight for own in maps]).to(low), torch.cat([own.bias for own in maps]).to(low)

        weight, bias = self._packed.get(("modulation", low), self.parameters(), stack)
        return [F.linear(F.silu(c).to(low), weight, bias)]

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
