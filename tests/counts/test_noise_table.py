"""The table of outputs at pure noise: what it is fitted to, and what it says between and beyond its knots."""

import pytest
import torch

from wbdit.counts.noise_table import KNOTS, MOST_VALUES, NoiseTable


def fitted(function, library):
    """Return a table with two combinations; the second is fitted to a function of the log library size."""
    table = NoiseTable(combinations=2, channels=2, genes=3)
    table.fit(1, library, function(library)[:, None, None] * torch.arange(1.0, 7.0).view(2, 3))
    return table


def test_a_line_is_kept_up_to_the_ridge():
    library = torch.linspace(6, 9, 64)
    table = fitted(lambda at: 2 * at - 14, library)
    at = torch.tensor([6.0, 6.77, 7.5, 9.0])
    found = table(torch.ones(4, dtype=torch.int64), at)
    wanted = (2 * at - 14)[:, None, None] * torch.arange(1.0, 7.0).view(2, 3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02 * float(wanted.max()))
    assert table.knots[1].tolist() == pytest.approx(torch.linspace(6, 9, KNOTS).tolist())


def test_a_curve_is_followed_and_noise_averaged():
    torch.manual_seed(0)
    library = torch.randn(64).sort().values
    noisy = fitted(lambda at: at**2 + 0.5 * torch.randn(64), library)
    at = torch.linspace(-1, 1, 20)
    error = noisy(torch.ones(20, dtype=torch.int64), at)[:, 0, 0] - at**2
    assert error.square().mean().sqrt() < 0.25  # a straight line is 0.3 away without the noise, a single output 0.5


def test_beyond_the_knots_it_is_the_outer_output():
    table = fitted(lambda at: at, torch.linspace(6, 9, 64))
    ends = table(torch.ones(4, dtype=torch.int64), torch.tensor([-1.0, 6.0, 9.0, 99.0]))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[2], ends[3])


def test_cells_of_one_library_size_give_the_mean_output():
    table = NoiseTable(combinations=1, channels=1, genes=2)
    table.fit(0, torch.full((64,), 7.0), torch.arange(64.0)[:, None, None].expand(64, 1, 2))
    found = table(torch.zeros(3, dtype=torch.int64), torch.tensor([6.0, 7.0, 8.0]))
    torch.testing.assert_close(found, torch.full((3, 1, 2), 31.5))


def test_its_size_is_limited():
    assert NoiseTable.fits(100, 2, 2000)
    assert not NoiseTable.fits(100, 2, MOST_VALUES // (200 * KNOTS) + 1)
