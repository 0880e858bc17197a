"""Cells at high noise in closed form: a Gaussian of each combination of labels, noised.

Around the mean that the denoiser gives at pure noise, the cells of a combination have the covariance

    U S U^T + D,

with the leading principal axes U of all cells within their combinations, the combination's own covariance S along
them, and the variances D of the rest. At signal and noise levels (alpha, sigma), noised cells then have the covariance
``alpha^2 (U S U^T + D) + sigma^2``. At high noise nothing else can be seen of them: there a denoiser explains hardly
more of held-out cells than this Gaussian (docs/study.md). So sampling need not begin at pure noise. Along the leading
axes, a cell starts near a training cell instead, see :mod:`wbdit.counts.cell_places`: with places there, the roots L
are taken times the bandwidths, and the rest of the cell's coordinates is added to the mean.

With ``A = alpha^2 D + sigma^2`` and ``B = A + alpha^2 U S U^T``, a root of B is

    sqrt(A) (I + A^-1/2 U H U^T A^-1/2)

so that one vector of noise gives one state, as the probability-flow ODE gives it where all is Gaussian. S = L L^T and
the eigenvectors V and eigenvalues theta of ``alpha^2 L^T U^T A^-1 U L`` give
``H = alpha^2 L V diag((sqrt(1 + theta) - 1) / theta) V^T L^T``.

The mean of the clean cells given noised cells x_t is

    mu + alpha (U S U^T + D) B^-1 (x_t - alpha mu),

around the mean mu. With ``r = A^-1 (x_t - alpha mu)`` and ``P = L V diag(1 / (1 + theta)) V^T L^T``, the Woodbury
identity turns it into ``mu + alpha (D r + sigma^2 A^-1 U P U^T r)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wbdit.counts.cell_places import LEADING, CellPlaces

AXES = 40


class NoisedGaussians(NamedTuple):
    """The Gaussians at one noise level.

    Attributes
    ----------
    rows, near
        :meth:`LabelGaussians.rows`, :meth:`LabelGaussians.near`.
    alpha, sigma
        Signal and noise level.
    axes
        U^T, ``(AXES, G)``.
    variances, deviations
        The diagonals of D, and roots of the diagonals A, ``(1 + M, G)``.
    roots
        L, ``(1 + M, AXES, AXES)``.
    coupling, posterior
        The matrices H, around the cells' places, and P, of the whole Gaussian, ``(1 + M, AXES, AXES)``.
    """

    rows: Callable[[Tensor], Tensor]
    near: Callable[[Tensor, Tensor, Tensor], Tensor | None]
    alpha: float
    sigma: float
    axes: Tensor
    roots: Tensor
    variances: Tensor
    deviations: Tensor
    coupling: Tensor
    posterior: Tensor

    def state(self, mean: Tensor, noise: Tensor, rows: Tensor, places: Tensor | None = None) -> Tensor:
        """Return noised cells.

        Parameters
        ----------
        mean, noise
            Mean of their combination and Gaussian noise, ``(B, G)``.
        rows
            :meth:`LabelGaussians.rows`.
        places
            :meth:`LabelGaussians.near`.

        Returns
        -------
        Noised cells ``(B, G)``.
        """
        with torch.autocast(noise.device.type, enabled=False):
            deviation = self.deviations[rows]
            seen = (noise / deviation) @ self.axes.mT
            moved = torch.einsum("bij,bj->bi", self.coupling[rows], seen)
            if places is not None:
                moved += self.alpha * torch.einsum("bij,bj->bi", self.roots[rows, :, :LEADING], places)
            return self.alpha * mean + deviation * noise + moved @ self.axes

    def posterior_mean(self, x_t: Tensor, mean: Tensor, rows: Tensor) -> Tensor:
        """Return the mean of clean cells ``(B, G)``, given noised cells ``(B, G)``, their mean and rows ``(B,)``."""
        with torch.autocast(x_t.device.type, enabled=False):
            diagonal = self.deviations[rows].square()
            rest = (x_t - self.alpha * mean) / diagonal
            along = torch.einsum("bij,bj->bi", self.posterior[rows], rest @ self.axes.mT) @ self.axes
            return mean + self.alpha * (self.variances[rows] * rest + self.sigma**2 * along / diagonal)


class LabelGaussians(nn.Module):
    """Gaussians of M combinations of labels, and one that is pooled over them, in row 0.

    Parameters
    ----------
    genes
        Number of genes G.
    combinations, columns
        Number of combinations M and of label columns C.
    cells
        Number of training cells whose places are kept; 0 in runs of older versions.

    Attributes
    ----------
    codes
        Labels of the combinations, ``(M, C)``.
    axes
        U^T, ``(AXES, G)``.
    roots
        L, lower triangular, ``(1 + M, AXES, AXES)``.
    variances
        The diagonals of D, ``(1 + M, G)``.
    places
        Places of training cells along the leading axes.
    timestep
        Where sampling begins, ``(1,)``; 0 before the Gaussians are known, and if they do not hold.
    """

    codes: Tensor
    axes: Tensor
    roots: Tensor
    variances: Tensor
    timestep: Tensor

    def __init__(self, genes: int, combinations: int, columns: int, cells: int = 0) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(combinations, columns, dtype=torch.int64))
        self.register_buffer("axes", torch.zeros(AXES, genes))
        self.register_buffer("roots", torch.zeros(1 + combinations, AXES, AXES))
        self.register_buffer("variances", torch.zeros(1 + combinations, genes))
        self.register_buffer("timestep", torch.zeros(1, dtype=torch.int64))
        self.places = CellPlaces(cells, combinations) if cells else None

    def rows(self, y: Tensor) -> Tensor:
        """Return the rows ``(B,)`` of cells with labels ``(B, C)``: 0 for a combination without a Gaussian."""
        same = (y[:, None] == self.codes).all(2)  # (B, M), at most one in a row
        return (same * torch.arange(1, 1 + len(self.codes), device=y.device)).sum(1)

    def near(self, rows: Tensor, log_library: Tensor, normal: Tensor) -> Tensor | None:
        """Return coordinates ``(B, LEADING)`` of cells to start near, see :class:`wbdit.counts.cell_places.CellPlaces`.

        None for a run of an older version, whose cells start anywhere in the Gaussian.
        """
        return None if self.places is None else self.places(rows, log_library, normal)

    def at(self, alpha: float, sigma: float) -> NoisedGaussians:
        """Return the Gaussians at signal and noise levels, computed in fp64."""
        axes, variances = self.axes.double(), self.variances.double()
        diagonal = alpha**2 * variances + sigma**2
        inner = torch.einsum("ig,mg,jg->mij", axes, 1 / diagonal, axes)
        theta, turned = _turned(self.roots.double(), alpha**2 * inner)
        posterior = (turned / (1 + theta)[:, None]) @ turned.mT
        theta, turned = _turned(self._roots_around_places(), alpha**2 * inner)
        gain = 1 / (torch.sqrt(1 + theta) + 1)  # (sqrt(1 + theta) - 1) / theta, exact at 0
        coupling = alpha**2 * (turned * gain[:, None]) @ turned.mT
        tables = diagonal.sqrt().float(), coupling.float(), posterior.float()
        return NoisedGaussians(self.rows, self.near, alpha, sigma, self.axes, self.roots, self.variances, *tables)

    def _roots_around_places(self) -> Tensor:
        """Return the roots times the bandwidths of the places, fp64."""
        roots = self.roots.double().clone()
        if self.places is not None:
            roots[:, :, :LEADING] *= self.places.bandwidths[:, None, None]
        return roots


def _turned(roots: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues theta of ``L^T inner L``, ``(1 + M, AXES)``, and L times the eigenvectors."""
    theta, vectors = torch.linalg.eigh(roots.mT @ inner @ roots)
    return theta.clamp(min=0), roots @ vectors
