"""The findings of a readout in words: for each claim of the theory, whether it holds in this run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from wbdit.whitebox.ablations import Ablations
from wbdit.whitebox.closed_form import ClosedFormShares
from wbdit.whitebox.explain import Explanation
from wbdit.whitebox.gene_loadings import PERMUTATIONS, Hit

SIGNIFICANT = 0.01  # significance level of the permutation tests
CLEAR = 2  # standard errors of a clear gain
Verdict = Literal["yes", "in part", "no"]


class Finding(NamedTuple):
    """A question, the verdict on it, and an answer with the numbers behind the verdict."""

    question: str
    verdict: Verdict
    answer: str


def findings(explanation: Explanation) -> list[Finding]:
    """Return the findings of a readout: on the blocks, on Gaussians of labels, on cell types and on causes."""
    found = [
        _compresses(explanation),
        _falls_through(explanation),
        _sparsifies(explanation),
        _sparser_through(explanation),
        _by_threshold(explanation),
        _step_is_short(explanation),
    ]
    if explanation.closed_form is not None:
        found.append(_beyond_gaussians(explanation.closed_form))
    if explanation.hits:
        found.append(_names_types(explanation))
    if explanation.ablations is not None:
        found.append(_causes(explanation.ablations))
    return found


def causes(ablations: Ablations) -> dict[str, int]:
    """Return the number of types whose markers change, or load, significantly, by what is removed or what loads."""
    return {kind: sum(match.p < SIGNIFICANT for match in found) for kind, found in ablations.matches.items()}


def _causes(ablations: Ablations) -> Finding:
    types, named = len(ablations.intact), causes(ablations)
    most = max(named["random"], named["PC"], named["NMF"])
    verdict: Verdict = "yes" if named["head"] > most else "in part" if named["head"] > named["random"] else "no"
    sizes, selective = (
        [f"{np.mean([getattr(one, field) for one in ablations.of(kind)]):{form}}" for kind in ("head", "random")]
        for field, form in (("size", ".1%"), ("selectivity", ".0%"))
    )
    return Finding(
        "Do heads do more than principal components?",
        verdict,
        f"Without a head, the genes that change most are markers of {named['head']} of {types} types "
        f"(p < {SIGNIFICANT}), without a random subspace of {named['random']}. The loadings of as many principal "
        f"components match {named['PC']}, those of non-negative factors {named['NMF']}. A head changes the cells by "
        f"{sizes[0]} of the types' distance, a random subspace by {sizes[1]}. The type that changes most has "
        f"{selective[0]} of a head's change, and {selective[1]} of a random subspace's "
        f"(p = {ablations.selective['head']:.3f}).",
    )


def named_types(hits: dict[str, list[Hit]]) -> list[str]:
    """Return the types with a significant match, a head or an atom, in alphabetical order.

    Examples
    --------
    >>> from wbdit.whitebox.findings import named_types
    >>> from wbdit.whitebox.gene_loadings import Hit
    >>> named_types({"head": [Hit("B", 0, 1, 31, 0.001, "B"), Hit("T", 4, 1, 6, 0.4, "T")]})
    ['B']
    """
    return sorted({hit.type for kind in hits.values() for hit in kind if hit.p < SIGNIFICANT})


def _compresses(e: Explanation) -> Finding:
    before, after = e.means["rate_before"], e.means["rate_after"]
    return Finding(
        "Does attention compress the tokens in each block?",
        _verdict(after < before),
        f"{_where(after < before)}, attention lowers the coding rate in the block's subspaces. The change is "
        f"{_range(after / before - 1)}. At each level and block, the rate falls in at least "
        f"{_percent(e.lowered['rate'].min())} of the cells.",
    )


def _falls_through(e: Explanation) -> Finding:
    what, figures = "The coding rate", f"After each block's attention, in nats (at most {e.largest_rate:.0f})"
    return _through("Does the coding rate fall from block to block?", e.means["rate_after"], e, what, figures, ".0f")


def _sparsifies(e: Explanation) -> Finding:
    m = e.means
    before, after = e.objective
    rebuilt = m["fit_after"] < m["fit_empty"]
    errors = f"{m['fit_after'].mean():.0f} for the code and {m['fit_empty'].mean():.0f} for zero"
    return Finding(
        "Does shrinkage lower the lasso objective?",
        _verdict(after < before),
        f"{_where(after < before)}, it does. The change is {_range(after / before - 1)}. The code reconstructs the "
        f"tokens better than a zero code does {'everywhere' if rebuilt.all() else _count(rebuilt)}. Half the squared "
        f"error per token is on average {errors}.",
    )


def _sparser_through(e: Explanation) -> Finding:
    what = "The fraction of nonzero coefficients"
    return _through("Does the code get sparser from block to block?", e.means["non_zero"], e, what, "By block", ".2f")


def _through(question: str, values: np.ndarray, e: Explanation, what: str, figures: str, form: str) -> Finding:
    """Return the finding on whether values ``(T, L)`` fall from each block to the next."""
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
    reason = " Zeros come from cutting off negative coefficients; the threshold adds hardly any." if far else ""
    return Finding(
        "Does the threshold make the zeros?",
        "no" if far else "yes" if margin.max() < 2 else "in part",
        f"The median coefficient is {margin.min():.1f} to {margin.max():.1f} thresholds away from becoming zero (the "
        f"threshold is eta × lambda = {first.eta * first.lam:.3g} in the first block).{reason}",
    )


def _step_is_short(e: Explanation) -> Finding:
    steps = np.array([w.step for w in e.weights])
    return Finding(
        "Is the step size below its bound?",
        _verdict(steps < 1),
        f"eta |D|² is {', '.join(f'{step:.2f}' for step in steps)}, by block. Below 1 a step cannot raise the "
        "objective; below 2 repeated steps still converge.",
    )


def _beyond_gaussians(shares: ClosedFormShares) -> Finding:
    sampled = np.array(shares.timesteps) <= shares.start
    timesteps = [t for t, one in zip(shares.timesteps, sampled, strict=True) if one]
    network, gaussian = shares.network[sampled, -1], shares.gaussian[sampled]
    ahead = (shares.gain > CLEAR * shares.error)[sampled]
    ends = [f"{_percent(network[i])} at t = {timesteps[i]} (the Gaussian {_percent(gaussian[i])})" for i in (0, -1)]
    of_update = shares.of_update[sampled, -1]
    genes = ", ".join(row["gene"] for row in shares.top_genes(5))
    most = f" At t = {timesteps[-1]} the network gains most on {genes}." if genes else ""
    return Finding(
        "Does the network do more than a Gaussian of each label?",
        _verdict(ahead),
        f"Sampling uses the network from t = {shares.start} down. There, its estimate is closer to these cells than "
        f"the Gaussian's {_levels(ahead, timesteps)} (by {CLEAR} standard errors). It explains {' and '.join(ends)} "
        f"of their squared distance from the label's mean. The Gaussian explains {_percent(of_update.min())} to "
        f"{_percent(of_update.max())} of the network's update.{most}",
    )


def _names_types(e: Explanation) -> Finding:
    types = [hit.type for hit in e.hits["head"]]
    after, before = named_types(e.hits), named_types(e.untrained)
    heads = [len(named_types({"head": hits["head"]})) for hits in (e.hits, e.untrained)]
    names = f": {', '.join(after)}" if after else ""
    return Finding(
        "Do heads and atoms match cell types?",
        "yes" if 2 * len(after) >= len(types) else "in part" if after else "no",
        f"{len(after)} of {len(types)} types have a head or an atom that shares more of their marker genes than chance "
        f"(p < {SIGNIFICANT:g}, {PERMUTATIONS} permutations){names}; {heads[0]} match a head. Before training, "
        f"{len(before)} have a match, {heads[1]} with a head. Those come from the initialization.",
    )


def _verdict(holds: np.ndarray) -> Verdict:
    return "yes" if holds.all() else "in part" if holds.any() else "no"


def _where(holds: np.ndarray) -> str:
    """Return where something holds, for the start of a sentence."""
    return "At every noise level and in every block" if holds.all() else _count(holds).capitalize()


def _count(holds: np.ndarray) -> str:
    return f"at {int(holds.sum())} of {holds.size} pairs of noise level and block"


def _range(changes: np.ndarray) -> str:
    low, high = changes.min(), changes.max()
    return f"{_signed(low)} to {_signed(high)}"


def _ends(values: np.ndarray, timesteps: Sequence[int], form: str) -> str:
    """Return the values by block at the lowest and at the highest noise level."""
    rows = ((values[i], timesteps[i]) for i in (-1, 0))
    return "; ".join(f"{', '.join(f'{value:{form}}' for value in row)} at t = {t}" for row, t in rows)


def _levels(holds: np.ndarray, timesteps: Sequence[int]) -> str:
    """Return the noise levels at which something holds."""
    if holds.all():
        return "at every noise level"
    if not holds.any():
        return "at no noise level"
    return "only at t = " + ", ".join(str(t) for t, one in zip(timesteps, holds, strict=True) if one)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _signed(share: float) -> str:
    return f"{100 * share:+.0f}%".replace("-", "\N{MINUS SIGN}")
