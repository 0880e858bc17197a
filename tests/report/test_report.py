"""The report: valid, complete and self-contained HTML, clear about bad scores, never partly written."""

import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from wbdit.errors import InputError
from wbdit.evaluation.classifiers import Giveaway
from wbdit.evaluation.evaluate import Evaluation
from wbdit.evaluation.figure_data import AlignedCells, FigureData
from wbdit.evaluation.registry import METRICS
from wbdit.evaluation.scores import Score
from wbdit.report import evaluation as report
from wbdit.report import figures
from wbdit.report.evaluation import write_picture, write_report
from wbdit.report.svg import scale_of

N, N_GENES = 40, 30
VOID = {"meta", "br", "img", "link", "input", "hr"}


def evaluation(*, labels=True, space="counts", off=1.0, omitted=()):
    """Return a synthetic evaluation whose values are ``off`` times as far from the best value as the floor."""
    rng = np.random.default_rng(0)
    kinds = np.array(["T & B <mixed>", "NK"])[rng.integers(0, 2, N)] if labels else None
    values = {name: np.log1p(rng.poisson(2.0, size=(N, N_GENES))) for name in ("real", "synthetic", "floor")}
    if space == "scaled":
        values = {name: each - each.mean() for name, each in values.items()}
    data = FigureData.of(
        {k: AlignedCells(v, kinds) for k, v in values.items()}, np.array([f"g{i}" for i in range(N_GENES)])
    )
    data.__dict__["layout"] = rng.normal(size=(2 * N, 2))  # in place of UMAP, which takes seconds to start
    scores = {}
    for name, metric in METRICS.items():
        floor = {0.5: 0.52, 1.0: 0.95}.get(metric.best, metric.best + 0.1)
        value = metric.best + (floor - metric.best) * off
        ends, floor_ends = (value - 1e-4, value + 1e-4), (floor - 1e-4, floor + 1e-4)
        scores[name] = Score(metric, (value, value), (floor, floor), N, (0, 1), (ends,) * 2, (floor_ends,) * 2)
    return Evaluation(
        scores={name: score for name, score in scores.items() if name not in omitted},
        per_type={"NK": {name: scores[name] for name in ("w1", "w2", "mmd_cfgen")}} if labels else {},
        omitted=dict.fromkeys(omitted, "for a reason"),
        notes=["a note with <angles> & an ampersand"],
        n=N,
        seeds=(0, 1),
        n_genes=N_GENES,
        n_shared_genes=50,
        space=space,
        floor="real training cells against real held-out cells",
        versions={"numpy": "1.2.3"},
        giveaways=[Giveaway("CD3D", 0.7, 1.0, 1.5)],
        figures=data,
    )


class Page(HTMLParser):
    """A parsed page: its tags, attributes and text, and the tags that do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.tags, self.words = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "made" / "on demand"
    path = write_report(evaluation(), out, title="Blood <1> & more", facts={"sampler": "unipc", "model hash": "abc123"})
    return out, path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"labels": False, "omitted": ("lfc_slope", "tstr")},
        {"space": "scaled", "omitted": ("zero_mae",)},
        {"off": 9.0},
    ],
    ids=["full", "no labels", "scaled", "bad"],
)
def test_the_page_is_well_formed(options):
    page = Page(report.render(evaluation(**options), title="t", facts={}))
    assert page.wrong == []
    assert page.open == []
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    refs = {attrs[key] for _, attrs in page.tags for key in ("aria-labelledby",) if key in attrs}
    assert refs <= set(ids)
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_the_page_needs_nothing_from_outside(written):
    _, text = written
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "url(" not in text
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        for key in ("src", "href", "srcset", "xlink:href"):
            assert attrs.get(key, "#").startswith(("#", "data:"))


def test_the_page_says_everything(written):
    _, text = written
    words = Page(text).text
    for name, metric in METRICS.items():
        assert f" {name} " in words
        assert metric.title in words
        assert metric.sentence in words
        assert not metric.elsewhere or f"also known as {'; '.join(metric.elsewhere)}" in words
    for phrase in (
        "n = 40 cells of each set, 30 genes, seeds 0, 1",
        "real training cells against real held-out cells",
        "These cells cannot be told from real cells",
        "distance alone does not measure privacy",
        "95% interval",
        "Memorization of training cells",
        "model hash abc123",
        "30 of 50 shared",
        "numpy 1.2.3",
    ):
        assert phrase in words, phrase


def test_what_users_write_is_escaped(written):
    _, text = written
    assert "<mixed>" not in text
    assert "<angles>" not in text
    words = Page(text).text
    assert "Blood <1> & more" in words
    assert "T & B <mixed>" in words


def test_bad_scores_get_a_bad_headline():
    words = Page(report.render(evaluation(off=9.0), title="t", facts={})).text
    assert "These cells differ clearly from real cells" in words
    assert "Different from real cells" in words
    assert "are like real cells" not in words


def test_left_out_metrics_and_their_reasons_are_shown():
    words = Page(report.render(evaluation(omitted=("tstr",)), title="t", facts={})).text
    assert "Left out: tstr (for a reason)" in words


def test_every_figure_has_an_alternative_text(written):
    page = Page(written[1])
    pictures = [attrs for tag, attrs in page.tags if tag == "svg" and "aria-hidden" not in attrs]
    assert len(pictures) == 3 + 2 + 3  # maps, types, gene panels
    assert all(attrs["role"] == "img" and len(attrs["aria-label"]) > 20 for attrs in pictures)


def test_metrics_json_round_trips(written):
    out, _ = written
    content = json.loads((out / "metrics.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert content["title"] == "Blood <1> & more"
    assert content["facts"] == {"sampler": "unipc", "model hash": "abc123"}
    assert set(content["metrics"]) == set(METRICS)
    assert {key: content[key] for key in evaluation().to_dict()} == json.loads(json.dumps(evaluation().to_dict()))


def test_nothing_is_left_behind_and_files_are_readable(written):
    out, _ = written
    assert sorted(os.listdir(out)) == ["metrics.json", "report.html"]
    assert all(os.stat(out / name).st_mode & 0o044 == 0o044 for name in os.listdir(out))


def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for write in (
        lambda: write_report(evaluation(), tmp_path / "file" / "out", title="t"),
        lambda: write_picture(evaluation(), tmp_path / "file" / "picture.png"),
    ):
        with pytest.raises(InputError, match="cannot write"):
            write()


def test_an_old_report_is_replaced(tmp_path):
    for title in ("first", "second"):
        write_report(evaluation(), tmp_path, title=title)
    assert json.loads((tmp_path / "metrics.json").read_text())["title"] == "second"
    assert sorted(os.listdir(tmp_path)) == ["metrics.json", "report.html"]


@pytest.mark.parametrize(
    "options",
    [{}, {"labels": False, "omitted": ("lfc_slope", "tstr")}, {"space": "scaled", "omitted": ("zero_mae",)}],
    ids=["full", "no labels", "scaled"],
)
def test_the_picture_is_a_png_of_some_size(tmp_path, options):
    path = write_picture(evaluation(**options), tmp_path / "docs" / "picture.png")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20]) >= 1600
    assert os.listdir(path.parent) == ["picture.png"]


def test_gene_panels_put_equal_values_on_the_diagonal():
    values = dict.fromkeys(("real", "synthetic", "floor"), np.array([0.01, 0.1, 1.0, 5.0]))
    svg = figures.gene_panel(values, "mean", log=True)
    drawn = re.search(r'class="dot synthetic" d="([^"]+)"', svg)
    points = np.array([[float(part) for part in step.split()] for step in re.findall(r"M([\d. ]+)h0", drawn[1])])
    along = (points[:, 0] - figures.LEFT) / (figures.WIDTH - figures.LEFT - figures.RIGHT)
    up = (figures.HEIGHT - figures.BOTTOM - points[:, 1]) / (figures.HEIGHT - figures.TOP - figures.BOTTOM)
    np.testing.assert_allclose(along, up, atol=0.003)
    assert (np.diff(along) > 0).all()


@pytest.mark.parametrize(
    ("values", "log", "low", "ticks"),
    [
        (np.array([0.0, 0.25, 1.0]), False, 0.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (np.array([0.02, 0.5, 8.0]), True, 0.01, [0.01, 0.1, 1.0]),
        (np.array([-2.0, 3.0]), True, -2.0, [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]),  # scaled values have no log axis
        (np.array([0.0, 0.0]), True, 0.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_scales(values, log, low, ticks):
    scale = scale_of(values, log=log)
    assert scale.low == pytest.approx(low)
    assert scale.ticks == pytest.approx(ticks)
    placed = scale.place(values)
    assert placed.min() >= 0
    assert placed.max() <= 1


def test_numbers_on_the_map_stay_apart():
    data = evaluation().figures
    centers = figures.type_centers(data, np.full((2 * N, 2), 500.0) + np.arange(2 * N)[:, None] % 3)
    assert np.linalg.norm(centers[0] - centers[1]) > figures.NUMBER_SIZE / 2


@pytest.mark.slow
def test_the_map_is_the_same_twice_and_keeps_groups_together():
    rng = np.random.default_rng(0)
    groups = np.array(["a", "b"])[np.arange(40) % 2]
    values = rng.normal(size=(40, 12)) + 8.0 * (groups == "b")[:, None]
    layouts = [
        FigureData.of(dict.fromkeys(("real", "synthetic", "floor"), AlignedCells(values, groups)), np.arange(12)).layout
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*layouts)
    both = np.concatenate([groups, groups])
    centers = [layouts[0][both == name].mean(axis=0) for name in ("a", "b")]
    within = max(layouts[0][both == name].std() for name in ("a", "b"))
    assert layouts[0].shape == (80, 2)
    assert np.linalg.norm(centers[0] - centers[1]) > within
