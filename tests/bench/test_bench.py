"""Benchmark scripts at tiny sizes: their output files, and the rejection of rows with wrong results."""

import importlib
import json
import os
import subprocess
import sys

import published
import pytest
import torch
from helpers import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wbdit import DiT, WBDiT

BENCH = ROOT / "bench"
OURS = {"ours, fp32", "ours, bf16"}


def run(*arguments, **environment):
    env = {**os.environ, **environment}
    env.pop("PYTEST_XDIST_WORKER", None)  # with it, pytest-benchmark measures nothing
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=env)


def bench(out, *arguments, **environment):
    done = run("-m", "pytest", "-c", BENCH / "pytest.ini", *arguments, "--quick", "--out", out, **environment)
    assert (out / "bench.json").exists(), done.stdout + done.stderr
    return done, json.loads((out / "bench.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return bench(tmp_path_factory.mktemp("bench"), BENCH)


def test_every_row_has_its_figures(quick):
    done, result = quick
    assert done.returncode == 0, done.stdout
    assert {"cpu", "cores", "threads", "flags", "kernels"} == result["machine"].keys()
    assert {"python", "torch", "wbdit"} == result["versions"].keys()
    assert result["quick"]
    assert result["commit"]
    kinds = {(row["config"], row["what"]) for row in result["rows"]}
    assert {(c, w) for c in ("published", "small") for w in ("forward", "train", "sampling")} < kinds
    assert ("published", "op mssa backward bf16") in kinds
    for row in result["rows"]:
        assert 0 < row["seconds"]["p20"] <= row["seconds"]["p50"] <= row["seconds"]["p80"], row
        assert row["ratio_to_eager"] > 0
        if "floor" not in row["name"]:
            assert row["rounds"] >= 5
            assert 0 <= row["error"] <= row["tolerance"]
        if not row["what"].startswith("op "):
            assert row["fraction_of_floor"] > 0
            assert f"| {row['name']} |" in done.stdout


def test_the_sampling_ratio_is_split(quick):
    rows = [row for row in quick[1]["rows"] if row["what"] == "sampling" and row["ours"]]
    assert len(rows) == 4
    for row in rows:
        assert row["ratio_of_sampler"] == pytest.approx(100 / 15)
        assert row["ratio_of_sampler"] * row["ratio_of_kernels"] == pytest.approx(row["ratio_to_eager"])


def test_what_is_absent_is_said(quick):
    done, result = quick
    assert [gone for gone in result["absent"] if "compiled" in gone["what"] and not gone["failed"]]
    assert "absent: forward[published-published, compiled fp32]" in done.stdout
    assert [row["mib"] >= 0 for row in result["memory"]] == [True]


WRONG = """
import wbdit
from wbdit.ops import reference, register_kernel
forward = wbdit.WBDiT.forward
wbdit.WBDiT.forward = lambda *arguments: 1.06 * forward(*arguments)
register_kernel("mssa_backward", "cpu", "wrong")(lambda *arguments: 1.06 * reference.mssa_backward(*arguments))
"""


@pytest.mark.slow
def test_a_wrong_row_is_neither_timed_nor_printed(tmp_path):
    """A model's output and a kernel's gradient are both 6 % too large."""
    (tmp_path / "wrong.py").write_text(WRONG)
    chosen = ("-k", "published and (mssa or forward or train)", "-p", "wrong")
    done, result = bench(
        tmp_path, BENCH / "bench_denoiser.py", BENCH / "bench_ops.py", *chosen, PYTHONPATH=str(tmp_path)
    )
    assert done.returncode == 1
    names = {row["name"] for row in result["rows"] if row["what"] in ("forward", "train")}
    assert "published, eager fp32" in names
    assert "DiT, eager fp32" in names
    assert not names & OURS
    operations = {(row["what"].split()[2], row["name"]) for row in result["rows"] if " mssa " in row["what"]}
    assert operations == {("forward", "reference"), ("forward", "kernel"), ("backward", "reference")}
    assert not any(f"| {name} |" in done.stdout for name in OURS)
    red = [gone for gone in result["absent"] if gone["failed"]]
    assert len(red) == 2 * 2 + 2  # our model: forward and train, fp32 and bf16; mssa backward: fp32 and bf16
    assert all(f"RED: {gone['what']}: {gone['why']}" in done.stdout for gone in red)


def test_a_kept_result_has_ratios_alone(quick, tmp_path):
    whole, kept = tmp_path / "whole.json", tmp_path / "results" / "kept.json"
    whole.write_text(json.dumps(quick[1]))
    assert run(BENCH / "keep.py", whole, kept).returncode == 2  # a quick run cannot be kept
    whole.write_text(json.dumps(quick[1] | {"quick": False}))
    assert run(BENCH / "keep.py", whole, kept).returncode == 0
    text = kept.read_text()
    assert "seconds" not in text
    assert "mib" not in text
    assert "cpu" not in json.loads(text)["machine"]


def test_what_is_no_result(tmp_path):
    garbage = tmp_path / "garbage.json"
    garbage.write_text("[]")
    for source in (tmp_path / "missing.json", garbage):
        done = run(BENCH / "keep.py", source, tmp_path / "kept.json")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "kept.json").exists()


@pytest.fixture
def flops(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("flops")


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", [WBDiT, DiT])
def test_the_floor_counts_every_product(kind, shared, flops, monkeypatch):
    """Compare with PyTorch's counter on the published formula with dictionaries that are already folded."""
    model = kind(43, 8, hidden_size=32, depth=2, num_heads=4, label_sizes=[3], shared_patches=shared).double().eval()
    sizes = flops.Sizes(3, 6, 32, 2, 8, 3, "white" if kind is WBDiT else "black")
    x, t, y = torch.randn(3, 1, 43).double(), torch.tensor([1, 500, 999]), torch.tensor([0, 1, 2])
    # the weight stands for the folded matrix F, so that the products of the fold are not counted
    monkeypatch.setattr(published, "ista", lambda mlp, z: torch.relu(z + 0.1 * (z @ mlp.weight) - 0.01))
    call = published.published_forward if kind is WBDiT else kind.__call__
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not count fused CPU kernels
        out = call(model, x, t, y)
        once = counter.get_total_flops()
        out.square().mean().backward()
    assert once == flops.forward(sizes)
    folds = sizes.depth * 2 * flops.fold(sizes) if kind is WBDiT else 0
    assert counter.get_total_flops() == flops.train(sizes) - folds


def test_the_floor_of_a_fold(flops):
    """The gradient merges the products D dF and D dF^T into one, D (dF + dF^T)."""
    dictionary = torch.randn(32, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        folded = dictionary - dictionary.mT @ dictionary
    assert counter.get_total_flops() == flops.fold(flops.Sizes(1, 1, 32, 1, 1, 1))
    upstream = torch.randn(32, 32)
    expected = torch.autograd.grad(folded, dictionary, upstream)[0]
    torch.testing.assert_close(upstream - dictionary @ (upstream + upstream.mT), expected, rtol=1e-4, atol=1e-4)


def test_every_variant_of_the_study_can_be_made():
    study = importlib.import_module("bench.quality.study")
    denoisers = {"wbdit": WBDiT, "dit": DiT}
    for name, preset in study.VARIANTS.items():
        model = denoisers[preset.denoiser](input_size=130, label_sizes=[3], **preset.model)
        assert model(torch.randn(2, 1, 130), torch.tensor([1, 900])).shape == (2, 1, 130), name


def test_the_studys_table():
    study = importlib.import_module("bench.quality.study")
    scores = {metric: [2.0, 1.0] for metric in study.SHOWN}
    result = {"data": "cells", "variant": "small", "seed": 0, "trained": {"steps": 7}, "seconds": {"fit": 3.2}}
    look = {"coding_rate_before": [30.0, 20.0], "coding_rate_after": [25.0, 15.0], "non_zero": [0.4, 0.25]}
    result["blocks"] = look
    head, rule, floor, row = study.table([result | {"scores": scores}]).splitlines()
    assert head.count("|") == rule.count("|") == floor.count("|") == row.count("|")
    assert row.startswith("| cells | small | 1 | 7 | 3 | 30 to 15 | 0.40, 0.25 | 2.00 |")
    black = study.table([result | {"variant": "dit", "blocks": None, "scores": scores}]).splitlines()[-1]
    assert black.startswith("| cells | dit | 1 | 7 | 3 |  |  | 2.00 |")
    assert floor.endswith("| 1.000 |")
