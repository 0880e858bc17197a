"""The speed gate: verdicts on simulated times, whole runs with simulated workers, and one real worker."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from bench.gate import __main__ as gate
from bench.gate import chart, judge, measure, report, trial
from bench.gate.process import Process, WorkerError
from wbdit.ops import dispatch

GATE = ROOT / "bench" / "gate"
CHECKED = {"errors": {"base": 1e-7, "head": 1e-7}, "tolerance": 1e-5}


def made_up(slower=1.0, noise=0.01, between=0.01, generations=3, rounds=8, seed=0, **facts):
    """Return simulated times of a row; log times vary by `noise` between rounds and by `between` between processes."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(generations):
        level = {p: rng.normal(0, between) + (math.log(slower) if "head" in p else 0) for p in measure.PROCESSES}
        drift = rng.normal(0, 0.3, rounds)  # other load on the machine
        found.append([{p: math.exp(d + level[p] + rng.normal(0, noise)) for p in level} for d in drift])
    return measure.RowTimes(found, **(CHECKED | facts))


def verdicts(**made):
    return [judge.judge("row", made_up(seed=seed, **made)).verdict for seed in range(200)]


def test_equal_code_is_hardly_ever_red():
    """At most 1 of 200 rows is red: less than one red row in ten runs of sixteen rows."""
    for between in (0.002, 0.01, 0.025):
        assert verdicts(between=between).count(judge.RED) <= 1


def test_a_slowdown_is_found():
    for between in (0.002, 0.01):
        assert verdicts(slower=1.15, between=between).count(judge.RED) >= 199
    found = judge.judge("row", made_up(slower=1.15))
    assert found.ratio == pytest.approx(1.15, abs=0.03)
    assert found.threshold < 1.1


def test_faster_is_said_but_not_red():
    assert verdicts(slower=0.85).count(judge.FASTER) >= 199


def test_one_disturbed_generation_is_not_red():
    times = made_up(between=0.002)
    for one in times.generations[0]:
        one["head 1"] *= 1.4
        one["head 2"] *= 1.4
    assert judge.judge("row", times).verdict == judge.FINE


def test_a_noisy_row_is_ungated():
    found = judge.judge("row", made_up(between=0.2))
    assert (found.verdict, found.why) == (judge.UNGATED, "too noisy")
    assert found.needs_another_look


def test_a_threshold_too_high_to_see_15_percent_is_ungated():
    """Rounds agree but generations do not: the row is measured longer, and then left without a verdict."""
    times = measure.RowTimes(
        [made_up(slower, noise=0.001, between=0.0, generations=1).generations[0] for slower in (1.0, 1.1, 1.2)]
    )
    times.tolerance = 1.0
    found = judge.judge("row", times)
    assert found.verdict == judge.UNGATED
    assert found.why == "too noisy"
    assert found.needs_another_look


@pytest.mark.parametrize(
    ("facts", "verdict", "why"),
    [
        (
            {"errors": {"base": 1e-7, "head": 1e-3}},
            judge.RED,
            "head: error 1.0e-03 against fp64, 1e-05 allowed; not timed",
        ),
        ({"errors": {"base": 1e-7, "head": math.nan}}, judge.RED, "head: error nan"),
        ({"failed": {"head": "ValueError: x"}}, judge.RED, "does not run: ValueError: x"),
        ({"failed": {"base": "ValueError: x"}}, judge.UNGATED, "does not run at the base"),
        ({"generations": 1}, judge.UNGATED, "out of time"),
        ({"generations": 0}, judge.UNGATED, "out of time"),
    ],
)
def test_what_is_not_timed_is_said(facts, verdict, why):
    found = judge.judge("row", made_up(**facts))
    assert found.verdict == verdict
    assert found.why.startswith(why)


def pair(ratio, noise=0.0, seed=0, **facts):
    rng = np.random.default_rng(seed)
    seconds = {side: np.exp(rng.normal(0, noise, (25, 2))) for side in ("reference", "kernel")}
    seconds["reference"] *= ratio
    return {"error": 1e-7, "tolerance": 1e-5, **{side: t.tolist() for side, t in seconds.items()}, **facts}


def test_operations_beside_their_reference():
    assert judge.judge_pair("op", pair(1.0, 0.01)).verdict == judge.FINE
    assert judge.judge_pair("op", pair(0.9, 0.01)).verdict == judge.RED
    assert judge.judge_pair("op", pair(0.9, 0.2)).verdict == judge.RED
    quick_but_uneven = pair(1.03)
    quick_but_uneven["kernel"] = [
        [k * (1.2 if i % 4 == 0 else 1.0) for k in ks] for i, ks in enumerate(quick_but_uneven["kernel"])
    ]
    assert judge.judge_pair("op", quick_but_uneven).verdict == judge.UNGATED
    noisy = judge.judge_pair("op", pair(1.0, 0.2))
    assert noisy.verdict == judge.UNGATED
    assert noisy.why.startswith("too noisy")
    assert judge.judge_pair("op", {}).why == "out of time"
    assert judge.judge_pair("op", {"failed": "x"}).verdict == judge.RED
    assert judge.judge_pair("op", pair(2.0, error=1.0)).why.endswith("not timed")


# whole runs with simulated workers

WORKER = """
import json, random, sys
tree = sys.argv[1]
told = json.load(open(tree + "/told.json"))
for line in sys.stdin:
    request = json.loads(line)
    do = request["do"]
    if do == "hello":
        answer = {"protocol": 1, "rows": told["rows"], "pairs": list(told["pairs"]),
                  "machine": {"cpu": "Test", "cores": 2, "threads": 2, "kernels": told["kernels"]},
                  "versions": {"torch": "2"}}
    elif do == "prepare":
        row = request["row"]
        answer = {"seconds": 0.01, "error": told["errors"].get(row, 0.0), "tolerance": 1e-5}
    elif do == "visit":
        answer = {"seconds": [told["seconds"].get(row, 0.01) * random.uniform(1, 1.01)]}
    else:
        ratio = told["pairs"][request["pair"]]
        answer = {"error": 0.0, "tolerance": 1e-5, "reference": [[ratio, ratio]] * 25, "kernel": [[1, 1]] * 25}
    print(json.dumps(answer), flush=True)
"""
TOLD = {
    "kernels": "avx2",
    "rows": {"forward": "4 cells", "op mssa": "4 cells"},
    "seconds": {},
    "errors": {},
    "pairs": {"small op fold": 1.0},
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Return a function that runs the gate in a repository with simulated workers: HEAD against the working tree."""
    root = tmp_path / "repository"
    script = measure.worker_script(root)
    script.parent.mkdir(parents=True)
    script.write_text(WORKER)
    (root / ".gitignore").write_text("build/\n")
    (root / "told.json").write_text(json.dumps(TOLD))
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "base"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(gate, "ROOT", root)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    out = tmp_path / "out" / "gate.jsonl"

    def run(base="HEAD", **changed):
        if changed:
            (root / "told.json").write_text(json.dumps(TOLD | changed))
        monkeypatch.setattr(sys, "argv", ["gate", base, "--out", str(out)])
        status = gate.main()
        assert not list((root / "build").glob("gate/*"))  # the files of the base are removed
        lines = out.read_text().splitlines() if out.exists() else []
        return status, json.loads(lines[-1]) if lines else None

    run.root, run.git = root, git
    return run


def test_equal_trees_are_green(repository, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    status, line = repository()
    assert status == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "summary.md").read_text()
    assert "Nothing is red; 0 of 3 ungated." in printed
    assert line["base"] == line["commit"]
    assert (line["processor"], line["threads"], line["quick"]) == ("Test", 2, False)
    assert line["rows"]["forward"].keys() == {"ratio", "spread", "threshold", "verdict", "why"}
    assert line["operations"]["small op fold"]["median"] == 1


@pytest.mark.parametrize(
    ("changed", "red"),
    [
        ({"seconds": {"op mssa": 0.0115}}, "op mssa"),
        ({"errors": {"forward": 1e-3}}, "forward"),
        ({"pairs": {"small op fold": 0.9}}, "small op fold (its reference)"),
    ],
)
def test_what_is_red_is_named(changed, red, repository, capsys):
    status, line = repository(**changed)
    assert status == 1
    assert f"RED: {red}; " in capsys.readouterr().out
    assert line["commit"] == line["base"] + "+"  # the working tree differs


def test_rows_that_one_side_lacks_are_ungated(repository):
    status, line = repository(rows={"forward": "5 cells", "op new": "4 cells"})
    assert status == 0
    assert {name: row["verdict"] for name, row in line["rows"].items()} == dict.fromkeys(
        ("forward", "op new", "op mssa"), "ungated"
    )
    assert line["rows"]["op new"]["why"] == "not at the base"


def test_a_base_without_the_gate_is_timed_by_the_new_worker(repository):
    worker = measure.worker_script(repository.root)
    text = worker.read_text()
    for command in (["rm", "-q", "--cached", str(worker)], ["commit", "-q", "-m", "older"]):
        subprocess.run([*repository.git, *command], check=True)
    worker.write_text(text)
    assert repository()[0] == 0


def test_no_time_left(repository, monkeypatch):
    monkeypatch.setattr(gate, "UNTIL", (0.0, 0.0, 0.0))
    status, line = repository()
    assert status == 0
    for part in ("rows", "operations"):
        assert {found["why"] for found in line[part].values()} == {"out of time"}


@pytest.mark.parametrize("base", ["", "nonsense", "--all", "0" * 40])
def test_a_base_that_there_is_not(base, repository, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gate", "--", base])
    assert gate.main() == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert not said.out


def test_no_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gate, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(sys, "argv", ["gate", "HEAD"])
    assert gate.main() == 2
    assert "not a git repository" in capsys.readouterr().err


def test_nothing_is_timed_without_kernels(repository, capsys):
    assert repository(kernels="none") == (2, None)
    assert "no kernels in head" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_worker():
    """A worker imports `wbdit` from its tree, and checks and times rows at tiny sizes."""
    with Process(GATE / "worker.py", ROOT, quick=True) as worker:
        hello = worker.ask("hello")
        assert Path(hello["wbdit"]) == ROOT / "wbdit"
        assert 6 < len(hello["rows"]) <= 16
        for row in list(hello["rows"])[:7]:
            ready = worker.ask("prepare", row=row, check=True)
            assert 0 < ready["error"] <= ready["tolerance"], row
            assert len(worker.ask("visit", calls=2, chunks=3)["seconds"]) == 3
        answer = worker.ask("compare", pair="small op mssa backward fp32", rounds=3, until=60.0)
        assert answer["error"] <= answer["tolerance"]
        assert np.shape(answer["reference"]) == np.shape(answer["kernel"]) == (3, 2)
        assert "KeyError" in worker.ask("prepare", row="nonsense", check=False)["failed"]


def test_a_worker_takes_no_package_but_its_trees(tmp_path):
    """A worker does not fall back on an installed wbdit if its tree has none."""
    with Process(GATE / "worker.py", tmp_path) as worker, pytest.raises(WorkerError, match="not from"):
        worker.ask("hello")


def test_planting(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "wbdit" / "ops", tmp_path / "wbdit" / "ops")
    trial.plant(tmp_path, "mssa", 1.15)
    planted = (tmp_path / "wbdit" / "ops" / "__init__.py").read_text()
    code = planted.removeprefix((ROOT / "wbdit" / "ops" / "__init__.py").read_text())
    monkeypatch.setitem(dispatch._adapters, "mssa", lambda w: w + 1)
    exec(code)
    assert dispatch.adapter("mssa").__wrapped__(1) == dispatch.adapter("mssa")(1) == 2
    with pytest.raises(RuntimeError, match="no operation attention"):
        trial.plant(tmp_path, "attention", 1.15)
    rows = {"small op mssa backward fp32": {"verdict": "RED"}, "small op mssa forward fp32": {"verdict": "ok"}}
    assert trial.names_it({"rows": rows}, "mssa_backward")
    assert not trial.names_it({"rows": rows}, "mssa")


def test_the_chart(tmp_path):
    facts = {"machine": {"cpu": "A", "cores": 2, "threads": 2, "kernels": "avx2"}, "versions": {"torch": "2"}}
    lines = []
    for number, (verdict, ratio) in enumerate([("ok", 1.0), ("RED", 1.2), ("faster", 0.9)]):
        rows = [
            judge.Verdict("small train fp32", verdict, "", ratio, 0.01, 1.03),
            judge.Verdict("gone", "ungated", "x"),
        ]
        lines.append(report.line(f"commit{number}", "base", facts, rows, [], 300.0, quick=False))
        facts["machine"]["cpu"] = "B"
    source, picture = tmp_path / "gate.jsonl", tmp_path / "gate.svg"
    for line in [*lines, lines[0] | {"quick": True, "commit": "tiny"}]:
        report.append(line, source)
    assert chart.main(str(source), str(picture)) == 0
    text = picture.read_text()
    assert text.startswith("<?xml")
    assert all(word in text for word in ("commit0", "commit2", "A, 2 threads", "B, 2 threads", "small train fp32"))
    assert "tiny" not in text


@pytest.mark.parametrize("text", [None, "[]", "{}\n", '{"quick": true}\n', "nonsense"])
def test_what_cannot_be_charted(text, tmp_path, capsys):
    source = tmp_path / "gate.jsonl"
    if text is not None:
        source.write_text(text)
    assert chart.main(str(source), str(tmp_path / "gate.svg")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "gate.svg").exists()
