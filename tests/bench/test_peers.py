"""The comparison with other generators: the shared split, each generator, the kept runs, and the table."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from click.testing import CliRunner
from helpers import make_cells

import wbdit
from bench.quality import residual
from bench.quality.peers import runs
from bench.quality.peers.__main__ import DEFAULT, ORDERS, PEERS, compare, main
from bench.quality.peers.baselines import IndependentGenes, PcaGaussian
from bench.quality.peers.cells import Choice, DataSet
from bench.quality.peers.copula import indicators
from bench.quality.peers.diffusion import Diffusion
from bench.quality.peers.gene_order import Reordered
from bench.quality.peers.peer import joined
from bench.quality.peers.runs import Plan, Run
from bench.quality.peers.table import markdown
from bench.quality.peers.variational import _Vae
from wbdit import DiT, InputError
from wbdit.data.cell_matrix import MemoryMatrix
from wbdit.data.variable_genes import variable_genes
from wbdit.evaluation import distances
from wbdit.evaluation.align import align
from wbdit.training.config import Preset

LABELS = ("type", "condition")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    cells = make_cells(150, 60, ("B", "NK", "T", "unassigned", "B"))
    cells.obs["condition"] = np.where(np.arange(150) % 2, "stim", "ctrl")
    cells.obs.loc["cell-0", "type"] = "lonely"
    path = tmp_path_factory.mktemp("data") / "made.h5ad"
    cells.write_h5ad(path)
    return DataSet(path, LABELS)


@pytest.fixture(scope="module")
def split(data):
    return data.split(Choice(genes=40), 0)


def bound_genes(n=600, types=("a", "b")):
    """Return cells in which genes 0 and 1 are correlated within each type; the other genes are independent."""
    rng = np.random.default_rng(0)
    code = np.arange(n) % len(types)
    counts = rng.poisson(20, (n, 8)).astype(np.float32)
    counts[:, 0] = rng.poisson(rng.gamma(4, 10, n) * (1 + code))
    counts[:, 1] = counts[:, 0] + rng.poisson(2, n)
    cells = ad.AnnData(sp.csr_matrix(counts))
    cells.obs["type"] = np.array(types)[code]
    return cells


# the split


def test_the_split_is_shared_and_blind(data, split):
    names = [set(part.obs_names) for part in (split.train, split.test)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 150 - 30 - 1
    whole = ad.read_h5ad(data.path)
    chosen = variable_genes(MemoryMatrix(whole[split.train.obs_names].X), "counts", 40)
    assert list(split.train.var_names) == list(split.test.var_names) == list(whole.var_names[chosen])
    assert list(split.test.obs.columns) == list(LABELS)
    assert not {"unassigned", "lonely"} & set(split.train.obs["type"])
    train, test = (joined(part.obs, LABELS).value_counts().sort_index() for part in (split.train, split.test))
    assert (train == np.ceil((train + test) * 2 / 3)).all()
    assert len(split.notes) == 3


def test_a_seed_is_a_split(data):
    first, again, other = (data.split(Choice(cells=10), seed) for seed in (0, 0, 1))
    assert list(first.test.obs_names) == list(again.test.obs_names)
    assert list(first.test.obs_names) != list(other.test.obs_names)
    assert first.test.n_obs == 10


def test_what_cannot_be_compared_is_refused(data, tmp_path):
    cells = ad.read_h5ad(data.path)
    cells.X = cells.X.log1p()
    cells.write_h5ad(tmp_path / "log.h5ad")
    with pytest.raises(InputError, match="raw counts"):
        DataSet(tmp_path / "log.h5ad", LABELS).split(Choice(), 0)
    with pytest.raises(InputError, match="no such file"):
        DataSet(tmp_path / "none.h5ad", LABELS).digest()
    with pytest.raises(InputError, match="no cells are left"):
        data.split(Choice(leave_out=("ctrl", "stim")), 0)


@pytest.mark.parametrize(
    ("text", "path", "labels"),
    [
        ("a/b.h5ad", "a/b.h5ad", ("cell_type",)),
        ("b.h5ad:x, y", "b.h5ad", ("x", "y")),
        ("C:/b.h5ad", "C:/b.h5ad", ("cell_type",)),
    ],
)
def test_a_file_names_its_columns(text, path, labels):
    data = DataSet.parse(text, ["cell_type"])
    assert (data.path.as_posix(), data.labels) == (path, labels)


# the peers


def correlation(cells):
    """Return the correlation of genes 0 and 1 per type."""
    X = np.log1p(cells.X.toarray())
    return [np.corrcoef(X[(cells.obs["type"] == name).to_numpy(), :2].T)[0, 1] for name in ("a", "b")]


@pytest.mark.parametrize(("peer", "binds"), [(IndependentGenes(), False), (PcaGaussian(), True)])
def test_baselines_keep_what_they_say(peer, binds):
    train = bound_genes()
    wanted = pd.DataFrame({"type": ["b"] * 900 + ["a"] * 1100}, index=[f"cell-{i}" for i in range(2000)])
    fitted = peer.fit(train, ["type"], 1.0, 0)
    cells = fitted.generate(wanted, 0)
    assert cells.obs["type"].tolist() == wanted["type"].tolist()
    assert list(cells.var_names) == list(train.var_names)
    assert (cells.X.data == np.rint(cells.X.data)).all()
    assert cells.X.min() >= 0
    for name in ("a", "b"):
        real, made = (np.log1p(x[(x.obs["type"] == name).to_numpy()].X.toarray()) for x in (train, cells))
        np.testing.assert_allclose(made.mean(0), real.mean(0), atol=0.08)
        np.testing.assert_allclose(made.std(0), real.std(0), rtol=0.2)
    assert all(r > 0.9 for r in correlation(train))
    assert all(r > 0.9 if binds else abs(r) < 0.15 for r in correlation(cells))
    assert (fitted.generate(wanted, 0).X != cells.X).nnz == 0
    assert (fitted.generate(wanted, 1).X != cells.X).nnz > 0


def test_independent_genes_take_counts_of_their_label():
    train = bound_genes(40)
    cells = IndependentGenes().fit(train, ["type"], 1.0, 0).generate(train.obs, 0)
    for name in ("a", "b"):
        real, made = (x.X.toarray()[(x.obs["type"] == name).to_numpy()] for x in (train, cells))
        assert all(set(made[:, gene]) <= set(real[:, gene]) for gene in range(train.n_vars))


@pytest.fixture(scope="module")
def dit(split):
    return Diffusion("dit", "", "dit").fit(split.train, LABELS, 0.003, 0)


def test_diffusion_conditions_on_the_joined_labels(dit, split):
    assert set(dit.generator.preprocessor.labels.categories[0]) == set(joined(split.train.obs, LABELS))
    cells = dit.generate(split.test.obs[:6], 0)
    assert cells.obs.equals(split.test.obs[:6])
    assert list(cells.var_names) == list(split.train.var_names)
    assert dit.facts["steps"] > 0
    assert dit.parameters > 1e5


def test_a_run_knows_its_denoiser(dit, tmp_path):
    """A model saved with black-box blocks is loaded with them. Otherwise `dit` equals the preset `small`."""
    dit.generator.save(tmp_path / "run")
    loaded = wbdit.load(tmp_path / "run")
    assert type(dit.generator.model.denoiser) is type(loaded.model.denoiser) is DiT
    assert (loaded.generate(3, calls=2).X != dit.generator.generate(3, calls=2).X).nnz == 0
    assert replace(Preset.from_name("dit"), denoiser="wbdit") == Preset.from_name("small")


def test_training_cells_are_redrawn_in_turn():
    """No training cell is drawn twice before all cells of its label are drawn once."""
    rows = {"a": np.array([3, 5, 8]), "b": np.array([0])}
    wanted = pd.Series(["a", "b"] * 5)
    donors = _Vae.donors(SimpleNamespace(rows=rows), wanted, 0)
    assert sorted(np.bincount(donors[::2], minlength=9)[[3, 5, 8]]) == [1, 2, 2]
    assert set(donors[1::2]) == {0}


@pytest.mark.parametrize("name", ["scvi-posterior", "scvi-prior"])
def test_scvi(name, split):
    pytest.importorskip("scvi")
    fitted = PEERS[name].fit(split.train, LABELS, 0.03, 0)
    wanted = split.test.obs
    cells = fitted.generate(wanted, 0)
    assert cells.obs.equals(wanted)
    assert (cells.X.data == np.rint(cells.X.data)).all()
    assert fitted.parameters > 1000
    assert 0 <= fitted.facts.get("best_epoch", 0) <= fitted.facts["epochs"]
    assert fitted.facts["epochs"] >= 1
    assert (fitted.generate(wanted, 0).X != cells.X).nnz == 0
    # library sizes equal those of the training cells, up to the sampling noise of the counts
    totals = [np.asarray(x.X.sum(1)).mean() for x in (cells, split.train)]
    assert 0.8 < totals[0] / totals[1] < 1.25


def test_scdesigner():
    pytest.importorskip("scdesigner")
    train = bound_genes(1200, ("a", "b", "b"))
    # the labels' frequencies are reversed in the request, and one label is missing from the second one
    wanted = pd.DataFrame({"type": ["a"] * 400 + ["b"] * 200}, index=[f"cell-{i}" for i in range(600)])
    fitted = PEERS["scdesigner"].fit(train, ["type"], 0.05, 0)
    cells = fitted.generate(wanted, 0)
    assert cells.obs.equals(wanted)
    assert list(cells.var_names) == list(train.var_names)
    assert (cells.X.data == np.rint(cells.X.data)).all()
    assert cells.X.min() >= 0
    for name in ("a", "b"):
        real, made = (x[(x.obs["type"] == name).to_numpy()].X.toarray().mean(0) for x in (train, cells))
        np.testing.assert_allclose(made, real, rtol=0.2)
    assert all(r > 0.6 for r in correlation(cells))
    assert (fitted.generate(wanted, 0).X != cells.X).nnz == 0
    assert (fitted.generate(wanted, 1).X != cells.X).nnz > 0
    only = fitted.generate(wanted[:400], 0).X.toarray().mean(0)
    np.testing.assert_allclose(only, cells[:400].X.toarray().mean(0), rtol=0.2)
    assert fitted.facts["epochs"] >= 1
    assert fitted.parameters > 8 * 3


def test_indicators_follow_the_names_they_are_given():
    table = indicators(pd.Series(["b", "a", "b"], index=["x", "y", "z"]), ["a", "b", "c"])
    assert table.to_numpy().tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0]]
    assert list(table.index) == ["x", "y", "z"]


def test_genes_in_random_order_come_back_in_the_original_order():
    seen = []

    class Watched(IndependentGenes):
        def fit(self, train, *rest):
            seen.append(list(train.var_names))
            return super().fit(train, *rest)

    train = bound_genes()
    train.X = sp.csr_matrix(np.tile(np.arange(8, dtype=np.float32), (train.n_obs, 1)))  # the count names the gene
    peers = [Reordered(Watched(), number) for number in (1, 2, 2)]
    for peer in peers:
        cells = peer.fit(train, ["type"], 1.0, 0).generate(train.obs, 0)
        assert list(cells.var_names) == list(train.var_names)
        assert (cells.X.toarray() == np.arange(8)).all()
    assert seen[0] != seen[1] == seen[2] != list(train.var_names)
    assert sorted(seen[0]) == sorted(train.var_names)
    assert peers[0].settings != peers[1].settings


def test_gene_orders_run_only_by_name():
    assert set(ORDERS) == {f"wbdit-order-{number}" for number in (1, 2, 3)}
    assert not set(ORDERS) & set(DEFAULT)
    assert "scdesigner" in DEFAULT


@pytest.mark.parametrize(("name", "package"), [("scvi-prior", "scvi-tools"), ("scdesigner", "scdesigner")])
def test_a_missing_package_is_one_line_that_says_how_to_install_it(data, tmp_path, name, package, monkeypatch):
    monkeypatch.setattr("bench.quality.peers.__main__.find_spec", lambda module: None)
    result = CliRunner().invoke(main, [str(data.path), "--peer", name, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert package in result.output
    assert "wbdit[peers]" in result.output


# kept runs, and the table


class Counted(IndependentGenes):
    fits = 0

    def fit(self, *arguments):
        self.fits += 1
        return super().fit(*arguments)


@pytest.fixture
def no_scores(monkeypatch):
    """Replace the evaluation by fixed scores, to save time."""
    scores = {"metrics": {"w1": {"value": 2.0, "floor": 1.0}}, "n": 20}
    monkeypatch.setattr(runs, "evaluate", lambda *sets, **options: SimpleNamespace(to_dict=lambda: scores))


def test_what_is_kept_is_not_done_again(data, tmp_path, no_scores):
    peer, plan = Counted(), Plan(Choice(), 1.0, tmp_path)
    first = Run(data, peer, 0, plan).result(print)
    assert Run(data, peer, 0, plan).result(print) == first
    assert peer.fits == 1
    for run in (Run(data, peer, 1, plan), Run(data, peer, 0, Plan(Choice(), 2.0, tmp_path))):
        assert run.result(print, kept_only=True) is None
        run.result(print)
    assert peer.fits == 3
    Run(data, peer, 0, plan).result(print, again=True)
    assert peer.fits == 4


def test_kept_cells_are_scored_anew_for_a_new_metric(data, tmp_path, no_scores, monkeypatch):
    peer, plan = Counted(), Plan(Choice(), 1.0, tmp_path)
    Run(data, peer, 0, plan).result(print)
    monkeypatch.setattr(runs, "METRICS", {**runs.METRICS, "new": None})
    Run(data, peer, 0, plan).result(print)
    assert peer.fits == 1
    assert len(list(tmp_path.rglob("*.scores-*.json"))) == 2


def test_cells_can_be_scored_later(data, tmp_path, no_scores):
    peer, plan = Counted(), Plan(Choice(), 1.0, tmp_path)
    run = Run(data, peer, 0, plan)
    assert run.result(print, score=False) is None
    assert run.cells.exists()
    assert not list(tmp_path.rglob("*.scores-*.json"))
    assert run.result(print, score=False) is None
    assert run.result(print)["scores"]["n"] == 20
    assert peer.fits == 1
    assert run.result(print, again=True, score=False) is None
    assert not list(tmp_path.rglob("*.scores-*.json"))  # they were those of the earlier cells


def test_a_crash_costs_one_run(data, tmp_path, no_scores, monkeypatch):
    broken = Counted()
    monkeypatch.setattr(broken, "fit", lambda *arguments: 1 / 0)
    broken.name = "broken"
    plan = Plan(Choice(), 1.0, tmp_path)
    assert compare([Run(data, one, 0, plan) for one in (broken, Counted())], tmp_path, False, False) == [
        "broken on made, seed 0"
    ]
    assert "| independent genes |" in (tmp_path / "table.md").read_text()


def test_the_table(data, tmp_path, monkeypatch):
    """Real scores: one floor per metric, per-type scores by the first label column, and times."""
    monkeypatch.setattr(distances, "forest_votes", partial(distances.forest_votes, n_trees=25))
    results = [Run(data, peer, 0, Plan(Choice(genes=30), 1.0, tmp_path)).result(print) for peer in (PcaGaussian(),)]
    assert set(results[0]["scores"]["per_type"]) <= {"B", "NK", "T"}
    other = {**results[0], "settings": {**results[0]["settings"], "seed": 1}}
    other["scores"] = {**other["scores"], "metrics": {"w1": {"value": 9.0, "floor": 5.0}}}
    lines = markdown([*results, other]).splitlines()
    assert lines[0] == "### made"
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines if "|" in line
    }
    w1 = results[0]["scores"]["metrics"]["w1"]
    mean, spread = (w1["value"] + 9) / 2, abs(w1["value"] - 9) / 2**0.5
    assert rows["`w1`"][1] == f"{mean:.2f} ± {spread:.2f}"
    assert rows["`w2`"] == ["", ""]  # missing for one seed
    assert rows["measure"] == ["floor", "PCA, Gaussian"]
    assert {"training, s", "generating, s", "parameters"} <= rows.keys()


def test_the_first_lines_name_where_wbdit_is_behind():
    """Behind by more than noise; as close as the floor, or closer, is not ahead of it."""

    def result(peer, seed, scc, w1):
        metrics = {"scc": {"value": scc, "floor": 0.98}, "w1": {"value": w1, "floor": 5.0}}
        facts = {"seconds_to_train": 1.0, "seconds_to_generate": 1.0, "parameters": 1, "commit": "c"}
        return {
            "settings": {"peer": peer, "seed": seed, "data": "d", "labels": ["type"], "minutes": 1.0},
            "title": peer,
            "about": {"name": "made", "n_train": 9, "n_test": 9, "n_genes": 3, "notes": []},
            "facts": {**facts, "machine": {"threads": 1, "kernels": "avx2"}},
            "scores": {"n": 9, "metrics": metrics},
        }

    noise = (0.0, 0.001, -0.001)
    results = [result("wbdit", seed, 0.90 + noise[seed], 4.9 + noise[seed]) for seed in range(3)]
    results += [result("good", seed, 0.95, 4.0) for seed in range(3)]
    results += [result("bad", seed, 0.80, 6.0) for seed in range(3)]
    lines = markdown(results).splitlines()
    assert "- wbdit is behind good: `scc`" in lines
    assert "- wbdit is behind bad: in no measure" in lines
    assert not [line for line in markdown(results[:4]).splitlines() if "behind" in line]  # one seed in common


# the figure of the remaining differences


def test_what_is_left_is_nothing_between_a_set_and_itself(split):
    twice = {"real": split.test, residual.TRAINING: split.train, "the same": split.test}
    sets = align(twice, label="type", n_genes=40)
    types = ["B", "NK", "T"]
    assert residual.fold_changes(sets, "the same", types) == pytest.approx(np.ones(3))
    assert residual.detected(sets, "the same", types) == pytest.approx(np.ones(3))


def test_weaker_fold_changes_and_copies_are_seen():
    cells = bound_genes()
    cells.X = cells.X.toarray()
    cells.X[1::2, 2:5] *= 4  # in type b
    weak = cells.copy()
    weak.X[1::4] = cells.X[0::4]  # half of the cells labeled b are cells of type a
    sets = align({"real": cells, residual.TRAINING: cells[:300], "weak": weak}, label="type", n_genes=8)
    assert (residual.fold_changes(sets, "weak", ["a", "b"]) < 0.7).all()
    assert residual.spread(sets, "weak", ["a", "b"])[1] > 1.2  # label b now mixes two types
    near = residual.nearness(sets, ["weak"], 0)
    assert near["weak"][0] > 0.4  # half of its cells are training cells


@pytest.mark.parametrize(
    ("out", "needle"), [("left.svg", "run make peers with the same data"), ("left", "ends in .svg or .png")]
)
def test_a_picture_that_cannot_be_drawn_is_one_line_that_says_what_to_do(data, tmp_path, out, needle):
    args = [f"{data.path}:type", "--kept", str(tmp_path / "kept"), "--out", str(tmp_path / out)]
    result = CliRunner().invoke(residual.main, args)
    assert result.exit_code == 2
    assert needle in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / out).exists()
