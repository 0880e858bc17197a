"""The GPU benchmark rehearsed on a CPU with injected faults: a faulty row must not lose the other rows."""

import contextlib
import importlib
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT

BENCH = ROOT / "bench"
CEILINGS = ["copy", "mm bf16", "mm fp32"]


def start(out, *arguments):
    command = [sys.executable, BENCH / "gpu" / "run.py", *arguments, "--quick", "--out", out]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rehearse(out, *arguments):
    process = start(out, *arguments, "--device", "cpu")
    stdout, stderr = process.communicate()
    lines = [json.loads(line) for line in (out / f"gpu-{arguments[0]}.jsonl").read_text().splitlines()]
    return process.returncode, {(line["stage"], line["row"]): line for line in lines}, stdout + stderr


@pytest.mark.slow
def test_every_row_but_the_faulty_is_in_the_file(tmp_path):
    """One row hangs, one crashes, one corrupts the CUDA context and one is red; all others are in the file."""
    product = "addmm_ bf16 204800 x 768 x 768"
    faults = {"mm fp32": "hang", product: "crash", "mm bf16": "raise", "sdpa flash_attention": "red"}
    given = [word for row, fault in faults.items() for word in ("--fault", f"ceilings/{row}={fault}")]
    status, lines, out = rehearse(tmp_path, "A", "--only", "ceilings", "--row-limit", "15", *given)
    assert status == 1, out
    rows = {row: line for (stage, row), line in lines.items() if stage == "ceilings" and row != "whole stage"}
    assert "no end within 15 s" in rows["mm fp32"]["failed"]
    assert "SIGSEGV" in rows[product]["failed"]
    assert "illegal memory access" in rows["mm bf16"]["failed"]
    assert not rows["sdpa flash_attention"]["green"]
    good = {row for row, line in rows.items() if "seconds" in line or "absent" in line}
    assert good == rows.keys() - faults.keys()
    assert {"copy", "mm bf16 204800 x 768 x 768", "sdpa backward"} <= good
    assert lines["card", "card"]["card"] == "CPU"
    report = (tmp_path / "gpu-A.md").read_text()
    for wrong in ("mm fp32: FAILED", "sdpa flash_attention: fp64 error 1.0e+00, 0e+00 allowed, RED"):
        assert report.index(wrong) < report.index("## Ceilings")  # failures are listed first


def test_a_kill_in_the_middle_loses_one_row(tmp_path):
    """Each row is written when it is finished, so a kill loses only the current row."""
    file = tmp_path / "gpu-A.jsonl"
    process = start(tmp_path, "A", "--device", "cpu", "--only", "ceilings", "--fault", "ceilings/mm fp32=hang")
    written = f'"row": "{CEILINGS[1]}"'
    while written not in (file.read_text() if file.exists() else ""):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    rows = [json.loads(line)["row"] for line in file.read_text().splitlines()]
    assert rows == ["card", "whole stage", *CEILINGS[:2]]
    assert (tmp_path / "gpu-A.now").read_text() == CEILINGS[2]
    with file.open("a") as half:
        half.write('{"run": "cut o')
    done = subprocess.run([sys.executable, BENCH / "gpu" / "report.py", file], capture_output=True, text=True)
    assert done.returncode == 0
    assert CEILINGS[1] in done.stdout


def test_time_that_is_up_is_said(tmp_path):
    _, lines, _ = rehearse(tmp_path, "B", "--only", "ceilings", "--seconds", "1")
    assert lines["ceilings", "the rest"]["absent"] == "the time was up"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_one_line(tmp_path):
    process = start(tmp_path, "A")
    _, stderr = process.communicate()
    assert process.returncode == 2
    assert stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def bench(monkeypatch):
    """Return a function that imports a module of bench/gpu."""
    for folder in (BENCH, BENCH / "gpu"):
        monkeypatch.syspath_prepend(folder)
    yield importlib.import_module
    for name in ("rows", "plan", "precision", "report", "run", "roofline", "timer", "setting"):
        sys.modules.pop(name, None)


def test_the_stages_fit_their_part(bench):
    plan = bench("plan")
    for part, stages in plan.PARTS.items():
        assert sum(plan.STAGES[stage].limit for stage in stages) <= plan.SECONDS[part] == {"A": 330, "B": 240}[part]


def test_no_fp32_product_is_tf32():
    """Run in a separate process, because the switches apply to the whole process."""
    code = (
        f"import sys; sys.path.insert(0, {str(BENCH / 'gpu')!r})\n"
        "import torch; from precision import exact_fp32; exact_fp32()\n"
        "assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == 'ieee'\n"
        "assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("error", "probe", "status"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None, 3),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), None, 3),
        (ValueError("another"), RuntimeError("spoilt"), 3),
        (ValueError("another"), None, None),
        (torch.OutOfMemoryError("CUDA out of memory"), None, None),
    ],
)
def test_a_spoilt_context_ends_the_process(bench, tmp_path, error, probe, status):
    """The row is written before the process ends. Other errors, including out-of-memory, do not end it."""

    def throw(what):
        if what is not None:
            raise what

    rows = bench("rows")
    stage = rows.Rows(tmp_path / "lines.jsonl", "run", "stage", probe=lambda: throw(probe))
    with pytest.raises(SystemExit) if status else contextlib.nullcontext() as ended:
        stage.attempt("row", lambda: throw(error))
    assert (ended.value.code if status else None) == status
    assert [line["row"] for line in rows.read(tmp_path / "lines.jsonl")] == ["row"]


def test_a_roofline_is_the_slower_of_two(bench):
    roofline = bench("roofline")
    cost = roofline.Cost(bytes=3e9, flops=8e11)
    assert cost.seconds(3e12, 8e14) == pytest.approx(1e-3)
    assert cost.seconds(1e12, 8e14) == pytest.approx(3e-3)
    published = roofline.Shape(1024, 200, 768, 8, 2000)
    costs = roofline.costs(published)
    # by hand: a product of 204,800 tokens by 768 x 768 is 242 GFLOP, which takes 0.30 ms at 800 TFLOP/s
    assert costs["block_project"].seconds(3e12, 8e14) == pytest.approx(0.302e-3, rel=0.01)
    assert costs["block_compress"].seconds(3e12, 8e14) == pytest.approx(0.419e-3, rel=0.01)


def test_predicted_beside_measured(bench, tmp_path, capsys):
    rows, roofline = bench("rows"), bench("roofline")
    file = tmp_path / "gpu-A.jsonl"
    rows.append(file, {"run": "1", "stage": "launches", "row": "mssa", "seconds": 4e-4, "roofline": 2e-4})
    assert roofline.main([str(file)]) == 0
    assert "| mssa | 200.0 | 400.0 | 50% |" in capsys.readouterr().out
    assert roofline.main([str(tmp_path / "missing")]) == 2


UNINSTALLED = """
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
sys.path.insert(0, {bench!r})
sys.argv = ["nsight.py", "forward", "--quick", "--batch", "2", "--steps", "1"]
runpy.run_path({bench!r} + "/nsight.py", run_name="__main__")
import wbdit, importlib.util
print(wbdit.__file__, importlib.util.find_spec("wbdit.kernels").submodule_search_locations)
"""


@pytest.mark.slow
def test_a_profile_runs_from_an_unpacked_tree(tmp_path):
    """Without an installed package, the kernels and C++ sources of the unpacked tree are found."""
    for part in ("wbdit", "kernels", "csrc", "bench", "tests"):
        shutil.copytree(BENCH.parent / part, tmp_path / part, ignore=shutil.ignore_patterns("out", "__pycache__"))
    code = UNINSTALLED.format(bench=str(tmp_path / "bench"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "forward, published, 2 cells" in done.stdout
    assert str(tmp_path / "wbdit") in done.stdout
    assert str(tmp_path / "kernels") in done.stdout
