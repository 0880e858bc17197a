"""The bench of combinations that are left out: splits, scores and baselines."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from click.testing import CliRunner

from bench.quality.unseen.__main__ import main
from bench.quality.unseen.baselines import moved, shifted, thinned
from bench.quality.unseen.cells import Change, leave_out, read
from bench.quality.unseen.judge import Judge, log_values

GENES, CHANGE = 80, Change("type", "condition", "ctrl", "stim")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Return a file of three types; the first genes rise with the condition, in C more than in A and B."""
    rng = np.random.default_rng(0)
    rates = rng.gamma(1.0, 3.0, (3, GENES))
    which, stim = np.arange(900) % 3, np.arange(900) // 3 % 2 == 1
    rates[1:] = rates[0] * rng.lognormal(0, 0.4, (2, GENES))
    means = rates[which] + 6 * stim[:, None] * (np.arange(GENES) < 15) * np.where(which == 2, 1.3, 1)[:, None]
    obs = {"type": np.array(["A", "B", "C"])[which], "condition": np.where(stim, "stim", "ctrl")}
    cells = ad.AnnData(sp.csr_matrix(rng.poisson(means), dtype=np.float32), obs=obs)
    cells.write_h5ad(tmp_path_factory.mktemp("unseen") / "cells.h5ad")
    return tmp_path_factory.getbasetemp() / "unseen0" / "cells.h5ad"


@pytest.fixture(scope="module")
def cells(path):
    return read(path, CHANGE, [])


def names(cells):
    return set(cells.obs_names)


def test_what_is_left_out(cells):
    case = leave_out(cells, CHANGE, ("C", "B"), seed=0)
    left = cells.obs[cells.obs["type"].isin(["B", "C"]) & (cells.obs["condition"] == "stim")]
    assert names(case.train) < set(cells.obs_names) - set(left.index)
    assert case.train.n_obs == 900 - 300 - 150  # half of the unchanged cells of B and C are the judge's
    assert not names(case.train) & names(case.before)
    assert names(case.own) < names(case.train)
    own = left.index[left["type"] == "C"]
    assert names(case.truth) | names(case.other) == set(own)
    assert not names(case.truth) & names(case.other)
    given = leave_out(cells, CHANGE, ("C", "B"), seed=0, real=7)
    assert len(names(given.train) - names(case.train)) == 7
    assert names(given.train) - names(case.train) <= names(case.other)
    seen = leave_out(cells, CHANGE, ("C",), seed=0, seen=["B", "C"])
    assert names(seen.truth) == names(case.truth)
    assert len(names(cells) - names(seen.train)) == 2 * (150 / 2 + 150 / 2)


def test_scores_at_both_ends(cells):
    case = leave_out(cells, CHANGE, ("C",), seed=0)
    judge = Judge(case, 0)
    right, nothing = judge(case.other), judge(case.own)
    assert right["R2d"] > 0.9
    assert right["gap"] == pytest.approx(1)
    assert right["slope"] == pytest.approx(1, abs=0.1)
    assert right["jaccard"] > 0.6
    assert [nothing[name] for name in ("R2d", "slope", "gap")] == pytest.approx([0, 0, 0], abs=0.05)


def test_moved_cells_have_the_wanted_means(cells):
    some = cells[:300].copy()
    shift = np.where(np.arange(GENES) % 5 == 0, np.linspace(-1.0, 1.0, GENES), 0)
    found = log_values(moved(some, shift, seed=0)).mean(0)
    wanted = np.maximum(log_values(some).mean(0) + shift, 0)
    assert np.abs(found - wanted).max() < 0.1
    assert np.abs(found - wanted).mean() < 0.02


def test_thinned_cells_have_the_library_sizes_of_others(cells):
    few, many = cells[:200].copy(), cells[200:500].copy()
    few.X = few.X.copy()
    few.X.data = np.ceil(few.X.data / 3)
    made, library = thinned(many, few, seed=0), np.asarray(few.X.sum(1)).ravel()
    assert (many.X - made.X).min() >= 0
    assert made.X.sum(1).mean() == pytest.approx(library.mean(), rel=0.02)
    assert np.allclose(made.X.mean(0) / made.X.mean(), many.X.mean(0) / many.X.mean(), atol=0.2)
    assert (thinned(few, many, seed=0).X != few.X).nnz == 0  # nothing is added


def test_a_shift_comes_from_the_others(cells):
    case = leave_out(cells, CHANGE, ("C",), seed=0)
    judge = Judge(case, 0)
    for how in ("nearest", "kernel", "mean"):
        assert judge(shifted(case, CHANGE, how, seed=0))["R2d"] > 0.5


def test_the_command(path, tmp_path):
    asked = [str(path), "--columns", "type,condition", "--left-out", "C", "--method", "baselines", "--method", "tables"]
    done = CliRunner().invoke(main, [*asked, "--seeds", "0,1", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "| real, other half | C |" in done.output
    assert "| shift, kernel | **mean** |" in done.output
    assert "| wbdit's tables alone | C |" in done.output
    assert (tmp_path / "cells" / "C-1" / "baselines.json").exists()


def test_a_file_that_is_not_there(tmp_path):
    done = CliRunner().invoke(main, [str(tmp_path / "none.h5ad")])
    assert done.exit_code == 2
    assert "none.h5ad" in done.output
