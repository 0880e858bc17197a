"""Several label columns at once: embedded, dropped, counted, guided by a weight each, mixed between two ends."""

import warnings
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
import torch
from helpers import exit_code, make_cells, relative_error
from torch.nn import functional as F

import wbdit
from wbdit import InputError, WBDiT, cli, samplers
from wbdit.data.labels import Labels
from wbdit.data.preprocessor import Preprocessor
from wbdit.nn.embeddings import LabelEmbedder
from wbdit.request import read_request
from wbdit.samplers import GuidedModel

SMALL = {"input_size": 12, "patch_size": 4, "hidden_size": 8, "depth": 2, "num_heads": 2}
COLUMNS = ["type", "condition"]


def two_columns(n=120):
    """Return cells of three types, one with a separator in its name, under two conditions: no T/reg under stim."""
    cells = make_cells(n, 30, types=("B", "NK", "T/reg"))
    code = np.arange(n)
    stim = (code % 2 == 1) & (code % 3 != 2)
    cells.obs["condition"] = np.where(stim, "stim", "ctrl")
    counts = cells.X.toarray()
    counts[stim, :5] += 20  # what the stimulus does
    cells.X = counts
    return cells


CELLS = two_columns()


@pytest.fixture(scope="module")
def generator():
    return wbdit.fit(CELLS, label=COLUMNS, steps=100, progress=False)


def stirred(num_classes, seed=0, **settings):
    torch.manual_seed(seed)
    model = WBDiT(**SMALL, num_classes=num_classes, **settings).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


# the model


def test_one_column_is_as_it_was():
    one, listed = stirred(3), stirred([3])
    assert one.state_dict().keys() == listed.state_dict().keys()
    assert one.y_embedder.embedding_table.weight.shape == (4, 8)
    x, t, y = torch.randn(5, 1, 12), torch.arange(5), torch.tensor([0, 1, 2, 3, 0])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(one(x, t, y), one(x, t, y[:, None]))
            assert torch.equal(one(x, t, y), listed(x, t, y))
    embed = LabelEmbedder([3], 8, 0.5)
    torch.manual_seed(1)
    dropped = embed.train()(y, 5)
    torch.manual_seed(1)
    drop = torch.rand(5) < 0.5  # one number a sample
    assert torch.equal(dropped, embed.eval()(torch.where(drop, 3, y), 5))


def test_the_vectors_of_the_columns_are_summed():
    embed = LabelEmbedder([3, 2], 8, 0.0)
    first, second = embed.embedding_table.weight[:4], embed.embedding_table.weight[4:]
    y = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    torch.testing.assert_close(
        embed(y, 12), F.one_hot(y[:, 0]).float() @ first + F.one_hot(y[:, 1]).float() @ second, rtol=0, atol=1e-7
    )
    torch.testing.assert_close(embed(None, 2), (first[3] + second[2]).expand(2, -1))
    with pytest.raises(IndexError):
        embed(torch.tensor([[4, 0]]), 1)  # not the second column's first label


def test_columns_are_dropped_one_by_one_and_together():
    p, n = 0.3, 40_000
    embed = LabelEmbedder([1, 1, 1], 3, p).train()
    with torch.no_grad():  # each column shows in a number of its own whether it is null
        embed.embedding_table.weight.copy_(torch.eye(3).repeat_interleave(2, 0) * torch.tensor([0.0, 1.0] * 3)[:, None])
    torch.manual_seed(0)
    null = embed(torch.zeros(n, 3, dtype=torch.long), n) == 1
    alone, both = 1 - (1 - p) ** 2, p + (1 - p) * p**2
    assert null.double().mean(0).tolist() == pytest.approx(3 * [alone], abs=0.015)
    assert (null[:, 0] & null[:, 2]).double().mean() == pytest.approx(both, abs=0.015)
    assert null.all(1).double().mean() == pytest.approx(p + (1 - p) * p**3, abs=0.015)


def test_a_combination_is_computed_once(monkeypatch):
    model, computed, condition = stirred([3, 2]), [], WBDiT._condition

    def listed(self, t, y):
        computed.append(list(zip(t.tolist(), map(tuple, y.tolist()), strict=True)))
        return condition(self, t, y)

    monkeypatch.setattr(WBDiT, "_condition", listed)
    x, t = torch.randn(5, 1, 12), torch.tensor([7])
    y = torch.tensor([[0, 1], [2, 0], [0, 1], [3, 2], [2, 0]])
    with torch.no_grad():
        out = model(x, t.expand(5), y)
        assert computed == [[(7, (0, 1)), (7, (2, 0)), (7, (3, 2))]]
        assert torch.equal(model(x, t.expand(5), y), out)
        parts = [stirred([3, 2])(x[[i]], t, y[[i]]) for i in range(5)]
        mixed = model(x, t.expand(5), model.embed_labels(y))
    assert relative_error(torch.cat(parts), out) < 1e-5
    assert relative_error(mixed, out) < 1e-6
    assert [len(rows) for rows in computed] == [3, 1, 1, 1, 1, 1, 5]  # vectors are not looked up


@pytest.mark.parametrize("num_classes", [[1, 1], [3, 2], [4]])
def test_one_timestep_for_all(monkeypatch, num_classes):
    """A GPU's way: a row for each combination that can be, where these are fewer than the samples."""
    monkeypatch.setattr("wbdit.nn.conditioning.may_cache", lambda *weights: False)
    model, n = stirred(num_classes), 9
    y = torch.stack([torch.randint(k + 1, (n,)) for k in num_classes], 1)
    x, t = torch.randn(n, 1, 12), torch.tensor([123])
    with torch.no_grad():
        for given in (y, None, model.embed_labels(y)):
            assert relative_error(model(x, t.expand(n), given), model(x, t.repeat(n), given)) < 1e-6
        assert relative_error(model(x, t.expand(n), y), stirred(num_classes)(x, t.repeat(n), y.roll(1, 0))) > 1e-4


@pytest.mark.parametrize(
    ("num_classes", "y", "words"),
    [
        ([3, 2], torch.zeros(4, dtype=torch.long), r"one label a sample is \(4, 2\)"),
        ([3, 2], torch.zeros(4, 3, dtype=torch.long), r"one label a sample is \(4, 2\)"),
        (3, torch.zeros(4, 2, dtype=torch.long), r"one label a sample is \(4,\)"),
        (3, torch.zeros(4, 2), r"one vector a sample is \(4, 8\)"),
    ],
)
def test_labels_that_do_not_fit(num_classes, y, words):
    with pytest.raises(ValueError, match=words):
        stirred(num_classes)(torch.zeros(4, 1, 12), torch.ones(4), y)
    with pytest.raises(ValueError, match="at least one"):
        WBDiT(**SMALL, num_classes=[3, 0])


# guidance


@pytest.fixture
def asked():
    """Return a model of three columns, and the labels of each call it was given."""
    model, calls = stirred([3, 2, 2]), []

    class Listening:
        prediction, num_classes, embed_labels = "epsilon", model.num_classes, staticmethod(model.embed_labels)

        def __call__(self, x, t, y):
            calls.append(y)
            return model(x, t, y)

    return Listening(), calls


X, T = torch.randn(4, 1, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([300]).expand(4)
Y = torch.tensor([[0, 1, 0], [2, 0, 1], [1, 1, 1], [0, 0, 0]])
NULL = torch.tensor([3, 2, 2])


@torch.no_grad()
def given(model, *columns):
    """Ask the model with the labels of some columns alone."""
    keep = torch.tensor([column in columns for column in range(3)])
    return model(X, T, torch.where(keep, Y, NULL))


@torch.no_grad()
def guided(model, weight):
    return GuidedModel(model, Y, weight)(X, T)


@pytest.mark.parametrize("weight", [1, 1.0, [1.0, 1.0, 1.0]])
def test_weights_of_one_are_the_model_at_one_call(asked, weight):
    model, calls = asked
    assert torch.equal(guided(model, weight), given(model, 0, 1, 2))
    assert torch.equal(calls[0], Y)


@pytest.mark.parametrize("weight", [2.5, [2.5, 2.5, 2.5], 0.3])
def test_one_weight_for_all_is_classifier_free_guidance(asked, weight):
    model, calls = asked
    w = weight if isinstance(weight, float) else weight[0]
    null, joint = given(model), given(model, 0, 1, 2)
    calls.clear()
    assert relative_error(guided(model, weight), null + w * (joint - null)) < 1e-6
    assert [len(y) for y in calls] == [8]


@pytest.mark.parametrize("w", [3.0, 0.5, -1.0])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_weight_on_one_column(asked, w, column):
    model, calls = asked
    weights = [1.0, 1.0, 1.0]
    weights[column] = w
    joint, without = given(model, 0, 1, 2), given(model, *{0, 1, 2} - {column})
    calls.clear()
    assert relative_error(guided(model, weights), joint + (w - 1) * (joint - without)) < 1e-5
    assert [len(y) for y in calls] == [8]


def test_a_weight_each(asked):
    model, calls = asked
    f = [given(model), given(model, 2), given(model, 0, 2), given(model, 0, 1, 2)]
    expected = f[0] + 1.5 * (f[1] - f[0]) + 2 * (f[2] - f[1]) + 4 * (f[3] - f[2])
    calls.clear()
    assert relative_error(guided(model, [2.0, 4.0, 1.5]), expected) < 1e-5
    assert [len(y) for y in calls] == [16]


@pytest.mark.parametrize(("weights", "columns"), [([1.0, 0.0, 1.0], (0, 2)), ([0.0, 0.0, 0.0], ())])
def test_a_weight_of_zero_leaves_a_column_open(asked, weights, columns):
    model, calls = asked
    assert torch.equal(guided(model, weights), given(model, *columns))
    assert len(calls[0]) == 4


def test_weights_that_do_not_fit(asked):
    with pytest.raises(ValueError, match="2 guidance weights for 3 columns"):
        GuidedModel(asked[0], Y, [1.0, 2.0])


def test_guidance_drives_its_column_apart(generator):
    def effects(guidance):
        cells = generator.generate(counts={"B/*": 40, "NK/*": 40}, steps=15, guidance=guidance).to_memory()
        X, obs = cells.layers["lognorm"].toarray(), cells.obs
        between = [[X[obs[c] == a].mean(0) - X[obs[c] == b].mean(0)] for c, a, b in BOTH]
        return [np.linalg.norm(difference) for difference in between]

    BOTH = [("type", "B", "NK"), ("condition", "ctrl", "stim")]
    plain, by_condition, by_type = (effects(w) for w in (1.0, {"condition": 3.0}, {"type": 3.0}))
    assert by_condition[1] > 1.1 * plain[1]
    assert by_type[0] > 1.1 * plain[0]
    assert by_condition[1] / plain[1] > by_condition[0] / plain[0]


# labels


def labels_of(sizes, columns=("type", "condition"), categories=(("B", "NK", "T/reg"), ("ctrl", "stim"))):
    """Return labels whose combinations have such numbers of cells, ``(3, 2)``."""
    sizes = np.asarray(sizes)
    combinations = np.argwhere(sizes > 0)
    return Labels(tuple(columns), categories, combinations, sizes[tuple(combinations.T)])


LABELS = labels_of([[30, 10], [10, 50], [20, 0]])


def named(labels, codes):
    return [labels.name(row) for row in codes]


def test_labels_are_learned():
    labels = Labels.fit(CELLS, COLUMNS)
    table = CELLS.obs.groupby(COLUMNS).size()
    assert named(labels, labels.combinations) == ["/".join(key) for key in table.index]
    assert labels.sizes.tolist() == table.tolist()
    codes = labels.codes(CELLS)
    assert named(labels, codes) == list(CELLS.obs["type"] + "/" + CELLS.obs["condition"])
    assert (labels.combinations[labels.combination_index(codes)] == codes).all()
    assert labels.num_classes == [3, 2]
    assert labels.summary() == "3 x 2 labels, 5 of their 6 combinations"
    assert Labels.fit(CELLS, "type").num_classes == 3
    without = Labels.fit(CELLS, None)
    assert (without.num_classes, without.summary(), without.combinations.shape) == (0, "no labels", (1, 0))
    assert without.training_codes(7).shape == without.codes(CELLS)[:7].shape == (7, 0)
    assert without.unseen(without.training_codes(7)) == []


def test_the_joint_composition_is_reproduced():
    labels = Labels.fit(CELLS, COLUMNS)
    _, counts = np.unique(labels.training_codes(240), axis=0, return_counts=True)
    assert counts.tolist() == (2 * labels.sizes).tolist()  # the columns alone would allow T/reg under stim
    some = labels.codes(CELLS)[[0, 1, 1, 5, 5, 5]]
    kept = labels.codes_like(some, 12)
    assert np.unique(kept, axis=0, return_counts=True)[1].tolist() == [2, 4, 6]
    assert set(named(labels, kept)) == set(named(labels, some))


@pytest.mark.parametrize(
    ("counts", "cells"),
    [
        ({"NK/stim": 2, "B/ctrl": 1}, ["NK/stim", "NK/stim", "B/ctrl"]),
        ({("NK", "stim"): 1}, ["NK/stim"]),
        ({"T/reg/ctrl": 2}, ["T/reg/ctrl"] * 2),
        ({"T/reg/stim": 1}, ["T/reg/stim"]),
        ({"B/*": 4}, ["B/ctrl"] * 3 + ["B/stim"]),
        ({"*/stim": 6}, ["B/stim"] + ["NK/stim"] * 5),
        ({("*", "*"): 12}, ["B/ctrl"] * 3 + ["B/stim", "NK/ctrl"] + ["NK/stim"] * 5 + ["T/reg/ctrl"] * 2),
        ({"B/*": 0, "NK/ctrl": 1}, ["NK/ctrl"]),
    ],
    ids=str,
)
def test_counts(counts, cells):
    assert named(LABELS, LABELS.codes_from_counts(counts)) == cells


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NK", r"'NK' does not name a label in each of type/condition: write \*"),
        (("NK",), "does not name a label in each"),
        (("NK", "stim", "x"), "does not name a label in each"),
        ("NK/stimm", "unknown label 'stimm' in 'condition'.*ctrl, stim"),
        ("Mast/stim", "unknown label 'Mast' in 'type'.*B, NK, T/reg"),
        ("T/reg/stimm", "unknown label 'stimm' in 'condition'"),
        ("T/stim", "unknown label 'T' in 'type'"),
    ],
)
def test_counts_that_cannot_be_read(name, words):
    with pytest.raises(InputError, match=words):
        LABELS.codes_from_counts({name: 1})


def test_an_ambiguous_name_is_refused():
    labels = labels_of([[1, 1], [1, 1]], categories=(("a", "a/b"), ("b/c", "c")))
    with pytest.raises(InputError, match="more than one way.*tuple"):
        labels.codes_from_counts({"a/b/c": 1})
    assert named(labels, labels.codes_from_counts({("a/b", "c"): 1})) == ["a/b/c"]


def test_an_open_column_that_nothing_tells():
    labels = labels_of(
        np.ones((2, 2, 2)) - np.eye(2)[:, :, None], [*COLUMNS, "donor"], (("B", "NK"), ("c", "s"), ("1", "2"))
    )
    with pytest.raises(InputError, match="no training cell is 'B/c/\\*'"):
        labels.codes_from_counts({"B/c/*": 1})


def test_one_column_is_named_whole():
    labels = Labels.fit(CELLS, "type")
    assert named(labels, labels.codes_from_counts({"T/reg": 2, ("B",): 1, "*": 3})) == [
        "T/reg",
        "T/reg",
        "B",
        "B",
        "NK",
        "T/reg",
    ]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (["type", "donor"], "no column 'donor' in obs; the columns are: type, condition"),
        (["type", "type"], "'type' is named twice"),
    ],
)
def test_columns_that_cannot_be_learned(columns, words):
    with pytest.raises(InputError, match=words):
        Preprocessor.fit(CELLS, label=columns)


def test_library_sizes_are_those_of_the_combination_or_of_its_first_label():
    preprocessor = Preprocessor.fit(CELLS, label=COLUMNS, lognorm=True)
    totals, labels = np.asarray(CELLS.X.sum(1)).ravel(), preprocessor.labels
    u = np.linspace(0, 1, 41)
    for name, own in [
        ("NK/stim", (CELLS.obs["type"] == "NK") & (CELLS.obs["condition"] == "stim")),
        ("NK/ctrl", (CELLS.obs["type"] == "NK") & (CELLS.obs["condition"] == "ctrl")),
        ("T/reg/stim", CELLS.obs["type"] == "T/reg"),
    ]:
        drawn = preprocessor.draw_library(labels.codes_from_counts({name: 41}), u)
        np.testing.assert_allclose(drawn, np.quantile(totals[own], u))
    ends = labels.codes_from_counts({"B/ctrl": 5}), labels.codes_from_counts({"B/stim": 5})
    between = preprocessor.draw_library(ends[0], np.full(5, 0.5), ends[1], 0.25)
    own, other = (preprocessor.draw_library(codes, np.full(5, 0.5)) for codes in ends)
    np.testing.assert_allclose(between, 0.75 * own + 0.25 * other)


# cells


def same(a, b):
    return (a.X != b.X).nnz == 0


def test_like_gives_each_cell_its_labels(generator):
    like = CELLS[[5, 3, 1, 0]]
    cells = generator.generate(like=like, steps=2)
    for column in COLUMNS:
        assert list(cells.obs[column]) == list(like.obs[column])
    twice = generator.generate(8, like=like, steps=2).obs.groupby(COLUMNS, observed=True).size()
    assert twice.to_dict() == like.obs.groupby(COLUMNS).size().mul(2).to_dict()
    anew = generator.generate(60, steps=2).obs.groupby(COLUMNS, observed=True).size()
    assert anew.to_dict() == CELLS.obs.groupby(COLUMNS).size().floordiv(2).to_dict()


def test_what_travels_with_the_cells(generator, tmp_path):
    ends = {"guidance": {"condition": 2}, "toward": {"condition": "stim"}, "mix": 0.25}
    generator.generate(counts={"T/reg/ctrl": 2}, steps=2, **ends).write_h5ad(tmp_path / "cells.h5ad")
    cells = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert cells.obs.iloc[0].to_dict() == {
        **{"type": "T/reg", "condition": "ctrl", "type_toward": "T/reg", "condition_toward": "stim", "mix": 0.25}
    }
    assert list(cells.obs["condition"].cat.categories) == ["ctrl", "stim"]
    facts = cells.uns["wbdit"]
    assert list(facts["label"]) == COLUMNS
    assert list(facts["categories"]["condition"]) == ["ctrl", "stim"]
    assert facts["guidance"] == {"condition": 2.0}
    assert (facts["toward"], facts["mix"]) == ({"condition": "stim"}, 0.25)
    assert list(facts["unseen"]) == ["T/reg/stim"]


def test_a_combination_never_seen_is_tried_and_said(generator):
    said = []
    cells = generator.generate(counts={"T/reg/stim": 2, "B/stim": 1}, steps=2, say=said.append)
    assert cells.n_obs == 3
    assert len(said) == 1
    assert said[0].startswith("no training cell was T/reg/stim:")
    assert "unseen" not in generator.generate(5, steps=2, say=said.append).uns["wbdit"]
    assert len(said) == 1


@pytest.mark.parametrize("guidance", [1.0, {"type": 2.0, "condition": 3.0}])
def test_a_path_from_one_end_to_the_other(generator, guidance):
    how = {"steps": 8, "seed": 4, "guidance": guidance}

    def between(mix):
        return generator.generate(counts={"NK/ctrl": 12}, toward={"condition": "stim"}, mix=mix, **how)

    start, end = (generator.generate(counts={f"NK/{name}": 12}, **how) for name in ("ctrl", "stim"))
    assert same(between(0), start)
    assert same(between(1), end)
    path = [between(mix).layers["lognorm"].toarray() for mix in (0, 1e-6, 0.5, 0.5 + 1e-6, 1 - 1e-6, 1)]
    whole = np.linalg.norm(path[-1] - path[0])
    for near, there in ((0, 1), (2, 3), (4, 5)):  # a count at its threshold may turn
        assert np.linalg.norm(path[there] - path[near]) < 0.1 * whole
    for end in (0, -1):
        assert 0.1 * whole < np.linalg.norm(path[2] - path[end]) < whole


def test_a_path_is_continuous_before_it_is_counted():
    model = stirred([3, 2])
    y, toward = torch.tensor([[0, 0], [2, 0]]), torch.tensor([[0, 1], [1, 1]])
    x, schedule = torch.randn(2, 1, 12), wbdit.NoiseSchedule()
    path = samplers.timesteps(schedule, 5)

    def sample(mix):
        return samplers.ddim(
            GuidedModel(model, y, 1.5, toward=toward, mix=mix), x, schedule, path, eta=0, clamp_min=None
        )

    with torch.no_grad():
        ends = [
            samplers.ddim(GuidedModel(model, labels, 1.5), x, schedule, path, eta=0, clamp_min=None)
            for labels in (y, toward)
        ]
        halfway = model.embed_labels(y) / 2 + model.embed_labels(toward) / 2
        seen = GuidedModel(model, y, toward=toward, mix=0.5)(x, torch.tensor([9]).expand(2))
        assert relative_error(seen, model(x, torch.tensor([9, 9]), halfway)) < 1e-6
    assert torch.equal(sample(0), ends[0])
    assert torch.equal(sample(1), ends[1])
    whole = float((ends[1] - ends[0]).norm())
    for mix, step in ((0, 1e-4), (0.4999, 2e-4), (1, -1e-4)):
        assert float((sample(mix + step) - sample(mix)).norm()) < 0.01 * whole


def test_the_batch_size_does_not_change_the_cells(generator):
    how = {"steps": 4, "seed": 1, "guidance": {"condition": 2.0}, "toward": {"condition": "stim"}, "mix": 0.3}
    assert same(generator.generate(20, batch_size=7, **how), generator.generate(20, **how))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n": 2, "guidance": {"donor": 2.0}}, "'donor' is no label column of this run, which has: type, condition"),
        ({"n": 2, "guidance": {"type": float("nan")}}, "finite"),
        ({"n": 2, "toward": {"condition": "stim"}}, "together"),
        ({"n": 2, "mix": 0.5}, "together"),
        ({"n": 2, "toward": {"condition": "stim"}, "mix": 1.5}, "between 0 and 1"),
        ({"n": 2, "toward": {"condition": "stimm"}, "mix": 0.5}, "unknown label 'stimm' in 'condition'"),
        ({"n": 2, "toward": {"donor": "1"}, "mix": 0.5}, "no label column"),
    ],
)
def test_refused_requests(generator, arguments, words):
    with pytest.raises(InputError, match=words):
        generator.generate(steps=2, **arguments)


def test_cells_to_imitate_need_every_column(generator):
    like = ad.AnnData(obs=CELLS.obs[["type"]].copy())
    with pytest.raises(InputError, match="no column 'condition' in obs; the columns are: type"):
        generator.generate(like=like, steps=2)


# runs


def test_a_run_of_several_columns_is_saved_and_resumed(tmp_path):
    run = tmp_path / "run"
    made = wbdit.fit(CELLS, label=COLUMNS, steps=4, progress=False, out=run)
    loaded = wbdit.load(run)
    assert loaded.preprocessor.labels.columns == ("type", "condition")
    assert loaded.model.num_classes == (3, 2)
    assert same(loaded.generate(10, steps=2), made.generate(10, steps=2))
    assert wbdit.fit(CELLS, steps=6, progress=False, out=run, resume=True).config["trained"]["steps"] == 6


def test_a_column_called_as_the_mix_is():
    labels = replace(LABELS, columns=("mix", "condition"))
    with pytest.raises(InputError, match="called 'mix'"):
        read_request(labels, 3, toward={"condition": "stim"}, mix=0.5)


# commands


@pytest.fixture(scope="module")
def folder(generator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditions")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CELLS.write_h5ad(folder / "data.h5ad")
    generator.save(folder / "run")
    return folder


def test_train_with_two_columns(folder, tmp_path, capfd):
    label = ("--label", "type", "--label", "condition")
    assert exit_code("train", folder / "data.h5ad", *label, "--steps", 2, "--out", tmp_path / "run") == 0
    assert "120 cells, 30 genes, 3 x 2 labels, 5 of their 6 combinations on" in capfd.readouterr().err
    assert wbdit.load(tmp_path / "run").preprocessor.labels.columns == ("type", "condition")


def test_generate_by_both_columns(folder, tmp_path, capfd):
    out = tmp_path / "cells.h5ad"
    asked = ("--counts", "NK/*=3,T/reg/ctrl=2", "--toward", "condition=stim", "--mix", 0.5)
    weights = ("--guidance", "condition=3", "--guidance", "type=2")
    assert exit_code("generate", folder / "run", *asked, *weights, "--steps", 2, "--out", out) == 0
    assert "no training cell was T/reg/stim" in capfd.readouterr().err
    cells = ad.read_h5ad(out)
    said = cli._facts(cells.uns["wbdit"])
    assert (said["guidance"], said["toward"], said["mix"]) == ("condition=3.0, type=2.0", "condition=stim", "0.5")
    assert not {"genes", "categories", "label", "unseen"} & said.keys()
    assert list(cells.obs["type"]) == ["NK"] * 3 + ["T/reg"] * 2
    assert set(cells.obs["condition_toward"]) == {"stim"}
    assert cells.uns["wbdit"]["guidance"] == {"condition": 3.0, "type": 2.0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--guidance", "much"], "write it as 2, or as condition=3"),
        (["--guidance", "2", "--guidance", "condition=3"], "one number, or COLUMN=NUMBER"),
        (["--guidance", "2", "--guidance", "3"], "one number, or COLUMN=NUMBER"),
        (["--guidance", "donor=3"], "'donor' is no label column"),
        (["--toward", "stim", "--mix", "0.5"], "write it as condition=stim"),
        (["--mix", "0.5"], "together"),
    ],
    ids=str,
)
def test_mistakes(folder, tmp_path, capfd, arguments, words):
    assert exit_code("generate", folder / "run", "--n", 2, *arguments, "--out", tmp_path / "cells.h5ad") == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert words in line
