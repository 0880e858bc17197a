"""Where the cells of a combination of labels lie along the leading axes of their Gaussian: a smoothed bootstrap.

A Gaussian has the covariance of the cells, but not their shape: not the groups within a label, the tails, or the states
that go with few or many counts. So along the first :data:`LEADING` axes, a cell starts near a training cell of its
labels. With coordinates y of that cell, in which the Gaussian is a standard one, it starts at

    sqrt(1 - h^2) y + h e,    e ~ N(0, 1),

which leaves the covariance as it is (Silverman and Young 1987). The bandwidth for d coordinates of n cells is
``h = (4 / ((d + 2) n))^(1 / (d + 4))`` (Silverman 1986, section 4.3): about 0.6 for a thousand cells. The training cell
is drawn by library size: the normal scores of the two library sizes, among those of the combination, have the
correlation :data:`CORRELATION`. So any training cell is as likely as another, and in a large combination the nearest in
library size are the most likely.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEADING = 12
CORRELATION = 0.8  # from .7 to .9, the held-out likelihood is the same (docs/study.md)
FEWEST = 20  # cells of a combination; with fewer, its Gaussian alone
APART = 64.0  # natural logarithms of library sizes are within 0 and half of it


class CellPlaces(nn.Module):
    """Places of n training cells along the leading axes, for M combinations of labels.

    Parameters
    ----------
    cells, combinations
        Number of training cells n and of combinations M.

    Attributes
    ----------
    coordinates
        The places, in coordinates in which each combination's Gaussian is a standard one, ``(n, LEADING)``. Cells are
        sorted by combination, then by library size.
    log_library
        Natural logarithms of the cells' library sizes, ``(n,)``.
    ends
        Number of cells up to and with each combination, ``(1 + M,)``; 0 for row 0, the pooled Gaussian.

    Examples
    --------
    >>> from wbdit.counts.cell_places import CellPlaces
    >>> places = CellPlaces(cells=100, combinations=1)
    >>> _ = places.ends.copy_(torch.tensor([0, 100])), places.coordinates.fill_(1), places.log_library.fill_(7)
    >>> round(float(places.bandwidths[1]), 3)
    0.693
    >>> places(torch.tensor([1]), torch.tensor([7.0]), torch.tensor([0.2])).shape
    torch.Size([1, 12])
    """

    coordinates: Tensor
    log_library: Tensor
    ends: Tensor

    def __init__(self, cells: int, combinations: int) -> None:
        super().__init__()
        self.register_buffer("coordinates", torch.zeros(cells, LEADING))
        self.register_buffer("log_library", torch.zeros(cells))
        self.register_buffer("ends", torch.zeros(1 + combinations, dtype=torch.int64))

    @property
    def sizes(self) -> Tensor:
        """Number of cells in each row, ``(1 + M,)``: 0 in row 0."""
        return self.ends.diff(prepend=self.ends[:1])

    @property
    def bandwidths(self) -> Tensor:
        """The bandwidth h in each row, ``(1 + M,)`` fp64; 1 where the Gaussian stands alone."""
        sizes = self.sizes
        h = (4 / ((LEADING + 2) * sizes.clamp(min=1).double())) ** (1 / (LEADING + 4))
        return torch.where(sizes >= FEWEST, h, 1.0)

    def forward(self, rows: Tensor, log_library: Tensor, normal: Tensor) -> Tensor:
        """Return what training cells contribute to the coordinates of new cells, ``sqrt(1 - h^2) y``.

        Parameters
        ----------
        rows
            Combinations of labels ``(B,)``, see :meth:`wbdit.counts.closed_form.LabelGaussians.rows`.
        log_library
            Natural logarithms of library sizes ``(B,)``.
        normal
            One normal number per cell ``(B,)``, which draws the training cell.

        Returns
        -------
        Coordinates ``(B, LEADING)`` fp32, 0 where the Gaussian stands alone.
        """
        if not len(self.coordinates):
            return normal.new_zeros(len(rows), LEADING, dtype=torch.float32)
        ends, sizes = self.ends[rows], self.sizes[rows]
        # of each cell, its row: repeating the rows by their sizes would wait for a GPU
        own = torch.searchsorted(self.ends, torch.arange(len(self.coordinates), device=rows.device), right=True)
        known, wanted = (APART * row + lib.double() for row, lib in ((own, self.log_library), (rows, log_library)))
        left, right = (torch.searchsorted(known, wanted, right=side) - (ends - sizes) for side in (False, True))
        rank = ((left + right) / 2).clamp(min=0.5).minimum(sizes - 0.5).clamp(min=0.5)
        score = torch.special.ndtri(rank / sizes.clamp(min=1))
        score = CORRELATION * score + (1 - CORRELATION**2) ** 0.5 * normal.double()
        place = (torch.special.ndtr(score) * sizes).long().minimum(sizes - 1).clamp(min=0)
        found = self.coordinates[(ends - sizes + place).clamp(max=len(self.coordinates) - 1)]
        return (found * (1 - self.bandwidths[rows].square()).sqrt()[:, None]).float()
