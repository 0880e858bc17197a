"""Roofline of each GPU launch: its bytes over the copy speed or its FLOPs over the product speed, whichever is longer.

    python bench/roofline.py                                # predicted for an H100: 3.0 TB/s, 800 TFLOP/s
    python bench/roofline.py bench/out/gpu-A.jsonl          # with the times that a run of bench/gpu.sh A measured

Each operand counts as read once and each result as written once; data that stays in the L2 cache is not counted. FLOPs
are those of matrix products. With a file, the ceilings are those of that run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "gpu"))

H100 = (3.0e12, 800e12)  # bytes and bf16 FLOPs per second
FP32 = 4
LEVELS = 10  # count levels per gene, on average
ROUNDS = 4  # passes of count_draw before the draw


@dataclass(frozen=True)
class Shape:
    """Sizes of a launch: cells, tokens per cell, width, heads, genes."""

    batch: int
    tokens: int
    d: int
    heads: int
    genes: int

    @property
    def values(self) -> int:
        """Number of values in one token tensor."""
        return self.batch * self.tokens * self.d


@dataclass(frozen=True)
class Cost:
    """Bytes that a launch moves and FLOPs of its products."""

    bytes: float
    flops: float = 0.0

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Return the time of the slower of the two."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


def costs(s: Shape, low: int = 2) -> dict[str, Cost]:
    """Return the cost of every launch that `bench/gpu.sh` times, by name; `low` is the bytes per product operand."""
    n, wide = s.values, FP32
    cells = s.batch * s.genes
    product = 2 * n * s.d
    scores = 2 * n * s.tokens  # FLOPs of one product of tokens with tokens, all heads together
    return {
        "adaln": Cost(n * (wide + low)),
        "adaln_backward": Cost(n * (low + 2 * wide)),
        "gated_adaln": Cost(n * 2 * (wide + low)),
        "gated_adaln_backward": Cost(n * (low + 2 * wide + low + wide + low)),
        "ista_adaln": Cost(n * (2 * wide + 3 * low)),
        "ista_adaln_backward": Cost(n * (low + 2 * wide + 2 * low + wide + low)),
        "ista": Cost(n * 3 * low),
        "ista_backward": Cost(n * 3 * low),
        "mssa": Cost(n * 2 * low, 2 * scores),
        "mssa_backward": Cost(n * 4 * low, 5 * scores),
        "block_init": Cost(n * (wide + 2 * low)),
        "block_project": Cost(n * 2 * low, product),
        "block_compress": Cost(n * 4 * low, product),
        "block_sparsify": Cost(n * 4 * low, product),
        "embed_patches": Cost(n * 2 * low + cells * FP32),
        "read_patches": Cost(n * low + cells * 2 * FP32),
        "noising": Cost(cells * 3 * FP32),
        "sampler_step": Cost(cells * 4 * FP32),
        "normal": Cost(cells * FP32),
        "count_mean": Cost(cells * 4 * FP32 + 3 * s.genes * LEVELS * FP32),
        "count_nll": Cost(cells * (4 * FP32 + 1) + 3 * s.genes * LEVELS * FP32),
        "count_draw": Cost((ROUNDS + 1) * (cells + s.genes * LEVELS) * 3 * FP32 + cells * 2 * FP32),
        "count_nll_backward": Cost(cells * (6 * FP32 + 1) + 3 * s.genes * LEVELS * FP32),
    }


def launch_of(row: str) -> str:
    """Return the launch that a row measures: the first word of its name."""
    return row.split()[0].rstrip(",")


def predicted(name: str, s: Shape, ceilings: tuple[float, float] = H100) -> float | None:
    """Return a launch's roofline in seconds; a row's name begins with its launch's name."""
    cost = costs(s).get(launch_of(name))
    return None if cost is None else cost.seconds(*ceilings)


def main(arguments: list[str]) -> int:
    """Print predicted times, and measured times if a file is given."""
    from rows import read

    published = Shape(1024, 200, 768, 8, 2000)
    if not arguments:
        print("| launch | roofline, us |\n|---|---|")
        for name in costs(published):
            print(f"| {name} | {predicted(name, published) * 1e6:.1f} |")
        return 0
    path = Path(arguments[0])
    if not path.is_file():
        print(f"no file {path}: run bench/gpu.sh A to write one", file=sys.stderr)
        return 2
    print("| launch | roofline, us | measured, us | share |\n|---|---|---|---|")
    for line in read(path):
        if "roofline" in line and "seconds" in line:
            share = line["roofline"] / line["seconds"]
            print(f"| {line['row']} | {line['roofline'] * 1e6:.1f} | {line['seconds'] * 1e6:.1f} | {share:.0%} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
