"""Classifier-free guidance with one weight, or with one weight per column of labels and per covariate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from wbdit.samplers.loop import FusedSteps
from wbdit.schedule import Prediction


class GuidedModel:
    """A conditional model at fixed labels, with classifier-free guidance.

    With one weight w for all labels, the output is ``null + w (joint - null)`` (Ho and Salimans 2022). Here `joint` is
    the model's output given every label, and `null` its output given none. With one weight per column of labels, and
    f(S) the output given only the columns S, the output is::

        f() + w_1 (f(1) - f()) + w_2 (f(1, 2) - f(1)) + ... + w_C (f(1 ... C) - f(1 ... C-1))

    with the columns in increasing order of ``|w - 1|``. This is the score of
    ``p(x) p(y_1 | x)^w_1 p(y_2 | x, y_1)^w_2 ...``: composed guidance (Liu et al. 2022) as a chain, which
    Brooks et al. (2023, InstructPix2Pix, equation 3) use for two conditions. Its properties:

    - Weights of 1 give the model itself, at the cost of one call.
    - A weight w on one column and 1 on the others gives ``joint + (w - 1) (joint - joint without that column)``.
    - A weight of 0 leaves the column unconditioned.
    - Columns with equal weights are guided jointly.

    Liu et al. and CFGen (Palma et al. 2024) use ``null + sum of w_c (f(c) - null)`` instead. That form assumes labels
    that are independent given the cell, and does not give the model at weights of 1.

    All terms with a nonzero factor are computed as one batch.

    Parameters
    ----------
    model
        A :class:`wbdit.nn.denoiser.Denoiser` with labels.
    y
        Labels ``(B,)`` or ``(B, C)`` int64.
    weight
        Guidance weight, or one weight per column of labels, followed by one per covariate.
    toward
        Labels of `y`'s shape to interpolate toward: the model is conditioned on
        ``(1 - mix) embedding(y) + mix embedding(toward)``. If `mix` is 0 or 1, it is given the labels `y` or `toward`.
    mix
        Interpolation weight, 0 to 1.
    covariates
        Scaled covariates ``(B, K)``, guided like further columns; `y` may then have no columns, ``(B, 0)``.

    Raises
    ------
    ValueError
        If the number of weights differs from the number of columns and covariates.

    Examples
    --------
    >>> model = wbdit.WBDiT(input_size=50, hidden_size=32, num_heads=4, label_sizes=[3]).eval()
    >>> guided = wbdit.samplers.GuidedModel(model, torch.tensor([0, 2]), weight=2.0)
    >>> schedule = wbdit.NoiseSchedule()
    >>> path = wbdit.samplers.timesteps(schedule, 10)
    >>> wbdit.samplers.ddim(guided, torch.randn(2, 1, 50), schedule, path).shape
    torch.Size([2, 1, 50])
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        y: Tensor,
        weight: float | Sequence[float] = 1.0,
        *,
        toward: Tensor | None = None,
        mix: float = 0.0,
        covariates: Tensor | None = None,
    ) -> None:
        self.model = model
        self.prediction: Prediction = getattr(model, "prediction", "epsilon")
        of_labels = 1 if y.ndim == 1 else y.shape[1]
        columns = of_labels + (0 if covariates is None else covariates.shape[1])
        weights = [weight] * columns if isinstance(weight, float | int) else list(weight)
        if len(weights) != columns:
            raise ValueError(f"{len(weights)} guidance weights for {columns} columns of labels: give one per column")
        terms = _guidance_terms(weights)
        self._factors = [factor for factor, _ in terms]

        def given(labels: Tensor) -> Tensor:
            return torch.cat([_without(labels, dropped, model.label_sizes) for _, dropped in terms])  # type: ignore[attr-defined]

        def embedded(labels: Tensor) -> Tensor:
            kept = given(labels) if of_labels else None
            if covariates is None:
                return model.embed(kept).detach()  # type: ignore[attr-defined]
            left = torch.cat([_hidden(covariates, [i - of_labels for i in dropped]) for _, dropped in terms])
            return model.embed(kept, covariates=left).detach()  # type: ignore[attr-defined]

        self._given: dict[str, Tensor]  # labels or conditioning vectors of all terms, concatenated
        self._labels: Tensor | None = None  # labels of all terms, if they alone are given
        ends = [y] if toward is None or mix == 0 else [toward] if mix == 1 else [y, toward]
        if len(ends) == 2:
            own, other = map(embedded, ends)
            self._given = {"conditioning": torch.lerp(own, other, mix)}
        elif covariates is None:
            self._labels = given(*ends)
            once = getattr(model, "embeds_once", False)
            self._given = {"conditioning": embedded(*ends)} if once else {"y": self._labels}
        else:
            self._given = {"conditioning": embedded(*ends)}

    @property
    def conditioning(self) -> Tensor:
        """Conditioning of the model given every label, ``(B, ...)``."""
        ((_, every),) = self._given.items()
        batch = len(every) // len(self._factors)
        return every[:batch] if self._labels is None else self.model.embed(self._labels[:batch])  # type: ignore[attr-defined]

    def fuse_steps(self, x: Tensor, times: Tensor) -> FusedSteps | None:
        """Prepare the calls of a sampler as the model itself does, if there is only one term; else return None."""
        prepare = getattr(self.model, "fuse_steps", None)
        return None if prepare is None or len(self._factors) > 1 else prepare(x, times, **self._given)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the guided output for noised cells ``(B, C, G)`` at timesteps ``(B,)``."""
        n = len(self._factors)
        if n == 1:
            return self.model(x, t, **self._given)
        times = t[:1].expand(n * len(t)) if t.stride(0) == 0 else t.repeat(n)
        most, *others, least = self.model(torch.cat([x] * n), times, **self._given).chunk(n)
        out = torch.lerp(least, most, self._factors[0])  # the factors sum to 1
        for factor, answer in zip(self._factors[1:-1], others, strict=True):
            out = out.add(answer - least, alpha=factor)
        return out


def _guidance_terms(weights: Sequence[float]) -> list[tuple[float, list[int]]]:
    """Return each nonzero term of :class:`GuidedModel` as its factor and its dropped columns, fewest first."""
    order = sorted(range(len(weights)), key=lambda column: abs(weights[column] - 1))
    chain = pairwise([1.0, *(weights[column] for column in order), 0.0])
    terms = [(inner - outer, order[given:]) for given, (inner, outer) in enumerate(chain)]
    return [(factor, dropped) for factor, dropped in reversed(terms) if factor != 0]


def _without(y: Tensor, columns: Sequence[int], label_sizes: Sequence[int]) -> Tensor:
    """Return the labels with some columns replaced by the null label."""
    kept = y.reshape(len(y), len(label_sizes)).clone()
    for column in columns:
        if column < len(label_sizes):
            kept[:, column] = label_sizes[column]
    return kept.view_as(y)


def _hidden(covariates: Tensor, columns: Sequence[int]) -> Tensor:
    """Return the covariates with some columns replaced by NaN, "not given"; negative columns are labels, not these."""
    kept = covariates.clone()
    kept[:, [column for column in columns if column >= 0]] = torch.nan
    return kept
