"""The installed package: kernels/ as wbdit.kernels, csrc/ as wbdit/csrc, and imports with few dependencies."""

import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, **options).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy of the sources, so that it holds no leftovers of an earlier build."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in ("wbdit", "kernels", "csrc"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
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


def test_the_wheel_imports_by_itself(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import wbdit, wbdit.kernels; print(wbdit.__file__); wbdit.WBDiT(40, 8, hidden_size=32)"
    where = python("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert where.startswith(str(tmp_path))


def test_every_module_imports_from_the_wheel(wheel, tmp_path):
    """The wheel holds every module of the source tree."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
import importlib, pkgutil, sys, wbdit
names = [module.name for module in pkgutil.walk_packages(wbdit.__path__, "wbdit.")]
for name in names:
    importlib.import_module(name)
print(*names)
"""
    names = python("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}).split()
    tree = {path.relative_to(ROOT).with_suffix("") for path in (ROOT / "wbdit").rglob("*.py")}
    tree |= {"wbdit" / path.relative_to(ROOT).with_suffix("") for path in (ROOT / "kernels").glob("*.py")}
    modules = {".".join(path.parts).removesuffix(".__init__") for path in tree} - {"wbdit"}
    assert modules | {"wbdit.csrc"} >= set(names) >= modules


def test_kernels_import_in_a_checkout():
    assert python("-c", "import wbdit.kernels as k; print(k.__name__)").strip() == "wbdit.kernels"


def test_the_denoiser_imports_without_the_rest():
    """Importing only the denoiser loads neither anndata nor scanpy, and needs no Triton."""
    code = """
import sys
sys.modules["triton"] = None
from wbdit import WBDiT, DiT, samplers, NoiseSchedule
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
