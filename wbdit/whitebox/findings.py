"""What a readout answers, in words: each claim of the theory, whether it holds here, and by which figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from wbdit.whitebox.explain import Explanation
from wbdit.whitebox.gene_loadings import PERMUTATIONS, Hit

SIGNIFICANT = 0.01  # of a permutation test
Verdict = Literal["yes", "in part", "no"]


class Finding(NamedTuple):
    """A question, whether the answer is yes, and the figures it rests on."""

    question: str
    verdict: Verdict
    answer: str


def findings(explanation: Explanation) -> list[Finding]:
    """Return the answers that a readout gives."""
    found = [
        _compresses(explanation),
        _falls_through(explanation),
        _sparsifies(explanation),
        _sparser_through(explanation),
        _by_threshold(explanation),
        _step_is_short(explanation),
    ]
    return [*found, _names_types(explanation)] if explanation.hits else found


def named_types(hits: dict[str, list[Hit]]) -> list[str]:
    """Return the types that have a head or an atom with more of their markers than chance gives."""
    return sorted({hit.type for kind in hits.values() for hit in kind if hit.p < SIGNIFICANT})


def _compresses(e: Explanation) -> Finding:
    before, after = e.means["rate_before"], e.means["rate_after"]
    return Finding(
        "Does attention compress, in each block?",
        _verdict(after < before),
        f"{_where(after < before)} the coding rate of the tokens falls in the block's own subspaces. It changes by "
        f"{_range(after / before - 1)}, and falls in at least {_percent(e.lowered['rate'].min())} of the cells.",
    )


def _falls_through(e: Explanation) -> Finding:
    figures = f"In nats, after each block's attention, of {e.largest_rate:.0f} at most"
    return _through("Does the coding rate fall through the blocks?", e.means["rate_after"], e, "It", figures, ".0f")


def _sparsifies(e: Explanation) -> Finding:
    m = e.means
    before, after = e.objective
    rebuilt = m["fit_after"] < m["fit_empty"]
    errors = f"half its squared error is {m['fit_after'].mean():.0f}, that of nothing {m['fit_empty'].mean():.0f}"
    return Finding(
        "Does shrinkage lower its objective, the lasso's?",
        _verdict(after < before),
        f"{_where(after < before)} it falls; it changes by {_range(after / before - 1)}. What the dictionary makes of "
        f"the code is closer to the tokens than nothing is {'everywhere' if rebuilt.all() else _count(rebuilt)}: "
        f"{errors}.",
    )


def _sparser_through(e: Explanation) -> Finding:
    what = "The share of non-zeros"
    return _through("Does sparsity rise through the blocks?", e.means["non_zero"], e, what, "Through the blocks", ".2f")


def _through(question: str, values: np.ndarray, e: Explanation, what: str, figures: str, form: str) -> Finding:
    """Say at which noise levels values ``(T, L)`` fall from each block to the next."""
    if values.shape[1] == 1:
        return Finding(question, "no", "There is one block.")
    falls = np.all(np.diff(values, axis=1) < 0, axis=1)
    return Finding(
        question,
        _verdict(falls),
        f"{what} falls from each block to the next {_levels(falls, e.timesteps)}. {figures}: "
        f"{_ends(values, e.timesteps, form)}.",
    )


def _by_threshold(e: Explanation) -> Finding:
    margin, first = e.means["margin"], e.weights[0]
    far = margin.min() >= 5
    reason = " Zeros are coefficients that may not be negative; shrinkage makes hardly any." if far else ""
    return Finding(
        "Is it the threshold that makes the zeros?",
        "no" if far else "yes" if margin.max() < 2 else "in part",
        f"The median coefficient lies {margin.min():.1f} to {margin.max():.1f} thresholds from where it turns zero (a "
        f"threshold is eta lambda, {first.eta * first.lam:.3g} in the first block).{reason}",
    )


def _step_is_short(e: Explanation) -> Finding:
    steps = np.array([w.step for w in e.weights])
    return Finding(
        "Is the step shorter than the bound?",
        _verdict(steps < 1),
        f"eta |D|² is {', '.join(f'{step:.2f}' for step in steps)} through the blocks: below 1 a step cannot raise its "
        "objective, below 2 steps of that length still converge.",
    )


def _names_types(e: Explanation) -> Finding:
    types = [hit.type for hit in e.hits["head"]]
    after, before = named_types(e.hits), named_types(e.untrained)
    heads = [len(named_types({"head": hits["head"]})) for hits in (e.hits, e.untrained)]
    names = f": {', '.join(after)}" if after else ""
    return Finding(
        "Do heads and atoms speak for cell types?",
        "yes" if 2 * len(after) >= len(types) else "in part" if after else "no",
        f"{len(after)} of {len(types)} types have a head or an atom whose genes are their markers, at p < "
        f"{SIGNIFICANT:g} of {PERMUTATIONS} permutations{names}. By heads alone it is {heads[0]}. Before training it "
        f"is {len(before)}, by heads alone {heads[1]}: that much it was begun with and did not learn.",
    )


def _verdict(holds: np.ndarray) -> Verdict:
    return "yes" if holds.all() else "in part" if holds.any() else "no"


def _where(holds: np.ndarray) -> str:
    """Say where something holds, at the start of a sentence."""
    return "At every level of noise and in every block" if holds.all() else _count(holds).capitalize()


def _count(holds: np.ndarray) -> str:
    return f"at {int(holds.sum())} of {holds.size} pairs of noise level and block"


def _range(changes: np.ndarray) -> str:
    low, high = changes.min(), changes.max()
    return f"{_signed(low)} to {_signed(high)}"


def _ends(values: np.ndarray, timesteps: Sequence[int], form: str) -> str:
    """Write the values through the blocks at the cleanest and at the noisiest level."""
    rows = ((values[i], timesteps[i]) for i in (-1, 0))
    return ", and ".join(f"{', '.join(f'{value:{form}}' for value in row)} at t = {t}" for row, t in rows)


def _levels(holds: np.ndarray, timesteps: Sequence[int]) -> str:
    """Say at which noise levels something holds."""
    if holds.all():
        return "at every level of noise"
    if not holds.any():
        return "at no level of noise"
    return "at t = " + ", ".join(str(t) for t, one in zip(timesteps, holds, strict=True) if one) + " alone"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _signed(share: float) -> str:
    return f"{100 * share:+.0f} %".replace("-", "\N{MINUS SIGN}")
