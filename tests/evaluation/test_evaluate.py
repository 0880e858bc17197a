"""The evaluation: real cells score at the floor, broken ones do not, and bad input gives a one-line error."""

import json
import math
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from wbdit import _progress
from wbdit.data.normalize import log_normalized
from wbdit.datasets import blood_cells
from wbdit.errors import InputError
from wbdit.evaluation import compare, distances
from wbdit.evaluation.align import align
from wbdit.evaluation.evaluate import evaluate
from wbdit.evaluation.registry import METRICS
from wbdit.evaluation.scores import Score, judge

TYPES = ("B", "T", "NK")
N_GENES = 60
QUICK = {
    name
    for name, metric in METRICS.items()
    if not metric.full and name not in (*compare.CONDITION_CALLS, *compare.DONORS)
}
UNASKED = set(METRICS) - QUICK
quietly = partial(evaluate, seeds=(0,), bootstrap=4, progress=False)


def counts(n, seed, *, attenuation=1.0, dropout=0.0):
    """Return negative binomial cells ``(n, N_GENES)`` of three types; ``attenuation`` scales the type differences."""
    centers = np.random.default_rng(1).normal(0, 1, size=(3, N_GENES)) * attenuation
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, size=n)
    mean = np.exp(0.5 + centers[kind]) * rng.lognormal(0, 0.2, size=(n, 1))
    drawn = rng.poisson(rng.gamma(4.0, mean / 4.0)) * (rng.random((n, N_GENES)) >= dropout)
    obs = pd.DataFrame({"kind": np.array(TYPES)[kind]}, index=[f"cell{i}" for i in range(n)])
    var = pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)])
    return ad.AnnData(sp.csr_matrix(drawn.astype(np.float32)), obs=obs, var=var)


def lognorm(adata):
    return ad.AnnData(log_normalized(sp.csr_matrix(adata.X, dtype=np.float64), "counts"), obs=adata.obs, var=adata.var)


def scaled(adata):
    values = lognorm(adata).X.toarray()
    return ad.AnnData((values - values.mean(axis=0)) / (values.std(axis=0) + 1e-9), obs=adata.obs, var=adata.var)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Use 25 trees and one worse set: enough for these tests, while 1000 trees take seconds."""
    monkeypatch.setattr(distances, "forest_votes", partial(distances.forest_votes, n_trees=25))
    monkeypatch.setattr(compare, "WORSE", {"independent": compare.WORSE["independent"]})


@pytest.fixture(scope="module")
def sets():
    """Return real cells, the cells of a perfect generator (other real cells), and training cells."""
    return counts(300, 1), counts(300, 2), counts(300, 3)


def test_a_perfect_generator_scores_at_its_floor(sets):
    real, perfect, train = sets
    result = quietly(real, perfect, train=train, label="kind")
    assert set(result.scores) == QUICK
    assert [name for name, score in result.scores.items() if score.grade == "apart"] == []
    assert sum(score.grade == "at the floor" for score in result.scores.values()) >= len(QUICK) - 1
    assert result.verdict.level in ("floor", "close")
    assert set(result.per_type) == set(TYPES)
    for row in result.per_type.values():
        assert set(row) == {"w1", "w2", "mmd_cfgen", "scc", "zero_mae", "library_w1"}
        assert row["w1"].ratio == pytest.approx(1, abs=0.08)


def test_broken_generators_are_found_out(sets):
    real, _, train = sets
    merged = quietly(real, counts(300, 4, attenuation=0.3), train=train, label="kind")
    assert merged.scores["lfc_slope"].value < 0.5 < 0.9 < merged.scores["lfc_slope"].floor
    assert merged.scores["lfc_slope"].grade == merged.scores["de_recall"].grade == "apart"
    assert merged.verdict.level in ("mixed", "apart")
    assert any("weaker" in line for line in merged.verdict.caution + merged.verdict.slight)
    sparse = quietly(real, counts(300, 4, dropout=0.5), train=train, label="kind")
    assert sparse.scores["zero_mae"].grade == sparse.scores["var_r2"].grade == "apart"
    assert sparse.verdict.level == "apart"


def test_shuffled_labels_fail_where_labels_count_and_nowhere_else(sets):
    real, perfect, train = sets
    shuffled = perfect.copy()
    shuffled.obs["kind"] = np.random.default_rng(0).permutation(shuffled.obs["kind"])
    right, wrong = (quietly(real, cells, train=train, label="kind").scores for cells in (perfect, shuffled))
    assert wrong["tstr"].value < 0.6 < 0.9 < wrong["tstr"].floor
    assert abs(wrong["lfc_slope"].value) < 0.2
    same = {name for name in QUICK if name in wrong and right[name].values == wrong[name].values}
    assert same == QUICK - {"tstr", *compare.BY_TYPE}


def test_copies_of_the_training_cells_stand_exactly_at_the_floor(sets):
    real, _, train = sets
    result = quietly(real, train.copy(), train=train, label="kind")
    for name in ("w1", "w2", "mmd_cfgen", "mmd_scdiffusion", "scc", "var_r2", "zero_mae", "library_w1", "lfc_slope"):
        assert result.scores[name].value == pytest.approx(result.scores[name].floor, rel=1e-6), name
    for name, bar in (("mia_auc", 0.7), ("copies", 0.9)):  # others cannot see it; half of the copies are drawn
        assert result.scores[name].value > bar > 0.65 > result.scores[name].floor
        assert result.scores[name].grade == "apart"
    assert result.scores["dcr_ratio"].value < 0.9 < result.scores["dcr_ratio"].floor
    assert result.scores["mia_auc"].n == 150  # the held-out cells are halved
    assert result.scores["copies"].n == 300  # each is searched in the components of the other half


def test_a_sample_of_the_cells_is_noted(sets):
    real, synthetic, train = sets
    result = quietly(real, synthetic[:100].copy(), train=train)
    assert "100 cells of each set are drawn at random, of 300 real and 300 train cells" in result.notes


def test_the_same_input_gives_the_same_figures(sets):
    first, second = (
        evaluate(*sets[:2], train=sets[2], label="kind", n_cells=40, seeds=(3, 4), bootstrap=6, progress=False)
        for _ in range(2)
    )
    assert first.to_dict() == second.to_dict()
    scores = first.scores["w1"]
    assert len(scores.values) == len(scores.floor_values) == 2
    assert scores.values[0] != scores.values[1]
    assert scores.spread == pytest.approx(np.std(scores.values, ddof=1))


def test_without_training_cells_the_real_ones_are_halved(sets):
    real, perfect, _ = sets
    result = quietly(real, perfect, label="kind")
    assert result.n == 150
    assert "half" in result.floor
    halves = compare.split_halves(
        align({"real": real}, label="kind", n_genes=99).sets["real"], np.random.default_rng(0)
    )
    for kind in TYPES:
        sizes = [int((half.labels == kind).sum()) for half in halves]
        assert abs(sizes[0] - sizes[1]) <= 1
    assert result.scores["w1"].floor == pytest.approx(result.scores["w1"].value, rel=0.05)


def test_without_labels_their_metrics_are_left_out_with_a_reason(sets):
    result = quietly(*sets[:2])
    assert QUICK - set(result.scores) == {*compare.BY_TYPE, "tstr", "mia_auc", "dcr_ratio", "copies"}
    assert set(METRICS) - set(result.scores) == set(result.omitted)
    assert all("label" in result.omitted[name] for name in ("lfc_slope", "tstr"))
    assert "training cells" in result.omitted["copies"]
    assert result.per_type == {}
    assert result.figures.labels is None


def test_metrics_json_holds_what_a_reader_needs(sets):
    result = quietly(*sets[:2], train=sets[2], label="kind", n_cells=40)
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert content["n"] == 40
    assert content["n_genes"] == N_GENES
    assert set(content["metrics"]) == QUICK
    wanted = {
        "value",
        "values",
        "floor",
        "floor_values",
        "n",
        "seeds",
        "best",
        "direction",
        "sentence",
        "elsewhere",
        "ratio",
        "interval",
        "group",
        "worse",
        "sees",
        "scaled",
    }
    for row in content["metrics"].values():
        assert wanted <= set(row)
        assert row["values"] == [row["value"]]
        assert row["spread"] is None  # one seed has no spread
    assert content["versions"]["numpy"] == np.__version__
    assert len(json.dumps(content)) < 90_000
    table = result.table()
    assert all(f"\n{name} " in table for name in QUICK)
    assert "n = 40 cells of each set" in table


def test_intervals_hold_their_values_and_can_be_left_out(sets):
    real, perfect, train = sets
    with_them = evaluate(real, perfect, train=train, label="kind", seeds=(0, 1), bootstrap=30, progress=False)
    for name, score in with_them.scores.items():
        for value, interval in ((score.value, score.interval), (score.floor, score.floor_interval)):
            assert interval is not None, name
            low, high = interval
            assert low <= value <= high, name
            assert score.metric.low <= low, name
            assert high <= score.metric.high, name
    assert all(score.interval for row in with_them.per_type.values() for score in row.values())
    without = evaluate(real, perfect, train=train, label="kind", seeds=(0, 1), bootstrap=0, progress=False)
    assert all(score.interval is None and score.floor_interval is None for score in without.scores.values())
    assert {n: s.values for n, s in with_them.scores.items()} == {n: s.values for n, s in without.scores.items()}


def test_depth_is_taken_on_the_counts_of_all_shared_genes(sets):
    real, perfect, train = sets
    result = quietly(real, perfect, train=train, n_genes=25)
    for i, name in enumerate(("library_w1", "detected_w1")):
        a, b = (np.sort((cells.X, cells.X > 0)[i].toarray().sum(axis=1)) for cells in (real, perfect))
        assert result.scores[name].value == pytest.approx(np.abs(a - b).mean())
    assert any("of the 60 shared genes" in note for note in result.notes)
    deeper = perfect.copy()
    deeper.X = deeper.X * 2
    assert quietly(real, deeper, train=train).scores["library_w1"].grade == "apart"


def test_labels_that_are_no_type_can_be_ignored(sets):
    noisy = []
    for i, cells in enumerate(sets):
        rng = np.random.default_rng(i)
        labels = np.where(rng.random(cells.n_obs) < 0.3, "unassigned", cells.obs["kind"].astype(str))
        noisy.append(relabelled(cells, labels))
    real, perfect, train = noisy
    kept, left_out = (
        quietly(real, perfect, train=train, label="kind", ignore=names) for names in ((), ("unassigned",))
    )
    assert set(kept.per_type) - set(left_out.per_type) == {"unassigned"}
    assert kept.scores["tstr"].value < 0.85 < 0.95 < left_out.scores["tstr"].value
    changed = {name for name in QUICK if kept.scores[name].values != left_out.scores[name].values}
    assert changed == {"tstr", *compare.BY_TYPE}
    assert any("cells labeled unassigned" in note for note in left_out.notes)
    only = [cells[cells.obs["kind"] != "unassigned"].copy() for cells in noisy]
    alone = quietly(only[0], only[1], train=only[2], label="kind")
    whole = min(len(cells) for cells in only) == alone.n
    assert whole
    assert left_out.scores["lfc_slope"].value == pytest.approx(alone.scores["lfc_slope"].value, abs=0.05)


def test_zero_mae_is_taken_on_the_counts(sets):
    real, perfect, train = sets
    result = quietly(real, perfect, train=train)
    by_hand = np.abs((real.X.toarray() == 0).mean(axis=0) - (perfect.X.toarray() == 0).mean(axis=0)).mean()
    assert result.scores["zero_mae"].value == pytest.approx(by_hand)
    np.testing.assert_allclose(result.figures.zeros["real"], (real.X.toarray() == 0).mean(axis=0))


def test_gene_order_does_not_count_and_missing_genes_are_told(sets):
    real, perfect, train = sets
    straight = quietly(real, perfect, train=train).scores
    turned = quietly(real, perfect[:, ::-1].copy(), train=train).scores
    assert {name: score.values for name, score in straight.items()} == {n: s.values for n, s in turned.items()}
    fewer = quietly(real, perfect[:, :40].copy(), train=train)
    assert fewer.n_genes == 40
    assert any("40 genes are shared; left out: 20 of 60 real, 20 of 60 train genes" in note for note in fewer.notes)


def test_the_most_variable_genes_of_the_real_cells_are_kept(sets):
    result = quietly(*sets[:2], n_genes=25)
    assert (result.n_genes, result.n_shared_genes) == (25, N_GENES)
    assert any("25 most variable of 60" in note for note in result.notes)


def test_log_values_beside_counts_are_brought_to_one_scale(sets):
    real, perfect, train = sets
    same = quietly(real, perfect, train=train, label="kind")
    mixed = quietly(real, lognorm(perfect), train=train, label="kind")
    for name in ("w1", "mmd_cfgen", "scc", "var_r2", "zero_mae", "lfc_slope"):
        assert mixed.scores[name].value == pytest.approx(same.scores[name].value, rel=1e-6), name
    assert any("log1p" in note for note in mixed.notes)
    assert quietly(lognorm(real), lognorm(perfect), train=lognorm(train)).scores["w1"].value == pytest.approx(
        same.scores["w1"].value, rel=1e-6
    )


def test_raw_counts_in_a_layer_are_preferred(sets):
    real, perfect, train = sets
    dressed = lognorm(perfect)
    dressed.layers["counts"] = perfect.X
    plain, found = (quietly(real, cells, train=train) for cells in (perfect, dressed))
    assert plain.scores["w1"].values == found.scores["w1"].values
    assert any("layers['counts']" in note for note in found.notes)


def test_scaled_values_are_compared_with_scaled_values_only(sets):
    real, perfect, train = sets
    with pytest.raises(InputError, match="scaled values cannot be compared") as error:
        quietly(real, scaled(perfect), train=train)
    assert "\n" not in str(error.value)
    result = quietly(scaled(real), scaled(perfect), n_genes=30)
    assert {"zero_mae", "library_w1", "detected_w1"} <= set(result.omitted)
    assert "counts" in result.omitted["library_w1"]
    assert result.n_genes == 30


def test_a_cell_without_counts_stays_zero():
    normalized = log_normalized(sp.csr_matrix(np.array([[0.0, 0.0], [1.0, 3.0]])), "counts").toarray()
    np.testing.assert_allclose(normalized, [[0, 0], np.log1p([2500, 7500])])


def with_value(adata, value):
    broken = adata.copy()
    broken.X = broken.X.toarray()
    broken.X[0, 0] = value
    return broken


def renamed(adata):
    other = adata.copy()
    other.var_names = [f"ENSG{i}" for i in range(adata.n_vars)]
    return other


def relabelled(adata, labels):
    other = adata.copy()
    other.obs["kind"] = labels
    return other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, s: (r, s, {"label": "cluster"}), r"real cells: no column 'cluster' in obs; the columns are: kind"),
        (lambda r, s: (r, ad.AnnData(s.X, var=s.var), {"label": "kind"}), r"synthetic cells: no column 'kind'"),
        (lambda r, s: (r, relabelled(s, [None] * s.n_obs), {"label": "kind"}), r"300 cells have no 'kind'"),
        (lambda r, s: (r, relabelled(s, "other"), {"label": "kind"}), r"no label of 'kind' in common"),
        (lambda r, s: (r, with_value(s, np.nan), {}), r"synthetic cells: X holds 1 NaN"),
        (lambda r, s: (with_value(r, -1.0), s, {}), r"real cells: X holds negative counts"),
        (lambda r, s: (r, renamed(s), {}), r"share no genes \(real: 'gene0', synthetic: 'ENSG0'\)"),
        (lambda r, s: (r[:30].copy(), s, {}), r"too few real cells: 30, at least 40"),
        (lambda r, s: (r, s[:10].copy(), {}), r"too few synthetic cells: 10, at least 20"),
        (lambda r, s: (r, s, {"train": r[:12].copy()}), r"too few train cells: 12"),
        (lambda r, s: (r, s, {"seeds": ()}), r"`seeds` of 0 or above"),
        (lambda r, s: (r, s, {"n_cells": 5}), r"`n_cells` of 20 to 5000, not 5"),
        (lambda r, s: (r, s, {"n_cells": 20_000}), r"`n_cells` of 20 to 5000, not 20000"),
        (lambda r, s: (r, s, {"bootstrap": 1}), r"`bootstrap` is 0 for no intervals, or 2"),
        (lambda r, s: (r, s, {"ignore": ("B",)}), r"to ignore \(B\) need a label column"),
        (lambda r, s: (r, s, {"label": "kind", "ignore": ("b",)}), r"no cell is labeled 'b'.*: B, NK, T"),
        (lambda r, s: (r, s, {"label": "kind", "ignore": TYPES}), r"no label of 'kind' in common"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(sets, change, message):
    real, synthetic, options = change(*sets[:2])
    with pytest.raises(InputError, match=message) as error:
        evaluate(real, synthetic, progress=False, **{"seeds": (0,), **options})
    assert "\n" not in str(error.value)


def test_rare_missing_and_new_labels_are_noted_not_refused(sets):
    real, perfect, train = sets
    without = perfect[perfect.obs["kind"] != "NK"].copy()
    without.obs["kind"] = without.obs["kind"].astype(str)
    without.obs.iloc[0, 0] = "platelet"  # a label of one cell
    result = quietly(real, without, train=train, label="kind")
    assert "NK" not in result.per_type
    notes = " | ".join(result.notes)
    assert "synthetic cells lack these labels: NK" in notes
    assert "synthetic cells have labels that the real ones lack: platelet" in notes
    assert "not scored by type, with fewer than 10 cells in a set: NK" in notes
    assert result.scores["tstr"].value < result.scores["tstr"].floor - 0.2


def test_one_label_leaves_out_what_needs_two(sets):
    real, perfect, train = (relabelled(cells, "all") for cells in sets)
    result = quietly(real, perfect, train=train, label="kind")
    assert set(result.omitted) == {"tstr", *compare.BY_TYPE, *UNASKED}
    assert set(result.per_type) == {"all"}


def test_progress_names_the_stages(sets, capsys, caplog, monkeypatch):
    """Where stderr is no terminal, the log has a line per tenth."""
    monkeypatch.setattr(_progress, "LINE_SECONDS", 0.0)
    caplog.set_level("INFO", "wbdit")
    evaluate(*sets[:2], n_cells=20, seeds=(0,))
    assert capsys.readouterr().out == ""
    assert "evaluating 50%, seed 0: memorization" in caplog.messages
    assert caplog.messages[-1] == "evaluating 100%, done"
    caplog.clear()
    quietly(*sets[:2], n_cells=20)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("name", "value", "floor", "grade", "excess"),
    [
        ("w1", 10.0, 10.0, "at the floor", 0.0),
        ("w1", 10.5, 10.0, "at the floor", 1.0),
        ("w1", 11.5, 10.0, "close", 2.0),
        ("w1", 20.0, 10.0, "apart", 10.5),
        ("rf_auc", 0.40, 0.50, "at the floor", 0.0),  # below 0.5 is chance, not a fault
        ("rf_auc", 0.95, 0.55, "apart", 1 + 0.34 / 0.14),
        ("lfc_slope", 1.0, 0.9, "at the floor", -0.1 / 0.06),
        ("lfc_slope", 1.5, 0.95, "apart", 1 + 0.39 / 0.09),
        ("scc", 0.90, 0.98, "apart", 1 + 0.07 / 0.04),
        ("zero_mae", 0.0, 0.0, "at the floor", 0.0),
    ],
)
def test_grades(name, value, floor, grade, excess):
    score = Score(METRICS[name], (value,), (floor,), n=10_000, seeds=(0,))
    assert score.grade == grade
    assert score.excess == pytest.approx(excess, abs=1e-6)


def test_few_cells_leave_more_to_chance():
    few, many = (Score(METRICS["rf_auc"], (0.6,), (0.5,), n, (0,)) for n in (100, 10_000))
    assert (few.grade, many.grade) == ("at the floor", "close")


def test_what_may_be_chance_counts_as_the_floor():
    """Three standard errors of the difference, from the intervals or else from the seeds."""
    steady = Score(METRICS["rf_auc"], (0.6, 0.6), (0.5, 0.5), 900, (0, 1))
    moving = Score(METRICS["rf_auc"], (0.6, 0.6), (0.44, 0.56), 900, (0, 1))
    assert (steady.grade, moving.grade) == ("close", "at the floor")
    narrow, wide = (
        Score(METRICS["rf_auc"], (0.8,), (0.5,), 900, (0,), ((0.8 - width, 0.8 + width),), ((0.49, 0.51),))
        for width in (0.02, 0.3)
    )
    assert narrow.error == pytest.approx(math.hypot(0.02, 0.01) / 1.959964)
    assert (narrow.grade, wide.grade) == ("apart", "at the floor")


def test_a_metric_sees_a_worse_set_beyond_three_errors_of_its_floor():
    worse = {"independent": 0.9, "lost": 0.52}
    score = Score(METRICS["rf_auc"], (0.6,), (0.5,), 900, (0,), ((0.5, 0.7),), ((0.48, 0.52),), worse)
    assert score.sees == ("independent",)
    assert not score.is_blind
    assert score.scaled == pytest.approx((0.6 - 0.9) / (0.5 - 0.9))
    blind = Score(METRICS["rf_auc"], (0.6,), (0.5,), 900, (0,), ((0.5, 0.7),), ((0.1, 0.9),), worse)
    assert blind.sees == ()
    assert blind.is_blind
    assert blind.scaled is None
    assert not Score(METRICS["rf_auc"], (0.6,), (0.5,), 900, (0,)).is_blind  # nothing was tried
    unknown = Score(METRICS["rf_auc"], (0.6,), (0.5,), 900, (0,), worse=worse)  # neither intervals nor seeds
    assert unknown.sees == ()
    assert not unknown.is_blind


def test_what_takes_long_is_computed_on_request(sets):
    real, perfect, train = sets
    result = evaluate(real, perfect, train=train, label="kind", full=True, seeds=(0,), bootstrap=0, progress=False)
    assert set(result.scores) == QUICK | {name for name, metric in METRICS.items() if metric.full}
    quick = quietly(real, perfect)
    assert quick.omitted["rf_auc"] == "takes long: ask for it with `full` (--full)"
    assert "omitted (takes long: ask for it with `full` (--full)): rf_auc, rf_auc_genes, c2st_trees" in quick.table()


def test_genes_between_conditions_are_compared(sets):
    """A condition that shifts five genes in one type."""

    def treated(cells, seed, effect):
        cells = cells.copy()
        cells.obs["drug"] = np.random.default_rng(seed).permutation(np.arange(cells.n_obs) % 2).astype(str)
        values = cells.X.toarray()
        rows = ((cells.obs["drug"] == "1") & (cells.obs["kind"] == "T")).to_numpy()
        values[np.ix_(rows, np.arange(5))] += effect
        cells.X = sp.csr_matrix(np.round(values))
        return cells

    real, perfect, train = (treated(cells, i, 20) for i, cells in enumerate(sets))
    right = quietly(real, perfect, train=train, label="kind", condition="drug").scores
    wrong = quietly(real, treated(sets[1], 7, 0), train=train, label="kind", condition="drug").scores
    assert right["de_recall_condition"].value > 0.7
    assert wrong["de_recall_condition"].value < 0.3
    assert right["de_recall"].value == pytest.approx(wrong["de_recall"].value, abs=0.1)
    with pytest.raises(InputError, match="synthetic cells: no column 'drug'"):
        quietly(real, sets[1], label="kind", condition="drug")


def test_genes_are_matched_by_id_where_names_differ(sets):
    real, perfect, _ = sets
    perfect, known = renamed(perfect), real.copy()
    known.var["gene_ids"] = perfect.var_names
    result = quietly(known, perfect)
    assert result.n_genes == N_GENES
    assert 'genes are matched by var["gene_ids"] of the real cells' in result.notes


def test_the_genes_that_give_cells_away_are_named(sets):
    real, perfect, _ = sets
    wrong = perfect.copy()
    wrong.X = wrong.X.toarray()
    wrong.X[:, 7] *= 5
    result = quietly(real, wrong)
    assert result.giveaways[0].gene == "gene7"
    assert result.to_dict()["giveaways"][0]["auc"] > 0.8


def test_the_verdict_follows_the_grades():
    def verdict(values):
        scores = {name: Score(METRICS[name], (value,), (floor,), 9, (0,)) for name, value, floor in values}
        return judge(scores, {})

    fine, off = ("scc", 0.98, 0.98), ("w1", 30.0, 10.0)
    assert verdict([fine]).level == "floor"
    assert verdict([fine, ("w1", 11.0, 10.0)]).level == "close"
    assert verdict([fine, off]).level == "mixed"
    assert verdict([off]).level == "apart"
    assert "1 of 2" in verdict([fine, off]).summary
    guesses = verdict([("c2st_logistic", 0.6, 0.5), ("rf_auc_genes", 0.77, 0.5)]).summary
    assert "a random forest is right 77 times in 100" in guesses


def test_real_cells_of_another_tissue_sample():
    """On real data, held-out cells pass; independent genes with the right mean per type do not."""
    cells = blood_cells()
    order = np.random.default_rng(0).permutation(cells.n_obs)
    real, other, train = (cells[order[i::3]].copy() for i in range(3))
    assert not any(s.grade == "apart" for s in quietly(real, other, train=train, label="bulk_labels").scores.values())
    labels = train.obs["bulk_labels"].astype(str).to_numpy()
    means = {name: train.X[np.flatnonzero(labels == name)].toarray().mean(axis=0) for name in np.unique(labels)}
    drawn = np.random.default_rng(1).poisson([means[name] for name in labels])
    independent = ad.AnnData(sp.csr_matrix(drawn.astype(float)), obs=train.obs, var=train.var)
    result = quietly(real, independent, train=train, label="bulk_labels", bootstrap=20)
    assert {result.scores[name].grade for name in ("density", "coverage", "kl_hist", "ilisi")} == {"apart"}
    assert result.scores["scc"].value > 0.95  # the means alone look right
    assert result.verdict.level in ("mixed", "apart")


def test_floors_are_between_donors(sets):
    """Donors with genes of their own: halves of donors differ, halves of cells do not."""

    def of_donors(cells, names):
        cells = cells.copy()
        cells.obs["donor"] = np.array(names)[np.arange(cells.n_obs) % len(names)]
        values = cells.X.toarray()
        for i, name in enumerate(names):
            own = np.random.default_rng(100 + int(name[1:])).lognormal(0, 0.5, N_GENES)
            values[i :: len(names)] = np.round(values[i :: len(names)] * own)
        cells.X = sp.csr_matrix(values)
        return cells

    real = of_donors(sets[0], ["P1", "P2"])
    cells, donors = (quietly(real, of_donors(sets[1], ["P3"]), label="kind", donor=d).scores for d in (None, "donor"))
    assert donors["w2"].floor > 1.03 * cells["w2"].floor
    assert donors["pcc"].floor < cells["pcc"].floor
    train = of_donors(sets[2], ["P3", "P4"])
    seen = quietly(real, sets[1], train=train, label="kind", donor="donor")
    assert any("300 real cells of 2 donors without training cells" in note for note in seen.notes)
    shared = quietly(real, sets[1], train=of_donors(sets[2], ["P1", "P2"]), label="kind", donor="donor")
    assert any("share donors" in note for note in shared.notes)
    assert "needs 5 donors" in shared.omitted["donor_mia_auc"]
    with pytest.raises(InputError, match=r"of one donor \(P3\)"):
        quietly(of_donors(sets[0], ["P3"]), sets[1], donor="donor")
    with pytest.raises(InputError, match="train cells: no column 'donor'"):
        quietly(real, sets[1], train=sets[2], donor="donor")


def test_donors_are_attacked():
    """A generator that copies the effects of its donors is found out; other cells of the population are not."""
    rng = np.random.default_rng(0)
    names = np.array([f"P{i:02}" for i in range(16)])
    profile, effects = rng.gamma(2.0, 1.0, N_GENES), rng.lognormal(0, 0.4, (16, N_GENES))

    def drawn(which):
        obs = pd.DataFrame({"donor": names[which]}, index=[f"cell{i}" for i in range(len(which))])
        var = pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)])
        return ad.AnnData(sp.csr_matrix(rng.poisson(profile * effects[which]).astype(np.float32)), obs=obs, var=var)

    train, real = drawn(np.arange(400) % 8), drawn(np.arange(960) % 16)
    new = drawn(np.arange(400) % 16)
    new.X = sp.csr_matrix(rng.poisson(profile * rng.lognormal(0, 0.4, (400, N_GENES))).astype(np.float32))
    copied, honest = (quietly(real, cells, train=train, donor="donor") for cells in (drawn(np.arange(400) % 8), new))
    assert copied.scores["donor_mia_auc"].value > 0.9 > 0.75 > copied.scores["donor_mia_auc"].floor
    assert copied.scores["donor_mia_auc"].grade == "apart"
    assert copied.scores["donor_tpr_at_5"].value > 0.5
    assert honest.scores["donor_mia_auc"].value < 0.8
    assert any("by 1 cells" in note or "by 10 cells" in note for note in copied.notes)
