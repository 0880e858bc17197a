"""No row without its check: how far a result may be from the same formula in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

# of the relative error, by what is compared; a path is many calls one after another
TOLERANCE = {
    "fp32": {"forward": 1e-5, "gradient": 1e-4, "path": 1e-4},
    "bf16": {"forward": 2e-2, "gradient": 5e-2, "path": 5e-2},
}


def relative_error(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the norm of the difference over the norm of what is expected, all tensors together."""
    pairs = [(v.detach().double(), e.detach().double()) for v, e in zip(values, expected, strict=True)]
    if any(v.shape != e.shape for v, e in pairs):
        return math.inf
    wrong = math.sqrt(sum(float((v - e).square().sum()) for v, e in pairs))
    return wrong / max(math.sqrt(sum(float(e.square().sum()) for _, e in pairs)), 1e-300)


def gradient_error(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the relative error of all gradients together, or a tenth of the worst one's if that is more.

    So none can hide; but a token at the threshold's kink, where the last bit decides, may move a small one.
    """
    worst = [relative_error([v], [e]) for v, e in zip(values, expected, strict=True)]
    errors = [relative_error(values, expected), *(error / 10 for error in worst)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)
