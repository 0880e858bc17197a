"""Run all blocks at once on small, ragged shapes, for compute-sanitizer: every launch, every mask."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import uninstalled  # noqa: F401

from wbdit import ops


def main() -> None:
    d, heads, batch, tokens = 96, 2, 2, 37
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    matrix = [(draw(d, d) / d**0.5).bfloat16()]
    rows = [draw(batch, d) for _ in range(8)]
    out = ops.run_blocks(draw(batch, tokens, d), rows, matrix, matrix, [draw(d).bfloat16()], matrix, heads)
    torch.cuda.synchronize()
    assert out.isfinite().all()


if __name__ == "__main__":
    main()
