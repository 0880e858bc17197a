"""Donors of a simulated cohort with known effects: found if a generator copies them, not if it draws anew."""

import numpy as np
import pytest

from wbdit.evaluation.donors import LEVELS, Copula, donor_attack, level_edges

DONORS, CELLS, GENES = 24, 80, 40


@pytest.fixture(scope="module")
def cohort():
    """Return counts of 24 donors, half of them members, and a function that draws cells of donors with effects."""
    rng = np.random.default_rng(0)
    profile = rng.gamma(2.0, 1.0, GENES)
    effects = rng.lognormal(0, 0.3, (DONORS, GENES))

    def draw(which):
        return rng.poisson(profile * effects[which]).astype(float)

    donors = np.repeat(np.arange(DONORS), CELLS)
    return draw(donors), donors.astype(str), draw, rng


def attack(cohort, synthetic, cells_per_donor):
    cells, donors, _, _ = cohort
    names = [str(i) for i in range(DONORS)]
    return donor_attack(
        np.log1p(synthetic), np.log1p(cells), donors, names[:12], names[12:],
        cells_per_donor=cells_per_donor, draws=5, rng=np.random.default_rng(1),
    )  # fmt: skip


def area(found):
    return float((found.members[:, None, :, None] > found.others[None, :, None, :]).mean())


def test_members_are_found_the_better_the_more_cells(cohort):
    _, _, draw, rng = cohort
    synthetic = draw(rng.integers(0, 12, 1000))
    areas = [area(attack(cohort, synthetic, n)) for n in (1, 10, 50)]
    assert areas[0] < areas[1] < areas[2]
    assert areas[0] > 0.5
    assert areas[2] > 0.75


def test_cells_of_new_donors_give_nobody_away(cohort):
    _, _, _, rng = cohort
    profile = np.random.default_rng(0).gamma(2.0, 1.0, GENES)
    synthetic = rng.poisson(profile * rng.lognormal(0, 0.3, (1000, GENES))).astype(float)
    assert area(attack(cohort, synthetic, 50)) == pytest.approx(0.5, abs=0.2)


def test_true_positives_at_a_rate_of_false_ones(cohort):
    _, _, draw, rng = cohort
    found = attack(cohort, draw(rng.integers(0, 12, 1000)), 50)
    assert 0 <= found.true_positive_rate(0.01) <= found.true_positive_rate(0.05) <= found.true_positive_rate(1.0) == 1


def test_the_copula_prefers_its_own_cells():
    """Two sets with the same genes, one correlated: the density is not that of the histograms alone."""
    rng = np.random.default_rng(0)
    state = rng.normal(size=(500, 1))
    joined = np.maximum(state + 0.5 * rng.normal(size=(500, 10)), 0)
    single = rng.permuted(joined, axis=0)
    edges = level_edges(np.vstack([joined, single]))
    assert edges.shape == (10, LEVELS - 1)
    of_joined, of_single = Copula.fit(joined, edges), Copula.fit(single, edges)
    assert (of_joined.log_density(joined) - of_single.log_density(joined)).mean() > 1
    assert (of_joined.log_density(single) - of_single.log_density(single)).mean() < -1


def test_histograms_sum_to_one_and_hold_unseen_levels():
    cells = np.array([[0.0], [0.0], [1.0], [2.0]])
    copula = Copula.fit(cells, level_edges(cells))
    assert np.exp(copula.log_share).sum() == pytest.approx(1.0)
    assert np.isfinite(copula.log_density(np.array([[0.5], [99.0]]))).all()
