"""What a head causes: cells generated without it, and cells moved along its axis.

Cells of each type are generated with the network as it is, and again with the same noise without one head
(:mod:`wbdit.nn.heads`). The difference is what the head causes. As many random subspaces of the same dimension
are removed as well, since a network may change the same genes whatever is taken from it. Atoms that match a type are
removed, and as many random ones. Whether the genes that change are the markers of a type is tested as for loadings
(:func:`wbdit.whitebox.gene_loadings.overlaps`), beside the loadings of principal components and of a non-negative
matrix factorization of the same cells. Genes are ranked by a paired t statistic, with a constant in the denominator
that keeps rare genes from the top (Tusher et al. 2001, PNAS 98:5116).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import torch

from wbdit.counts.denoiser import CountDenoiser
from wbdit.generator import CellGenerator
from wbdit.network_inputs import conditioning_of, noised
from wbdit.nn.heads import columns, head_name, places, remove_atom, remove_head, remove_subspace, white_box
from wbdit.nn.wbdit import WBDiT
from wbdit.whitebox.gene_loadings import MARKERS, Match, overlaps

CELLS = 64  # of each type
UNLABELED_CELLS = 512
CALLS = 6  # of the sampler, for count models; more change little
COMPONENTS = 30  # that types are told from
PERMUTATIONS = 999
DOSES = (-3.0, -1.5, 0.0, 1.5, 3.0)
GENES = 4  # named for each direction
KINDS = ("head", "random", "atom", "random atom")

logger = logging.getLogger("wbdit")

Values = Callable[[ad.AnnData], np.ndarray]


class Ablation(NamedTuple):
    """What changes without one unit.

    Attributes
    ----------
    kind, name
        "head", "random" for a random subspace, "atom" for one that matches a type, or "random atom"; and
        ``"block-1-head-2"``.
    size
        Root mean square change of a type's mean log expression, over genes and types, in units of that between types.
    selectivity
        Share of the squared change in the type that changes most; at least one over the number of types.
    type
        This type.
    falls, rises
        Its genes that fall and rise most, by their t statistic.
    shares
        Share of each type in cells generated without labels.
    p
        Probability that these shares differ as much by chance, in any unit of the kind.
    """

    kind: str
    name: str
    size: float
    selectivity: float
    type: str
    falls: list[str]
    rises: list[str]
    shares: dict[str, float]
    p: float


class Steering(NamedTuple):
    """What follows when cells are moved along a head's axis.

    Attributes
    ----------
    name
        The head.
    doses
        Standard deviations.
    genes
        Names of the genes that fall most, and of those that rise most.
    expression
        Mean log expression of these genes over all types, by dose, ``(doses, genes)``.
    moved
        How far cells move on the axis per dose, as the head reads them, in standard deviations within labels.
    """

    name: str
    doses: tuple[float, ...]
    genes: list[str]
    expression: np.ndarray
    moved: float


@dataclass(frozen=True)
class Ablations:
    """What the heads of a run cause.

    Attributes
    ----------
    intact
        Share of each type in cells generated without labels by the network as it is.
    removed
        What changes without each head, each random subspace, and the atoms that match types.
    matches
        The best match of each type's markers among the changes by "head" and "random", and among the loadings of "PC"
        and "NMF".
    selective
        Probability that heads are as selective as random subspaces by chance ("head"), and atoms as random atoms.
    steerings
        For the head of each block without which most changes.
    """

    intact: dict[str, float]
    removed: list[Ablation]
    matches: dict[str, list[Match]]
    selective: dict[str, float]
    steerings: list[Steering]

    def of(self, kind: str) -> list[Ablation]:
        """Return the ablations of a kind."""
        return [one for one in self.removed if one.kind == kind]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "intact": self.intact,
            "removed": [one._asdict() for one in self.removed],
            "matches": {kind: [match._asdict() for match in found] for kind, found in self.matches.items()},
            "selective": self.selective,
            "steerings": [{**one._asdict(), "expression": one.expression.tolist()} for one in self.steerings],
        }


class Change(NamedTuple):
    """A change of a network: the kind and name of a unit, and the function that removes it."""

    kind: str
    name: str
    change: Callable[[WBDiT], None]

    def applied_to(self, generator: CellGenerator) -> CellGenerator:
        """Return the generator with a changed copy of its network."""
        model = copy.deepcopy(generator.model)
        self.change(white_box(model.network))
        return generator.with_model(model)


def ablate(
    generator: CellGenerator,
    cells: ad.AnnData,
    labels: np.ndarray,
    markers: dict[str, np.ndarray],
    atoms: list[tuple[int, int]],
    values: Values,
    seed: int,
) -> Ablations:
    """Remove each head in turn, and move cells along some heads' axes.

    Parameters
    ----------
    generator
        A run with white-box blocks.
    cells, labels
        Real cells and their types ``(n,)``.
    markers
        Marker genes of at least two types, see :func:`wbdit.whitebox.gene_loadings.marker_genes`.
    atoms
        Blocks and numbers of atoms to remove as well.
    values
        Function that returns the log expression ``(n, G)`` of cells.
    seed
        Seed of the cells, subspaces and permutations.
    """
    trial = _Trial(generator, cells, labels, list(markers), values, seed)
    everything = list(_units(white_box(generator.denoiser), atoms, seed))
    before, intact = trial.cells(generator), trial.types(generator)
    removed, statistics, told = [], [], []
    for number, unit in enumerate(everything):
        logger.info(f"removing {unit.name} ({number + 1} of {len(everything)})")
        without = unit.applied_to(generator)
        change, t = _paired_t(before, trial.cells(without))
        told.append(trial.types(without))
        removed.append(trial.ablation(unit, change, t, before, told[-1]))
        statistics.append(t)
    kinds = {kind: [i for i, unit in enumerate(everything) if unit.kind == kind] for kind in KINDS}
    for rows in kinds.values():
        tests = _share_tests(intact, [told[i] for i in rows], len(markers), seed)
        for i, p in zip(rows, tests, strict=True):
            removed[i] = removed[i]._replace(p=float(p))
    sets = {kind: _ends(np.array([statistics[i] for i in kinds[kind]]).swapaxes(0, 1)) for kind in ("head", "random")}
    selectivity = {kind: np.array([removed[i].selectivity for i in rows]) for kind, rows in kinds.items()}
    return Ablations(
        intact=trial.shares(intact),
        removed=removed,
        matches=overlaps(sets | _factors(trial, len(kinds["head"]), seed), markers, trial.spread, seed),
        selective={
            "head": _difference_test(selectivity["head"], selectivity["random"], seed),
            "atom": _difference_test(selectivity["atom"], selectivity["random atom"], seed),
        },
        steerings=_steer(trial, np.array([removed[i].size for i in kinds["head"]])),
    )


class _Trial:
    """Cells that are generated with one network or another, from the same noise."""

    def __init__(
        self,
        generator: CellGenerator,
        cells: ad.AnnData,
        labels: np.ndarray,
        names: list[str],
        values: Values,
        seed: int,
    ) -> None:
        from sklearn.decomposition import PCA
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        rng = np.random.default_rng(seed)
        rows = [rng.choice(np.flatnonzero(labels == name), CELLS) for name in names]
        self.generator, self.names, self.values = generator, names, values
        self.like = ad.AnnData(obs=cells.obs.iloc[np.concatenate(rows)].reset_index(drop=True).rename(index=str))
        calls = CALLS if isinstance(generator.model, CountDenoiser) else None
        self.options: dict[str, Any] = {"seed": seed, "calls": calls}
        self.real = values(cells)
        self.spread = self.real.std(0).clip(1e-3)
        known = np.isin(labels, names)
        components = min(COMPONENTS, known.sum() - 1, self.real.shape[1])
        self.classifier = make_pipeline(PCA(components, random_state=0), LogisticRegression(max_iter=2000))
        self.classifier.fit(self.real[known], np.searchsorted(names, labels[known]))

    def cells(self, generator: CellGenerator) -> np.ndarray:
        """Return the log expression of generated cells by type, ``(types, CELLS, G)``."""
        made = self.values(generator.generate(like=self.like, **self.options))
        return made.reshape(len(self.names), CELLS, -1)

    def types(self, generator: CellGenerator) -> np.ndarray:
        """Return the types of cells that are generated without labels, ``(UNLABELED_CELLS,)``, as a classifier says."""
        made = generator.generate(UNLABELED_CELLS, guidance=0.0, **self.options)
        return np.asarray(self.classifier.predict(self.values(made)))

    def ablation(
        self, unit: Change, change: np.ndarray, t: np.ndarray, before: np.ndarray, types: np.ndarray
    ) -> Ablation:
        """Return what changes without a unit, with a p-value of 1.

        Parameters
        ----------
        unit
            The unit.
        change, t
            Of mean log expression, and its t statistic, ``(types, G)``.
        before, types
            As from :meth:`cells` with it, and :meth:`types` without it.
        """
        squares = np.square(change).sum(1)
        most = int(squares.argmax())
        between = before.mean(1).var(0).mean()
        return Ablation(
            unit.kind,
            unit.name,
            size=float(np.sqrt(np.square(change).mean() / between)),
            selectivity=float(squares[most] / squares.sum().clip(1e-12)),
            type=self.names[most],
            falls=self.top(-t[most]),
            rises=self.top(t[most]),
            shares=self.shares(types),
            p=1.0,
        )

    def places(self, cells: ad.AnnData) -> np.ndarray:
        """Return where cells lie on the axes of all heads, ``(L, h, cells)``."""
        own = self.generator.model, self.generator.schedule, self.generator.preprocessor
        x, t = noised(*own, cells, seed=0)
        model, axes = white_box(own[0].network), self.generator.head_directions.axes
        return places(model, axes, x, t, conditioning_of(own[0], own[2], cells)).cpu().numpy()

    def shares(self, types: np.ndarray) -> dict[str, float]:
        return {name: float((types == i).mean()) for i, name in enumerate(self.names)}

    def top(self, change: np.ndarray) -> list[str]:
        return [self.generator.preprocessor.genes[i] for i in np.argsort(-change, kind="stable")[:GENES]]


def _units(model: WBDiT, atoms: list[tuple[int, int]], seed: int) -> Iterator[Change]:
    """Yield all heads, as many random subspaces of each block, and some atoms."""
    blocks, heads, draws = len(model.blocks), model.num_heads, torch.Generator().manual_seed(seed % 2**63)
    for block, head in np.ndindex(blocks, heads):
        yield Change("head", head_name(block, head), partial(remove_head, block=block, head=head))
    width = columns(model, 0).stop
    for block, number in np.ndindex(blocks, heads):
        basis = torch.linalg.qr(torch.randn(heads * width, width, generator=draws)).Q.to(model.pos_embed.device)
        name = f"block-{block + 1}-random-{number + 1}"
        yield Change("random", name, partial(remove_subspace, block=block, basis=basis))
    matched = {atom for _, atom in atoms}
    free = [atom for atom in torch.randperm(model.hidden_size, generator=draws).tolist() if atom not in matched]
    others = [(block, free[i % len(free)]) for i, (block, _) in enumerate(atoms)]
    for kind, some in (("atom", atoms), ("random atom", others)):
        for block, atom in some:
            name = f"block-{block + 1}-atom-{atom + 1}"
            yield Change(kind, name, partial(remove_atom, block=block, atom=atom))


def _paired_t(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean change of the same cells ``(types, n, G)``, and its t statistic, ``(types, G)`` each."""
    change = after - before
    mean, error = change.mean(1), change.std(1, ddof=1) / np.sqrt(change.shape[1])
    constant = np.median(error[error > 0]) if (error > 0).any() else 1.0
    return mean, mean / (error + constant)


def _ends(change: np.ndarray) -> np.ndarray:
    """Return 1 for the genes that rise most, then for those that fall most: ``(types, 2 E, G)`` of (types, E, G)."""
    both = np.concatenate([change, -change], axis=1)
    ends = np.zeros(both.shape, np.float32)
    np.put_along_axis(ends, np.argsort(-both, axis=2, kind="stable")[..., :MARKERS], 1, axis=2)
    return ends


def _factors(trial: _Trial, count: int, seed: int) -> dict[str, np.ndarray]:
    """Return the ends of the real cells' principal components and non-negative factors, as :func:`_ends` does."""
    from sklearn.decomposition import NMF, PCA

    count = min(count, *trial.real.shape)
    models = {
        "PC": PCA(count, random_state=seed % 2**32),
        "NMF": NMF(count, init="nndsvda", max_iter=400, tol=1e-3, random_state=seed % 2**32),
    }
    found = {name: model.fit(trial.real.clip(0)).components_ / trial.spread for name, model in models.items()}
    return {"PC": _ends(found["PC"][None]), "NMF": _ends(found["NMF"][None])[:, :count]}  # a factor has one end


def _share_tests(intact: np.ndarray, told: list[np.ndarray], n_types: int, seed: int) -> np.ndarray:
    """Return p-values of the changes of the types' shares, by exchanging what a cell is with and without a unit.

    Each permutation takes the largest change of all units.
    """
    before = np.eye(n_types)[intact]  # [cells, types]
    flips = np.random.default_rng(seed).choice([-1.0, 1.0], (PERMUTATIONS, len(intact)))
    differences = [np.eye(n_types)[types] - before for types in told]
    if not differences:
        return np.ones(0)
    found = np.array([np.abs(d.sum(0)).sum() for d in differences])
    chance = np.max([np.abs(flips @ d).sum(1) for d in differences], axis=0)
    return (1 + (chance[None] >= found[:, None]).sum(1)) / (1 + PERMUTATIONS)


def _difference_test(values: np.ndarray, others: np.ndarray, seed: int) -> float:
    """Return the p-value of the difference of two means, larger ones first, by permutation."""
    rng, both = np.random.default_rng(seed), np.concatenate([values, others])
    found = values.mean() - others.mean()
    shuffled = rng.permuted(np.tile(both, (PERMUTATIONS, 1)), axis=1)
    chance = shuffled[:, : len(values)].mean(1) - shuffled[:, len(values) :].mean(1)
    return float((1 + (chance >= found).sum()) / (1 + PERMUTATIONS))


def _steer(trial: _Trial, sizes: np.ndarray) -> list[Steering]:
    """Move cells along the axis of the head of each block without which most changes."""
    generator, found = trial.generator, []
    axes = generator.head_directions.axes
    for block, head in enumerate(sizes.reshape(len(axes.directions), -1).argmax(1)):
        name = head_name(block, int(head))
        logger.info(f"moving cells along the axis of {name}")
        made = [generator.generate(like=trial.like, steer={name: dose}, **trial.options) for dose in DOSES]
        on_axis = np.array([trial.places(cells)[block, head] for cells in made])
        deviation = np.sqrt(np.mean([one.var() for one in np.split(on_axis[DOSES.index(0)], len(trial.names))]))
        expression = np.array([trial.values(cells).mean(0) for cells in made])
        order = np.argsort(expression[-1] - expression[0], kind="stable")
        some = np.concatenate([order[:GENES], order[::-1][:GENES]])
        slope = np.polyfit(DOSES, on_axis.mean(1) / deviation, 1)[0]
        genes = [generator.preprocessor.genes[i] for i in some]
        found.append(Steering(name, DOSES, genes, expression[:, some], float(slope)))
    return found
