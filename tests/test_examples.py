"""The examples in the docstrings run, and every public name has one."""

import doctest
import functools
import importlib
import inspect
import pkgutil

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import wbdit
from wbdit import pl
from wbdit.evaluation import distances

PUBLIC = ("wbdit", "wbdit.ops", "wbdit.samplers", "wbdit.compat", "wbdit.crate", "wbdit.pl")
METHODS_OF = (wbdit.CellGenerator, wbdit.NoiseSchedule)
MODULES = [
    module.name
    for module in pkgutil.walk_packages(wbdit.__path__, "wbdit.")
    if not module.name.startswith(("wbdit.csrc", "wbdit.kernels"))
]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """Return a generator trained for 3 steps, which is enough for examples but not for good cells."""
    cells = wbdit.datasets.blood_cells()
    cells = cells[cells.obs["bulk_labels"].isin(["Dendritic", "CD19+ B"])][::4].copy()
    out = tmp_path_factory.mktemp("examples") / "run"
    return wbdit.fit(cells, label="bulk_labels", steps=3, out=out, progress=False)


@pytest.mark.parametrize("name", ["wbdit", *MODULES])
def test_examples_run(name, generator, tmp_path, monkeypatch):
    """Run the examples with `np`, `torch`, `wbdit`, the demo's `cells` and a trained `generator` predefined."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"np": np, "torch": torch, "wbdit": wbdit, "generator": generator}
    module = importlib.import_module(name)
    if any(">>>" in (part.docstring or "") for part in doctest.DocTestFinder().find(module)):
        names["cells"] = wbdit.datasets.blood_cells()
    if not name.endswith("distances"):  # a thousand trees take a quarter of a minute
        monkeypatch.setattr(distances, "forest_votes", functools.partial(distances.forest_votes, n_trees=25))
    # UMAP compiles itself for half a minute
    monkeypatch.setattr(pl, "umap_layout", lambda components: components[:, :2])
    report = doctest.testmod(
        module, extraglobs=names, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False
    )
    plt.close("all")
    assert report.failed == 0


def described():
    """Yield name and value of each public function and class, and of the public methods of some classes."""
    for module in PUBLIC:
        here = importlib.import_module(module)
        for name in here.__all__:
            value = getattr(here, name)
            if inspect.isroutine(value) or inspect.isclass(value):
                yield f"{module}.{name}", value
    for owner in METHODS_OF:
        for name, value in vars(owner).items():
            if inspect.isfunction(value) and not name.startswith("_"):
                yield f"{owner.__name__}.{name}", value


@pytest.mark.parametrize(("name", "value"), [pytest.param(*pair, id=pair[0]) for pair in described()])
def test_public_names_have_an_example(name, value):
    assert ">>>" in (inspect.getdoc(value) or ""), f"{name} needs an example in its docstring"
