"""README and the pages: their snippets and commands run, their links lead somewhere, README stays short."""

import glob
import re
import shlex

import pytest
import torch
from helpers import ROOT, make_cells

from wbdit import WBDiT, cli

EVERY = ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/**/*.md")))]
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # raised by diffusers
    pytest.mark.filterwarnings("ignore:Writing zarr v2:UserWarning"),  # by anndata, which still does
]


def text(page):
    return (ROOT / page).read_text()


def snippets(page):
    return re.findall(r"^```python\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)


def commands(page):
    """Return the wbdit commands of the page's indented blocks, as words; of millions of cells, a thousandth."""
    page = re.sub(r"(--n \d{4,})000\b", r"\1", text(page).replace("$SLURM_ARRAY_TASK_ID", "0"))
    rank = r"    \1 --rank 0 --ranks 3\n    \1 --rank 1 --ranks 3\n    \1 --rank 2 --ranks 3"
    page = re.sub(r"^    torchrun --nproc-per-node 3 --no-python (.*)$", rank, page, flags=re.MULTILINE)
    lines = re.findall(r"^    (wbdit .*)$", page, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture
def folder(tmp_path, monkeypatch, request):
    """A folder with the files that the pages start from: cells of several names, effects, a checkpoint."""
    n = 60 if request.node.get_closest_marker("slow") is None else 108  # whose fifth can be evaluated
    for seed, name in enumerate(("cells.h5ad", "atlas.h5ad", "study-1.h5ad", "study-2.zarr")):
        cells = make_cells(n, 30, seed=seed)
        cells.obs = cells.obs.rename(columns={"type": "cell_type"})
        cells.obs["condition"] = ["ctrl", "stim"] * (n // 2)
        cells.obs["donor"] = [f"donor-{i % 4 // 2}" for i in range(n)]
        cells.obs["pseudotime"] = [i / (n - 1) for i in range(n)]
        write = cells.write_zarr if name.endswith(".zarr") else cells.write_h5ad
        write(tmp_path / name)
    cells[cells.obs["condition"] == "ctrl"].copy().write_h5ad(tmp_path / "ctrl.h5ad")
    (tmp_path / "effects.csv").write_text(f"gene,log_fold_change\n{cells.var_names[0]},1.0\n")
    torch.save(WBDiT().state_dict(), tmp_path / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


GUIDE = pytest.param("docs/guide.md", marks=pytest.mark.slow)  # trains three times


@pytest.mark.parametrize("page", ["README.md", GUIDE, "docs/other-code.md", "docs/profiling.md"])
def test_snippets_run(page, folder):
    """In their order, in one namespace, as a reader would run them."""
    assert snippets(page)
    names = {}
    for snippet in snippets(page):
        exec(compile(snippet, page, "exec"), names)


@pytest.mark.slow  # evaluating draws a map, which compiles itself for half a minute
@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_shell_commands_run(page, folder, capsys):
    given = commands(page)
    assert given
    if not any(command[1] == "train" and "run" in command for command in given):  # the guide trains it in Python
        given.insert(0, shlex.split("wbdit train cells.h5ad --label cell_type --minutes 3 --out run"))
    for command in given:
        with pytest.raises(SystemExit) as done:
            cli.run([path for word in command[1:] for path in sorted(glob.glob(word)) or [word]])  # as a shell would
        assert done.value.code == 0, (command, capsys.readouterr().err)


@pytest.mark.parametrize("page", EVERY)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)", text(page))
    missing = [t for t in targets if "://" not in t and not ((ROOT / page).parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", EVERY)
def test_make_targets_exist(page):
    targets = set(re.findall(r"(?:^    |`)make ([a-z][a-z-]*)", text(page), re.MULTILINE))
    known = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    assert targets <= known


def test_readme_is_short():
    lines = text("README.md").splitlines()
    assert len(lines) < 150
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) == 2 + 6  # a head, its rule, six rows


def test_versions_agree():
    """The package, the citation and the changelog name one version."""
    version = re.search(r'^version = "(.+)"$', text("pyproject.toml"), re.MULTILINE)[1]
    assert re.search(r"^version: (.+)$", text("CITATION.cff"), re.MULTILINE)[1] == version
    assert re.search(r"^## (\S+)", text("CHANGELOG.md"), re.MULTILINE)[1] == version
