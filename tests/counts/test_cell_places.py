"""Places of training cells along the leading axes: which cell is drawn, how far it is moved, which rows have none."""

import numpy as np
import pytest
import torch

from wbdit.counts.cell_places import CORRELATION, FEWEST, LEADING, CellPlaces
from wbdit.counts.closed_form import AXES, LabelGaussians

SIZES = (300, FEWEST - 1, 50)


@pytest.fixture
def places():
    """Three combinations; each cell's coordinates are its number."""
    made = CellPlaces(sum(SIZES), combinations=3)
    made.coordinates.copy_(torch.arange(sum(SIZES))[:, None].expand(-1, LEADING))
    made.log_library.copy_(torch.cat([torch.linspace(5, 9, n) for n in SIZES]))
    made.ends.copy_(torch.tensor([0, *np.cumsum(SIZES)]))
    return made


def drawn(places, row, log_library, normal):
    """Return the numbers of the cells that are drawn."""
    n = len(normal)
    found = places(torch.full((n,), row), torch.full((n,), log_library), normal)
    assert (found == found[:, :1]).all()
    return found[:, 0].double() / (1 - places.bandwidths[row] ** 2).sqrt()


def test_bandwidths_are_silvermans(places):
    wanted = [1, (4 / (14 * 300)) ** (1 / 16), 1, (4 / (14 * 50)) ** (1 / 16)]
    assert places.bandwidths.tolist() == pytest.approx(wanted)


def test_a_gaussian_alone_gets_nothing(places):
    for row in (0, 2):
        assert not places(torch.tensor([row]), torch.tensor([7.0]), torch.zeros(1)).any()
    assert not CellPlaces(0, 0)(torch.zeros(3, dtype=torch.int64), torch.zeros(3), torch.zeros(3)).any()


def test_cells_are_drawn_from_their_combination(places):
    normal = torch.linspace(-4, 4, 401)
    for row, (first, last) in {1: (0, 299), 3: (300 + SIZES[1], sum(SIZES) - 1)}.items():
        for library in (-3.0, 5.0, 7.1, 9.0, 40.0):
            found = drawn(places, row, library, normal)
            assert (found.diff() >= -1e-3).all()
            assert found.min() >= first - 1e-3
            assert found.max() <= last + 1e-3


def test_every_training_cell_is_as_likely_as_another(places):
    torch.manual_seed(0)
    wanted = places.log_library[torch.randint(300, (60_000,))]
    found = places(torch.ones(60_000, dtype=torch.int64), wanted, torch.randn(60_000))[:, 0]
    number = (found.double() / (1 - places.bandwidths[1] ** 2).sqrt()).round().long()
    counts = torch.bincount(number, minlength=300).double()
    assert ((counts - 200) / 200**0.5).square().mean() < 1.5  # 1 is expected of independent draws
    scores = torch.special.ndtri((number + 0.5) / 300), torch.special.ndtri(((wanted - 5) / 4).clamp(0.002, 0.998))
    assert torch.corrcoef(torch.stack(scores).double())[0, 1] == pytest.approx(CORRELATION, abs=0.02)


def test_equal_library_sizes_are_drawn_alike():
    places = CellPlaces(100, 1)
    places.coordinates.copy_(torch.arange(100)[:, None].expand(-1, LEADING))
    places.log_library.fill_(7)
    places.ends.copy_(torch.tensor([0, 100]))
    assert drawn(places, 1, 7.0, torch.zeros(1)).item() == pytest.approx(50)


def test_states_keep_the_covariance_of_the_gaussian():
    """With places that have the covariance of the Gaussian, the noised cells have that of the noised Gaussian."""
    torch.manual_seed(0)
    genes, n, alpha, sigma = 60, 4000, 0.6, 0.8
    made = LabelGaussians(genes, combinations=1, columns=1, cells=n)
    made.axes.copy_(torch.linalg.qr(torch.randn(genes, AXES))[0].T)
    made.roots.copy_(torch.tril(torch.randn(2, AXES, AXES)))
    made.variances.copy_(torch.rand(2, genes))
    white = torch.randn(n, LEADING, dtype=torch.float64)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T @ white / n)).mT
    made.places.coordinates.copy_(white)
    made.places.ends.copy_(torch.tensor([0, n]))
    h = made.places.bandwidths[1]
    at, rows = made.at(alpha, sigma), torch.ones(n, dtype=torch.int64)
    of_places = at.state(torch.zeros(n, genes), torch.zeros(n, genes), rows, ((1 - h**2).sqrt() * white).float())
    of_noise = at.state(torch.zeros(genes, genes), torch.eye(genes), rows[:genes])
    found = (of_places.double().T @ of_places.double()) / n + of_noise.double().T @ of_noise.double()
    axes, L = made.axes.double(), made.roots[1].double()
    of_cells = axes.T @ L @ L.T @ axes + torch.diag(made.variances[1].double())
    wanted = alpha**2 * of_cells + sigma**2 * torch.eye(genes)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.max()))
