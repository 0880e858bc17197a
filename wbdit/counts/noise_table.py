"""The denoiser's output at pure noise as a table, by labels and library size.

Pure noise says nothing of a cell. What the denoiser gives there depends on labels and library size, and on what it
reads into the noise. A table of its mean over the noise replaces a call of the denoiser: for each combination of
labels, the output at :data:`KNOTS` library sizes, linear in between in the logarithm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

KNOTS = 7
MOST_VALUES = 2**24  # of a table
RIDGE = 0.05  # in observations


class NoiseTable(nn.Module):
    """Outputs of a denoiser at pure noise, for M combinations of labels.

    Parameters
    ----------
    combinations, channels, genes
        Number of combinations M, of the denoiser's output channels C and of genes G.

    Attributes
    ----------
    knots
        Natural logarithms of library sizes, ascending, ``(M, KNOTS)``.
    outputs
        The mean outputs there, ``(M, KNOTS, C, G)``.

    Examples
    --------
    >>> from wbdit.counts.noise_table import NoiseTable
    >>> table = NoiseTable(combinations=1, channels=1, genes=2)
    >>> _ = table.knots.copy_(torch.arange(7.0)), table.outputs.copy_(table.knots[..., None, None].expand(1, 7, 1, 2))
    >>> table(torch.tensor([0, 0]), torch.tensor([2.5, 9.0])).tolist()
    [[[2.5, 2.5]], [[6.0, 6.0]]]
    """

    knots: Tensor
    outputs: Tensor

    def __init__(self, combinations: int, channels: int, genes: int) -> None:
        super().__init__()
        self.register_buffer("knots", torch.zeros(combinations, KNOTS))
        self.register_buffer("outputs", torch.zeros(combinations, KNOTS, channels, genes))

    @staticmethod
    def fits(combinations: int, channels: int, genes: int) -> bool:
        """Return whether a table of this size has at most :data:`MOST_VALUES` values."""
        return combinations * KNOTS * channels * genes <= MOST_VALUES

    def forward(self, rows: Tensor, log_library: Tensor) -> Tensor:
        """Return the outputs ``(B, C, G)`` of cells with combinations ``(B,)`` and log library sizes ``(B,)``.

        Beyond the outer knots, it is the output at the outer knot: rates follow the library size without the denoiser.
        """
        knots = self.knots[rows]
        below, share = _place(knots, log_library)
        return torch.lerp(self.outputs[rows, below], self.outputs[rows, below + 1], share[:, None, None])

    @torch.no_grad()
    def fit(self, row: int, log_library: Tensor, outputs: Tensor) -> None:
        """Fit a combination's entry to outputs ``(n, C, G)`` at log library sizes ``(n,)``, by least squares.

        Its knots are quantiles of the library sizes. A weak ridge keeps knots that are equal near the mean output.
        """
        quantiles = torch.linspace(0, 1, KNOTS, dtype=torch.float64, device=log_library.device)
        knots = torch.quantile(log_library.double(), quantiles)
        below, share = _place(knots.expand(len(log_library), -1), log_library.double())
        hats = torch.zeros(len(log_library), KNOTS, dtype=torch.float64, device=knots.device)
        hats.scatter_(1, below[:, None], 1 - share[:, None]).scatter_add_(1, below[:, None] + 1, share[:, None])
        mean = outputs.double().mean(0)
        inner = hats.T @ hats + RIDGE * torch.eye(KNOTS, dtype=torch.float64, device=knots.device)
        fitted = torch.linalg.solve(inner, hats.T @ (outputs.double() - mean).flatten(1))
        self.knots[row] = knots.float()
        self.outputs[row] = (mean + fitted.view(KNOTS, *mean.shape)).float()


def _place(knots: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Return the knot below each value ``(B,)``, given its knots ``(B, KNOTS)``, and the share of the next one."""
    below = (at[:, None] >= knots[:, 1:-1]).sum(1)
    left, right = (knots.gather(1, below[:, None] + i)[:, 0] for i in (0, 1))
    return below, ((at - left) / (right - left).clamp(min=1e-6)).clamp(0, 1)
