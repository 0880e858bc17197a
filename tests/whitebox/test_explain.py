"""The readout of a run: its numbers, findings, files and input errors."""

import dataclasses
import json
import time
from html.parser import HTMLParser
from xml.etree import ElementTree

import anndata as ad
import numpy as np
import pytest
from helpers import make_cells

import wbdit
from wbdit.network_inputs import noise_levels
from wbdit.report.explain import write_explanation
from wbdit.training.config import PRESETS
from wbdit.whitebox.explain import explain
from wbdit.whitebox.findings import findings
from wbdit.whitebox.gene_loadings import Hit


@pytest.fixture(scope="module")
def cells():
    return make_cells(120, 80)


@pytest.fixture(scope="module")
def run(cells):
    return wbdit.fit(cells, label="type", steps=30, progress=False)


@pytest.fixture(scope="module")
def readout(run, cells):
    return explain(run, cells, cells=60)


def test_what_is_looked_at(readout, run):
    assert readout.n == 60
    assert readout.timesteps == tuple(noise_levels(run.schedule, run.model.stop))
    assert readout.timesteps[0] == 999
    assert readout.timesteps[-1] == run.model.stop == 500
    assert all(values.shape == (8, 3) for values in readout.means.values())
    assert all(np.isfinite(values).all() for values in readout.means.values())
    assert (readout.means["rate_before"] <= readout.largest_rate).all()
    assert all(((values >= 0) & (values <= 1)).all() for values in readout.lowered.values())
    assert [hit.type for hit in readout.hits["head"]] == ["B", "NK", "T"]


def test_the_same_seed_gives_the_same_readout(readout, run, cells):
    again, other = explain(run, cells, cells=60), explain(run, cells, cells=60, seed=1)
    assert again.to_dict() == readout.to_dict()
    assert other.to_dict()["means"] != readout.to_dict()["means"]


def test_a_batch_of_cells_is_measured_as_all_are(run, cells, monkeypatch):
    monkeypatch.setattr("wbdit.whitebox.explain.BATCH", 7)
    small = explain(run, cells, cells=30).means
    monkeypatch.setattr("wbdit.whitebox.explain.BATCH", 100)
    for name, values in explain(run, cells, cells=30).means.items():
        np.testing.assert_allclose(small[name], values, rtol=1e-4)


def test_without_labels_there_are_no_types(cells):
    readout = explain(wbdit.fit(cells, steps=2, progress=False), cells, cells=20)
    assert readout.labels is None
    assert readout.hits == {}
    assert len(findings(readout)) == 6


def test_a_run_of_continuous_values(cells):
    lognorm = cells.copy()
    lognorm.X = np.log1p(1e4 * cells.X.toarray() / cells.X.sum(1).A1[:, None])
    run = wbdit.fit(lognorm, label="type", steps=2, progress=False)
    readout = explain(run, lognorm, cells=20)
    assert readout.timesteps[-1] == 50
    assert readout.hits["atom"]


def test_findings_follow_the_figures(readout):
    def verdicts(means):
        return findings(dataclasses.replace(readout, means=means))

    means = readout.means
    ones = np.ones_like(means["rate_before"])
    falling = ones * [3.0, 2.0, 1.0]
    yes = {**means, "rate_before": 4 * ones, "rate_after": falling, "non_zero": falling / 4, "margin": ones}
    yes |= {"fit_before": ones, "size_before": ones, "fit_after": 0.5 * ones, "size_after": 0.5 * ones}
    answers = verdicts(yes)
    assert [answer.verdict for answer in answers[:5]] == ["yes"] * 5
    assert "every noise level" in answers[0].answer
    no = {**yes, "rate_before": ones / 2, "rate_after": ones * [1.0, 2.0, 3.0], "non_zero": ones * [0.1, 0.2, 0.3]}
    no |= {"fit_after": 2 * ones, "margin": 50 * ones}
    answers = verdicts(no)
    assert [answer.verdict for answer in answers[:5]] == ["no"] * 5
    assert "at no noise level" in answers[1].answer
    partly = {**yes, "rate_after": np.where(np.arange(8)[:, None] < 3, falling, falling[:, ::-1])}
    answer = verdicts(partly)[1]
    assert answer.verdict == "in part"
    assert f"only at t = {', '.join(map(str, readout.timesteps[:3]))}" in answer.answer


def test_a_type_is_named_only_below_the_level(readout):
    def named(*p):
        hits = [Hit(str(i), 0, 1, 20, one, "B") for i, one in enumerate(p)]
        return findings(dataclasses.replace(readout, hits={"head": hits}, untrained={"head": hits}))[-1]

    assert named(0.009, 0.5).verdict == "yes"
    assert named(0.01, 0.5).verdict == "no"
    assert named(0.001, 0.5, 0.5).verdict == "in part"
    assert "1 of 3 types" in named(0.001, 0.5, 0.5).answer


class Words(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.text, self.tags, self.links = "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_files(readout, tmp_path):
    page = Words(write_explanation(readout, tmp_path / "out", title="run <1> on cells").read_text())
    assert page.links == []  # no external resources
    assert "run <1> on cells" in page.text
    for finding in findings(readout):
        assert finding.answer in page.text
    kept = json.loads((tmp_path / "out" / "explain.json").read_text())
    assert kept["means"]["rate_after"] == readout.means["rate_after"].tolist()
    assert len(kept["findings"]) == 7
    figures = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"rate-change.svg", "non-zero.svg", "rate-beside-crate.svg", "block-3-head-4.svg"} <= figures
    assert page.tags.count("svg") == len(figures)
    for path in (tmp_path / "out" / "figures").iterdir():
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_one_block_one_head(cells, tmp_path, monkeypatch):
    small = PRESETS["small"]
    tiny = {**small.model, "depth": 1, "num_heads": 1, "hidden_size": 16}
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(small, model=tiny))
    readout = explain(wbdit.fit(cells, label="type", preset="tiny", steps=2, progress=False), cells, cells=20)
    text = Words(write_explanation(readout, tmp_path, title="tiny").read_text()).text
    assert "There is one block." in text
    assert "one head" in text


def test_a_black_box_is_refused(cells):
    run = wbdit.fit(cells, label="type", preset="dit", steps=1, progress=False)
    with pytest.raises(wbdit.InputError, match="black boxes"):
        explain(run, cells)


def test_cells_that_do_not_fit_are_refused(run, cells):
    with pytest.raises(wbdit.InputError, match="genes are missing"):
        explain(run, cells[:, :10].copy())
    unlabelled = ad.AnnData(cells.X, var=cells.var)
    with pytest.raises(wbdit.InputError, match="type"):
        explain(run, unlabelled)


# while training


def test_training_looks_into_the_blocks_and_is_not_changed_by_it(cells, monkeypatch):
    monkeypatch.setattr("wbdit.training.trainer.LOG_SECONDS", 0.0)
    seen = wbdit.fit(cells, label="type", steps=6, progress=False)
    monkeypatch.setattr("wbdit.training.fit.diagnostics", lambda *given: {})
    blind = wbdit.fit(cells, label="type", steps=6, progress=False)
    assert seen.config.model_hash == blind.config.model_hash
    record = seen.history[0]
    assert len(record["coding_rate_before"]) == len(record["coding_rate_after"]) == len(record["non_zero"]) == 3
    assert "non_zero" not in blind.history[0]


def test_looking_is_kept_to_its_share_of_the_time(cells, monkeypatch):
    """After a slow measurement, the next one waits until its share of the training time allows it."""
    monkeypatch.setattr("wbdit.training.trainer.LOG_SECONDS", 0.0)
    monkeypatch.setattr("wbdit.training.trainer.DIAGNOSTICS_SHARE", 1e-4)
    looks = []

    def slow(*given):
        looks.append(time.sleep(0.2))
        return {"non_zero": [0.5]}

    monkeypatch.setattr("wbdit.training.fit.diagnostics", slow)
    wbdit.fit(cells, label="type", steps=20, progress=False)
    assert len(looks) == 1


def test_tensorboard_gets_what_the_log_gets(cells, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("wbdit.training.trainer.LOG_SECONDS", 0.0)
    run = wbdit.fit(cells, label="type", steps=4, progress=False, tensorboard=tmp_path / "board")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert {"loss", "learning_rate", "non_zero/block 3", "coding_rate_after/block 1"} <= set(events.Tags()["scalars"])
    kept = [(event.step, event.value) for event in events.Scalars("loss")]
    assert kept == [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in run.history]


def test_a_dit_trains_without_looks(cells):
    run = wbdit.fit(cells, label="type", preset="dit", steps=2, progress=False)
    assert all("non_zero" not in record for record in run.history)
