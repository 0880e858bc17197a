"""Correctness check of every row: errors relative to the same formula in fp64, and their tolerances."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

# largest allowed relative error, by precision and by what is compared; a path is a sequence of many calls
TOLERANCE = {
    "fp32": {"forward": 1e-5, "gradient": 1e-4, "path": 1e-4},
    "bf16": {"forward": 2e-2, "gradient": 5e-2, "path": 5e-2},
}


def relative_error(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the norm of the difference over the norm of the expected values, all tensors together."""
    pairs = [(v.detach().double(), e.detach().double()) for v, e in zip(values, expected, strict=True)]
    if any(v.shape != e.shape for v, e in pairs):
        return math.inf
    wrong = math.sqrt(sum(float((v - e).square().sum()) for v, e in pairs))
    return wrong / max(math.sqrt(sum(float(e.square().sum()) for _, e in pairs)), 1e-300)


def gradient_error(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the relative error of all gradients together, or a tenth of the largest single one if that is more.

    The second term detects a single wrong gradient. It is divided by ten because a token at the threshold, where the
    last bit decides, may change a small gradient.
    """
    worst = [relative_error([v], [e]) for v, e in zip(values, expected, strict=True)]
    errors = [relative_error(values, expected), *(error / 10 for error in worst)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)
