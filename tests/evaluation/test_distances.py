"""The metrics against closed forms, hand computations and published settings."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from wbdit.errors import InputError
from wbdit.evaluation import distances
from wbdit.evaluation.intervals import Halves, auc


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_wasserstein_of_a_shifted_cloud_is_the_shift(rng):
    cloud = rng.normal(size=(60, 4))
    shift = np.array([3.0, -1.0, 0.5, 2.0])
    moved = rng.permutation(cloud + shift)
    for order in (1, 2):
        assert distances.wasserstein(cloud, moved, order) == pytest.approx(np.linalg.norm(shift), rel=1e-9)
        assert distances.wasserstein(cloud, rng.permutation(cloud), order) == pytest.approx(0, abs=1e-6)


def test_wasserstein_of_unequal_sizes_and_orders_by_hand():
    one, two = np.array([[0.0]]), np.array([[0.0], [2.0]])
    assert distances.wasserstein(one, two, 1) == pytest.approx(1.0)  # half the mass moves by 2
    assert distances.wasserstein(one, two, 2) == pytest.approx(math.sqrt(2.0))  # sqrt(2^2 / 2)
    assert distances.wasserstein(two, one, 1) == distances.wasserstein(one, two, 1)


def test_wasserstein_refuses_other_orders():
    with pytest.raises(ValueError, match="order"):
        distances.wasserstein(np.zeros((2, 1)), np.ones((2, 1)), 3)


@pytest.mark.parametrize("order", [1, 2])
def test_the_error_of_transport_is_what_new_cells_make_of_it(order):
    """For distant sets, the distance is nearly a mean over cells; its error is that of a difference of means."""
    rng = np.random.default_rng(5)
    drawn = [distances.transport(rng.normal(size=(60, 1)), 20 + rng.normal(size=(60, 1)), order) for _ in range(200)]
    spread = np.std([each.distance for each in drawn])
    assert np.mean([each.error for each in drawn]) == pytest.approx(spread, rel=0.15)
    assert spread == pytest.approx(math.sqrt(2 / 60), rel=0.15)


def test_mmd_of_halves_is_the_mmd_of_their_cells(rng):
    a, b = rng.normal(size=(8, 3)), 1 + rng.normal(size=(8, 3))
    halves = Halves.draw(8, 5, rng)
    by_weights = distances.kernel_mmd(distances.cfgen_kernel(a, b), halves.real, halves.other)
    by_cells = [distances.mmd_cfgen(a[i], b[j]) for i, j in halves.rows()]
    np.testing.assert_allclose(by_weights, by_cells, rtol=1e-10)


def test_ilisi_knows_the_even_and_the_parted():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 150, 4))
    assert 0.25 < distances.ilisi(a, b) < 0.6
    assert distances.ilisi(a, b + 50) == pytest.approx(0, abs=1e-9)
    # the corners of a simplex are equidistant, so all neighbors have equal weights
    corners = np.eye(7)
    assert distances.ilisi(corners[:3], corners[3:], n_neighbors=6) == pytest.approx(1 / (0.5**2 + 0.5**2) - 1)


def test_ilisi_is_harmonys_lisi():
    """Compare with harmonypy 2.1.0: the median of compute_lisi at perplexity 10 / 3, minus 1."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(120, 20)), rng.normal(size=(120, 20)) + 0.3
    assert distances.ilisi(a, b) == pytest.approx(0.35948443669942054, rel=2e-4)


def test_lisi_weights_have_the_wished_perplexity(rng):
    weights = distances._perplexity_weights(rng.uniform(1, 3, size=(20, 10)), 10 / 3)
    np.testing.assert_allclose(np.exp(-(weights * np.log(weights)).sum(axis=1)), 10 / 3, rtol=1e-6)


def mmd_by_loops(a, b, kernel):
    def mean(x, y):
        return sum(kernel(sum((p - q) ** 2 for p, q in zip(u, v, strict=True))) for u in x for v in y) / len(x) / len(y)

    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


def test_mmd_cfgen_is_the_sum_over_five_widths(rng):
    a, b = rng.normal(size=(7, 3)), 0.5 + rng.normal(size=(5, 3))
    by_hand = sum(
        mmd_by_loops(a, b, lambda d, s=sigma: math.exp(-d / (2 * s * s))) for sigma in (0.01, 0.1, 1.0, 10.0, 100.0)
    )
    assert distances.mmd_cfgen(a, b) == pytest.approx(by_hand, rel=1e-12)
    assert distances.mmd_cfgen(b, a) == pytest.approx(by_hand, rel=1e-12)
    assert distances.mmd_cfgen(a, a) == pytest.approx(0, abs=1e-12)


def test_mmd_scdiffusion_takes_its_widths_from_both_sets(rng):
    a, b = rng.normal(size=(6, 3)), 1 + rng.normal(size=(6, 3))
    both = [*a, *b]
    total = sum(float(((x - y) ** 2).sum()) for x in both for y in both)
    base = total / (12 * 12 - 12) / 4
    by_hand = sum(mmd_by_loops(a, b, lambda d, w=base * 2**i: math.exp(-d / w)) for i in range(5))
    assert distances.mmd_scdiffusion(a, b) == pytest.approx(by_hand, rel=1e-12)
    assert distances.mmd_scdiffusion(a, a[::-1]) == pytest.approx(0, abs=1e-12)
    assert distances.mmd_scdiffusion(np.ones((3, 2)), np.ones((3, 2))) == 0


def test_mmd_scdiffusion_needs_equal_sizes():
    with pytest.raises(ValueError, match="equal"):
        distances.mmd_scdiffusion(np.zeros((3, 2)), np.ones((4, 2)))


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_pca_spans_what_sklearn_finds(rng, shape):
    from sklearn.decomposition import PCA

    cells = rng.normal(size=shape) * np.linspace(3, 0.1, shape[1])
    mean, axes = distances.pca_axes(cells, 5)
    theirs = PCA(5, svd_solver="full").fit(cells)
    np.testing.assert_allclose(mean, theirs.mean_, atol=1e-12)
    np.testing.assert_allclose(axes @ axes.T, theirs.components_.T @ theirs.components_, atol=1e-7)
    assert (np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0) > 0).all()


def test_pca_gives_no_more_than_the_cells_carry(rng):
    assert distances.pca_axes(rng.normal(size=(4, 30)), 30)[1].shape == (30, 3)
    assert distances.pca_axes(np.ones((5, 8)), 3)[1].shape == (8, 0)


def test_joint_pca_centres_on_both_sets(rng):
    real, generated = distances.joint_pca(rng.normal(size=(20, 6)), 2 + rng.normal(size=(20, 6)), 3)
    assert real.shape == generated.shape == (20, 3)
    np.testing.assert_allclose(np.vstack([real, generated]).mean(axis=0), 0, atol=1e-12)
    assert abs(real[:, 0].mean() - generated[:, 0].mean()) > 3


def test_forest_auc_is_a_coin_on_equals_and_one_on_separated_sets(rng):
    a, b = rng.normal(size=(300, 5)), rng.normal(size=(300, 5))
    votes = distances.forest_votes(a, b, n_trees=200)
    assert sum(map(len, votes)) == 150
    assert abs(auc(*votes).value - 0.5) < 0.1
    again = distances.forest_votes(a, b, n_trees=200, n_jobs=1)
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate(votes))
    assert auc(*distances.forest_votes(a, b + 8, n_trees=50)).value == 1.0


def test_forest_auc_has_the_published_settings(rng, monkeypatch):
    import sklearn.ensemble

    seen = {}

    class Recorder(sklearn.ensemble.RandomForestClassifier):
        def fit(self, cells, labels):
            seen.update(self.get_params(), n=len(cells))
            self.n_estimators = 10
            return super().fit(cells, labels)

    monkeypatch.setattr(sklearn.ensemble, "RandomForestClassifier", Recorder)
    distances.forest_votes(rng.normal(size=(40, 2)), rng.normal(size=(40, 2)))
    wanted = {"n_estimators": 1000, "max_depth": 5, "class_weight": "balanced", "random_state": 1, "n": 60}
    assert {key: seen[key] for key in wanted} == wanted


@pytest.mark.parametrize("n", [20, 21, 25, 33, 50])
def test_forest_holds_out_both_kinds_at_any_size(n):
    cells = np.arange(2 * n, dtype=float)[:, None]
    assert auc(*distances.forest_votes(cells[:n], cells[n:], n_trees=10)).value > 0.9


@pytest.fixture
def typed(rng):
    """Return cells ``(90, 25)`` of three types with different means, and their labels ``(90,)``."""
    labels = np.repeat(["a", "b", "c"], 30)
    return rng.normal(rng.uniform(0, 3, size=(3, 25)).repeat(30, axis=0), 0.1), labels


@pytest.mark.parametrize("attenuation", [1.0, 0.6, 1.3])
def test_lfc_slope_of_attenuated_differences_is_the_attenuation(typed, attenuation):
    real, labels = typed
    weaker = real.mean(axis=0) + attenuation * (real - real.mean(axis=0))
    assert distances.lfc_slope(real, labels, weaker, labels, ["a", "b", "c"]) == pytest.approx(attenuation)


def test_lfc_slope_counts_strong_differences_only(typed):
    real, labels = typed
    types = ["a", "b"]
    wanted = distances.log_fold_changes(real, labels, types)
    got = distances.log_fold_changes(real**2, labels, types)
    strong = np.abs(wanted) > 0.5
    assert 2 < strong.sum() < strong.size
    slope = np.polyfit(wanted[strong], got[strong], 1)[0]
    assert distances.lfc_slope(real, labels, real**2, labels, types) == pytest.approx(slope)
    assert math.isnan(distances.lfc_slope(real / 100, labels, real, labels, types))


def test_fold_changes_are_scanpys_with_a_pseudo_count_of_one(typed):
    real, labels = typed
    inside = labels == "b"
    mean, rest = real[inside].mean(axis=0), real[~inside].mean(axis=0)
    theirs = np.log((np.expm1(mean) + 1) / (np.expm1(rest) + 1))
    np.testing.assert_allclose(distances.log_fold_changes(real, labels, ["b"])[0], theirs, atol=1e-12)


def test_tstr_learns_what_the_labels_say(typed, rng):
    cells, labels = typed
    assert distances.tstr(cells[::2], labels[::2], cells[1::2], labels[1::2]).all()
    swapped = np.where(labels == "a", "b", np.where(labels == "b", "a", labels))
    assert distances.tstr(cells[::2], swapped[::2], cells[1::2], labels[1::2]).mean() == pytest.approx(1 / 3, abs=0.02)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(InputError, match=r"POT.*pip install"):
        distances.wasserstein(np.zeros((2, 1)), np.ones((2, 1)))


def test_importing_the_evaluation_loads_nothing_heavy():
    heavy = ["ot", "sklearn", "scanpy", "umap", "matplotlib", "jinja2"]
    code = f"import sys, wbdit.report.evaluation; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_distances_in_many_dimensions_are_those_of_scipy():
    a, b = np.random.default_rng(0).normal(size=(2, 30, 400))
    np.testing.assert_allclose(distances.squared_distances(a, b), cdist(a, b, "sqeuclidean"), rtol=1e-12)
    assert distances.squared_distances(a, a).min() >= 0  # rounding could give -1e-13
