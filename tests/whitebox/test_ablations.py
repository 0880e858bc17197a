"""What heads cause: the tests of changes, and the readout of a run whose heads were removed."""

import json

import numpy as np
import pytest
from helpers import make_cells, stirred, tiny_preset

import wbdit
from wbdit.errors import InputError
from wbdit.report.explain import write_explanation
from wbdit.whitebox import ablations
from wbdit.whitebox.ablations import _difference_test, _ends, _paired_t, _share_tests
from wbdit.whitebox.explain import explain
from wbdit.whitebox.findings import findings
from wbdit.whitebox.gene_loadings import overlaps


@pytest.fixture(scope="module")
def cells():
    return make_cells(120, 80)


@pytest.fixture(scope="module")
def readout(cells):
    run = wbdit.fit(cells, label="type", steps=20, preset=tiny_preset(), progress=False)
    stirred(run.denoiser)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"CELLS": 16, "UNLABELED_CELLS": 48, "CALLS": 2, "PERMUTATIONS": 99}.items():
            patch.setattr(ablations, name, value)
        return explain(run, cells, cells=60, ablate=True)


def test_each_head_is_removed_and_as_many_subspaces(readout):
    found = readout.ablations
    assert [one.name for one in found.of("head")] == ["block-1-head-1", "block-1-head-2"]
    assert [one.name for one in found.of("random")] == ["block-1-random-1", "block-1-random-2"]
    assert {one.name for one in found.of("atom")} == {
        f"block-1-atom-{readout.units.number[hit.unit] + 1}" for hit in readout.hits["atom"]
    }
    assert len(found.of("random atom")) == len(found.of("atom"))
    assert not {one.name for one in found.of("random atom")} & {one.name for one in found.of("atom")}
    for one in found.removed:
        assert one.size >= 0
        assert 1 / 3 <= one.selectivity <= 1 or one.size == 0
        assert one.type in found.intact
        assert sum(one.shares.values()) == pytest.approx(1)
        assert 0 < one.p <= 1
    assert list(found.matches) == ["head", "random", "PC", "NMF"]
    assert [match.type for match in found.matches["NMF"]] == ["B", "NK", "T"]


def test_doses_move_genes_apart(readout):
    (steering,) = readout.ablations.steerings
    assert steering.doses[2] == 0
    assert steering.expression.shape == (5, 8)
    change = steering.expression[-1] - steering.expression[0]
    assert change[:4].max() <= change[4:].min()
    assert np.isfinite(steering.moved)


def test_the_page_tells_what_heads_cause(readout, tmp_path):
    page = write_explanation(readout, tmp_path, title="run").read_text()
    assert "What each head causes" in page
    assert findings(readout)[-1].question == "Do heads do more than principal components?"
    assert "block 1 head 2" in page
    assert (tmp_path / "figures" / f"{readout.ablations.steerings[0].name}-doses.svg").exists()
    kept = json.loads((tmp_path / "explain.json").read_text())
    assert len(kept["ablations"]["removed"]) == len(readout.ablations.removed)


def test_ablations_need_types(cells):
    run = wbdit.fit(cells, steps=1, preset=tiny_preset(), progress=False)
    with pytest.raises(InputError, match="trained without labels"):
        explain(run, cells, ablate=True)
    run = wbdit.fit(cells, label="type", steps=1, preset=tiny_preset(), progress=False)
    with pytest.raises(InputError, match="at least two types"):
        explain(run, cells[cells.obs["type"] == "B"], ablate=True)


def test_shares_that_change_are_told_from_those_that_do_not():
    rng = np.random.default_rng(0)
    intact = rng.integers(0, 3, 300)
    swapped = intact.copy()
    swapped[rng.choice(300, 40, replace=False)] = rng.integers(0, 3, 40)  # as many in either direction
    moved = np.where((intact == 0) & (rng.random(300) < 0.5), 1, intact)
    same, balanced, changed = _share_tests(intact, [intact, swapped, moved], 3, 0)
    assert same == 1
    assert balanced > 0.05
    assert changed < 0.01


def test_p_values_of_unchanged_shares_are_uniform():
    rng, found = np.random.default_rng(1), []
    for seed in range(60):
        one, other = rng.integers(0, 3, (2, 100))
        found.append(_share_tests(one, [other], 3, seed)[0])
    assert 0.3 < np.mean(found) < 0.7
    assert np.mean(np.array(found) < 0.05) < 0.15


def test_a_difference_of_means_is_found_on_its_side():
    high, low = np.arange(8) + 10.0, np.arange(8) + 0.0
    assert _difference_test(high, low, 0) < 0.01
    assert _difference_test(low, high, 0) == 1
    assert _difference_test(low, low, 0) > 0.3


def test_the_change_of_a_rare_gene_is_no_t_of_its_own():
    """A gene that changes in one cell of many does not stand above one that changes in all cells."""
    before = np.zeros((1, 50, 30))
    after = before + np.random.default_rng(0).normal(0, 0.3, before.shape)
    after[..., 0] += 1.0
    after[..., 1] = 0
    after[0, 0, 1] = 0.01
    mean, t = _paired_t(before, after)
    assert t[0].argmax() == 0
    assert t[0, 0] > 5
    assert abs(t[0, 1]) < 0.1
    np.testing.assert_allclose(mean, (after - before).mean(1))
    assert not _paired_t(before, before)[1].any()


def test_ends_are_the_genes_that_rise_and_fall_most():
    change = np.arange(200.0).reshape(1, 1, 200)
    rise, fall = _ends(change)[0]
    assert rise.nonzero()[0].tolist() == list(range(150, 200))
    assert fall.nonzero()[0].tolist() == list(range(50))


def test_each_type_may_have_its_own_sets():
    sets = np.zeros((2, 3, 400), np.float32)
    sets[0, 1, :50] = sets[1, 2, 50:100] = 1
    markers = {"B": np.arange(50), "T": np.arange(60, 110)}
    spread = np.random.default_rng(0).random(400)
    found = overlaps({"head": sets}, markers, spread, 0)["head"]
    assert [(match.type, match.end, match.shared) for match in found] == [("B", 1, 50), ("T", 2, 40)]
    assert all(match.p == 0.001 for match in found)
    other = overlaps({"head": sets[::-1]}, markers, spread, 0)["head"]
    assert other[0].p == 1  # T's markers, of which B has none
