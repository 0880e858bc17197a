"""The plots: what is on their axes, axes that the caller gives, and one line for mistakes."""

import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import make_cells

from wbdit import InputError, pl
from wbdit.report.summary_png import REAL, SYNTHETIC

REAL_CELLS, SYNTHETIC_CELLS = make_cells(40, 30, seed=0), make_cells(34, 30, types=("NK", "B"), seed=1)
SYNTHETIC_CELLS.uns["wbdit"] = {"label": "type"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Use two components in place of UMAP, which takes half a minute to start, and close the figures."""
    monkeypatch.setattr(pl, "umap_layout", lambda components: components[:, :2])
    yield
    plt.close("all")


def dots(axes):
    return sum(len(each.get_offsets()) for each in axes.collections)


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_map_of_both_sets():
    axes = pl.umap(REAL_CELLS, SYNTHETIC_CELLS)
    assert dots(axes) == 74
    assert legend(axes) == ["real cells (40)", "synthetic cells (34)"]


def test_a_map_by_type_has_the_other_set_in_gray():
    axes = pl.umap(REAL_CELLS, SYNTHETIC_CELLS, color="type")
    assert [dots(each) for each in axes] == [74, 74]
    assert legend(axes[1]) == ["B", "NK", "T"]
    assert [each.get_title(loc="right") for each in axes] == ["40 cells", "34 cells"]


def test_a_map_by_gene_has_one_scale():
    axes = pl.umap(REAL_CELLS, SYNTHETIC_CELLS, color="gene-3", n_cells=20)
    shades = [each.collections[0] for each in axes]
    assert [len(each.get_array()) for each in shades] == [20, 20]
    assert shades[0].get_clim() == shades[1].get_clim()


def test_a_map_by_a_number_of_obs():
    both = REAL_CELLS.copy(), SYNTHETIC_CELLS.copy()
    for cells in both:
        cells.obs["total"] = np.ravel(cells.X.sum(1))
    axes = pl.umap(*both, color="total")
    assert sorted(axes[0].collections[0].get_array()) == sorted(both[0].obs["total"])


def test_given_axes_are_drawn_on():
    _, (one, two) = plt.subplots(1, 2)
    assert pl.umap(REAL_CELLS, SYNTHETIC_CELLS, ax=one) is one
    assert list(pl.genes(REAL_CELLS, SYNTHETIC_CELLS, "gene-1", ax=[one, two])) == [one, two]
    assert len(plt.get_fignums()) == 1


def test_dots_hold_means_and_shares():
    axes = pl.genes(REAL_CELLS, SYNTHETIC_CELLS, ["gene-1", "gene-7"])
    counts = REAL_CELLS.X.toarray()
    values = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))[:, [1, 7]]
    types = REAL_CELLS.obs["type"].to_numpy()
    drawn = axes[0].collections[0]
    means = np.array([values[types == name].mean(0) for name in ("B", "NK", "T")])
    shares = np.array([(values[types == name] > 0).mean(0) for name in ("B", "NK", "T")])
    assert np.allclose(drawn.get_array(), means.ravel())
    assert np.allclose(drawn.get_sizes(), pl.DOT * shares.ravel())
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["B", "NK", "T"]  # type is the label of the run
    assert axes[0].collections[0].get_clim() == axes[1].collections[0].get_clim()


def test_violins_have_one_panel_per_gene_and_dots_for_few_cells():
    few = SYNTHETIC_CELLS[:18]  # 9 per type
    axes = pl.genes(REAL_CELLS, few, ["gene-1", "gene-7"], kind="violins", label="type")
    assert [each.get_ylabel() for each in axes] == ["gene-1", "gene-7"]
    colors = [tuple(np.round(c.get_facecolor()[0][:3], 3)) for c in axes[0].collections if len(c.get_paths())]
    real, synthetic = (tuple(np.round(plt.matplotlib.colors.to_rgb(color), 3)) for color in (REAL, SYNTHETIC))
    assert colors.count(real) >= 3
    assert colors.count(synthetic) >= 2
    assert sum(len(c.get_offsets()) == 9 for c in axes[0].collections) == 2
    assert legend(axes[0]) == ["real cells", "synthetic cells"]


def test_without_labels_all_cells_are_one_group():
    plain = SYNTHETIC_CELLS.copy()
    del plain.uns["wbdit"]
    axes = pl.genes(REAL_CELLS, plain, "gene-1", kind="violins")
    assert [text.get_text() for text in axes[0].get_xticklabels()] == ["all cells"]


def test_a_training_log():
    records = [{"step": 10 * i, "loss": 1 / i, "learning_rate": 1e-3} for i in range(1, 6)]
    records[2]["validation_loss"], records[4]["validation_loss"] = 0.5, 0.4
    axes = pl.history(SimpleNamespace(history=records))
    training, held_out = axes[0].lines
    assert list(training.get_ydata()) == [1 / i for i in range(1, 6)]
    assert list(held_out.get_xdata()) == [30, 50]
    assert legend(axes[0]) == ["training", "held-out cells"]
    assert list(axes[1].lines[0].get_ydata()) == [1e-3] * 5


@pytest.mark.parametrize(
    ("plot", "words"),
    [
        (lambda: pl.umap(REAL_CELLS, SYNTHETIC_CELLS, color="Xist"), "no gene 'Xist' in the real and synthetic cells"),
        (
            lambda: pl.umap(REAL_CELLS, SYNTHETIC_CELLS[:, :9], color="gene-9"),
            "no gene 'gene-9' in the synthetic cells",
        ),
        (lambda: pl.umap(REAL_CELLS, SYNTHETIC_CELLS, n_cells=1), "`n_cells` must be at least 2"),
        (
            lambda: pl.umap(REAL_CELLS, SYNTHETIC_CELLS, color="type", ax=plt.figure().gca()),
            "needs 2 axes in `ax`, not 1",
        ),
        (lambda: pl.genes(REAL_CELLS, SYNTHETIC_CELLS, []), "at least one gene"),
        (lambda: pl.genes(REAL_CELLS, SYNTHETIC_CELLS, "gene-1", kind="bars"), "no `kind` 'bars'"),
        (lambda: pl.genes(REAL_CELLS, SYNTHETIC_CELLS, "gene-1", label="sort"), "real cells: no column 'sort'"),
        (lambda: pl.history(SimpleNamespace(history=[])), "no training log"),
    ],
)
def test_mistakes(plot, words):
    with pytest.raises(InputError, match=words):
        plot()


def test_a_column_that_one_set_lacks():
    cells = REAL_CELLS.copy()
    cells.obs["stage"] = "one"
    with pytest.raises(InputError, match="no column 'stage' in obs of the synthetic cells"):
        pl.umap(cells, SYNTHETIC_CELLS, color="stage")


def test_scaled_values_have_violins_only():
    cells = REAL_CELLS.copy()
    cells.X = cells.X.toarray() - 0.5 - cells.X.toarray().mean(0)
    with pytest.raises(InputError, match="scaled values do not show"):
        pl.genes(cells, cells, "gene-1", label="type")
    (axes,) = pl.genes(cells, cells, "gene-1", label="type", kind="violins")
    assert axes.get_ylim()[0] < 0


def test_matplotlib_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(InputError, match="needs matplotlib"):
        pl.genes(REAL_CELLS, SYNTHETIC_CELLS, "gene-1")
