"""Gaussians of combinations of labels, noised: their covariance, the mean of clean cells, and which cells get which."""

import pytest
import torch

from wbdit.counts.closed_form import AXES, LabelGaussians

GENES = 70


@pytest.fixture
def gaussians():
    torch.manual_seed(0)
    made = LabelGaussians(GENES, combinations=3, columns=2)
    made.codes.copy_(torch.tensor([[0, 0], [0, 1], [2, 1]]))
    made.axes.copy_(torch.linalg.qr(torch.randn(GENES, AXES))[0].T)
    made.roots.copy_(torch.tril(torch.randn(4, AXES, AXES)))
    made.variances.copy_(torch.rand(4, GENES))
    return made


def test_rows(gaussians):
    y = torch.tensor([[0, 1], [2, 0], [2, 1], [3, 2], [0, 0]])
    assert gaussians.rows(y).tolist() == [2, 0, 3, 0, 1]
    assert LabelGaussians(GENES, combinations=1, columns=0).rows(torch.zeros(2, 0, dtype=torch.int64)).tolist() == [
        1,
        1,
    ]
    assert LabelGaussians(GENES, combinations=0, columns=1).rows(y[:, :1]).tolist() == [0] * 5


@pytest.mark.parametrize(("alpha", "sigma"), [(0.0, 1.0), (0.1, 0.995), (0.6, 0.8), (1.0, 1e-3)])
def test_states_have_the_covariance_of_the_noised_gaussian(gaussians, alpha, sigma):
    """A linear map of white noise: the images of all unit vectors give its covariance."""
    at, mean = gaussians.at(alpha, sigma), torch.randn(GENES, dtype=torch.float64)
    for row in range(4):
        axes, L = gaussians.axes.double(), gaussians.roots[row].double()
        of_cells = axes.T @ L @ L.T @ axes + torch.diag(gaussians.variances[row].double())
        rows = torch.full((GENES,), row)
        states = at.state(mean.float().expand(GENES, -1), torch.eye(GENES), rows).double()
        moved = states - alpha * mean
        wanted = alpha**2 * of_cells + sigma**2 * torch.eye(GENES)
        torch.testing.assert_close(moved.T @ moved, wanted, rtol=1e-4, atol=1e-4 * float(wanted.max()))


@pytest.mark.parametrize(("alpha", "sigma"), [(0.0, 1.0), (0.1, 0.995), (0.6, 0.8), (0.995, 0.1)])
def test_the_posterior_mean_is_the_dense_formula(gaussians, alpha, sigma):
    x_t, mean, eye = torch.randn(6, GENES), torch.randn(6, GENES), torch.eye(GENES, dtype=torch.float64)
    rows = torch.tensor([0, 1, 2, 3, 3, 0])
    wanted = []
    for cell, row in enumerate(rows):
        axes, L = gaussians.axes.double(), gaussians.roots[row].double()
        of_cells = axes.T @ L @ L.T @ axes + torch.diag(gaussians.variances[row].double())
        rest = x_t[cell].double() - alpha * mean[cell].double()
        seen = torch.linalg.solve(alpha**2 * of_cells + sigma**2 * eye, rest)
        wanted.append(mean[cell] + alpha * of_cells @ seen)
    found = gaussians.at(alpha, sigma).posterior_mean(x_t, mean, rows)
    torch.testing.assert_close(found.double(), torch.stack(wanted), rtol=1e-4, atol=1e-4)


def test_pure_noise_stays_as_it_is(gaussians):
    noise = torch.randn(5, GENES)
    torch.testing.assert_close(gaussians.at(0.0, 1.0).state(torch.randn(5, GENES), noise, torch.arange(5) % 4), noise)


def test_no_variance_adds_nothing():
    made, noise, mean = LabelGaussians(GENES, 1, 1), torch.randn(3, GENES), torch.randn(3, GENES)
    state = made.at(0.6, 0.8).state(mean, noise, torch.tensor([0, 1, 1]))
    torch.testing.assert_close(state, 0.6 * mean + 0.8 * noise)
