"""Classifier-free guidance, by one weight or one for each column of labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from wbdit.schedule import Prediction


class GuidedModel:
    """A conditional model at fixed labels, with classifier-free guidance.

    With one weight w for all labels it answers ``null + w (joint - null)`` (Ho and Salimans 2022): `joint` is the model
    given every label, `null` given none. With a weight for each column of labels, and f(S) the model given the columns
    S alone::

        f() + w_1 (f(1) - f()) + w_2 (f(1, 2) - f(1)) + ... + w_C (f(1 ... C) - f(1 ... C-1))

    the columns in rising order of ``|w - 1|``. This is the score of ``p(x) p(y_1 | x)^w_1 p(y_2 | x, y_1)^w_2 ...``:
    composed guidance (Liu et al. 2022) in the chain that Brooks et al. (2023, InstructPix2Pix, equation 3) use for two
    conditions. ``null + sum of w_c (f(c) - null)``, as Liu et al. and CFGen (Palma et al. 2024) have it, takes labels
    to be independent given the cell, and at weights of 1 is not the model. Here weights of 1 are the model itself, at
    one call; a weight w on one column and 1 on the others is ``joint + (w - 1) (joint - joint without that column)``,
    and one of 0 leaves the column open; columns of one weight are guided as one. The terms whose factor is not zero
    are computed as one batch.

    Parameters
    ----------
    model
        A :class:`wbdit.nn.denoiser.Denoiser` with labels.
    y
        Labels ``(B,)`` or ``(B, C)`` int64.
    weight
        Guidance weight, or one for each column.
    toward
        Labels of `y`'s shape that the cells lie toward: the model is conditioned on
        ``(1 - mix) embedding(y) + mix embedding(toward)``, and on `y` or `toward` themselves at the ends.
    mix
        How far, 0 to 1.

    Raises
    ------
    ValueError
        If there is not one weight for each column.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        y: Tensor,
        weight: float | Sequence[float] = 1.0,
        *,
        toward: Tensor | None = None,
        mix: float = 0.0,
    ) -> None:
        self.model = model
        self.prediction: Prediction = getattr(model, "prediction", "epsilon")
        columns = 1 if y.ndim == 1 else y.shape[1]
        weights = [weight] * columns if isinstance(weight, float | int) else list(weight)
        if len(weights) != columns:
            raise ValueError(f"{len(weights)} guidance weights for {columns} columns of labels")
        terms = _guidance_terms(weights)
        self._factors = [factor for factor, _ in terms]

        def given(labels: Tensor) -> Tensor:
            return torch.cat([_without(labels, dropped, model.label_sizes) for _, dropped in terms])  # type: ignore[attr-defined]

        self._given: dict[str, Tensor]  # labels or conditioning, of all terms
        if toward is None or mix == 0:
            self._given = {"y": given(y)}
        elif mix == 1:
            self._given = {"y": given(toward)}
        else:
            own, other = (model.embed(given(labels)).detach() for labels in (y, toward))  # type: ignore[attr-defined]
            self._given = {"conditioning": torch.lerp(own, other, mix)}

    @property
    def conditioning(self) -> Tensor:
        """What the model is conditioned on where it is given every label, ``(B, ...)``."""
        ((name, every),) = self._given.items()
        fullest = every[: len(every) // len(self._factors)]
        return fullest if name == "conditioning" else self.model.embed(fullest)  # type: ignore[attr-defined]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Answer for noised cells ``(B, C, G)`` at timesteps ``(B,)``."""
        n = len(self._factors)
        if n == 1:
            return self.model(x, t, **self._given)
        times = t[:1].expand(n * len(t)) if t.stride(0) == 0 else t.repeat(n)
        most, *others, least = self.model(torch.cat([x] * n), times, **self._given).chunk(n)
        out = torch.lerp(least, most, self._factors[0])  # the factors' sum is 1
        for factor, answer in zip(self._factors[1:-1], others, strict=True):
            out = out.add(answer - least, alpha=factor)
        return out


def _guidance_terms(weights: Sequence[float]) -> list[tuple[float, list[int]]]:
    """Return the factor of each term of :class:`GuidedModel` that has one, and the columns it drops, fewest first."""
    order = sorted(range(len(weights)), key=lambda column: abs(weights[column] - 1))
    chain = pairwise([1.0, *(weights[column] for column in order), 0.0])
    terms = [(inner - outer, order[given:]) for given, (inner, outer) in enumerate(chain)]
    return [(factor, dropped) for factor, dropped in reversed(terms) if factor != 0]


def _without(y: Tensor, columns: Sequence[int], label_sizes: Sequence[int]) -> Tensor:
    """Return labels with those of some columns replaced by null."""
    kept = y.reshape(len(y), len(label_sizes)).clone()
    for column in columns:
        kept[:, column] = label_sizes[column]
    return kept.view_as(y)
