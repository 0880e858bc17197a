"""List everything that a GPU would run in one call, in order, with its predicted time. Needs no GPU.

    python bench/launch_list.py --model published --task step
    python bench/launch_list.py --model small --task forward --blocks unfused --json
    python bench/launch_list.py --markdown --into kernels/README.md

The model itself runs, on tensors that are said to be on a GPU and have no data (``pretend.py``). Each launch comes with
the bytes that it reads and writes, each tensor once, and the FLOPs of its matrix products. Its predicted time is the
longer of bytes by bandwidth and FLOPs by speed. Starting a kernel is not in it, which takes a short launch most time.
"""

from __future__ import annotations

import json
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import uninstalled  # noqa: F401
from machine import commit
from roofline import H200, Cost

BF16 = 2  # bytes
MULTIPROCESSORS = 132  # of an H100 and an H200, as their L2 cache
L2 = 50.0  # MB
SHORT = 1.0  # us: PyTorch's ops below are not listed one by one in Markdown
BLOCKS = ("unfused", "fused")
OVERVIEW = (("published", "step"), ("small", "step"), ("published", "forward"), ("small", "forward"))
BEGIN, END = "<!-- launches: python bench/launch_list.py --markdown --into kernels/README.md -->", "<!-- /launches -->"


@dataclass(frozen=True)
class Card:
    """A GPU: its architecture, bandwidth in bytes and products in FLOPs per second, and its L2 cache in bytes."""

    arch: int
    bandwidth: float
    speed: float
    l2: float


@dataclass(frozen=True)
class Listing:
    """The launches of a task, and what was asked."""

    model: str
    task: str
    cells: int
    card: Card
    blocks: str | None
    launches: Sequence[Any]  # recorder.Launch
    patches: int
    token_tensor: tuple[int, int, int]  # cells, tokens, width

    def seconds(self, launch: Any, cached: int = 0) -> float:
        """Return a launch's predicted time, if `cached` bytes need not be read from memory."""
        cost = launch.cost
        return Cost(cost.bytes - cached, cost.flops).seconds(self.card.bandwidth, self.card.speed)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict per launch, in order."""
        cached = from_cache(self.launches, self.card.l2)
        return [
            {
                "number": number,
                "kernel": launch.kernel,
                "ours": launch.ours,
                "replayed": launch.replayed,
                "grid": None if launch.grid is None else list(launch.grid),
                "read": launch.read,
                "cached": in_cache,
                "written": launch.written,
                "flops": launch.flops,
                "microseconds": 1e6 * self.seconds(launch),
            }
            for number, (launch, in_cache) in enumerate(zip(self.launches, cached, strict=True), 1)
        ]

    @property
    def totals(self) -> dict[str, float]:
        """Numbers of launches, token tensors moved, and predicted times."""
        cells, tokens, width = self.token_tensor
        values = cells * tokens * width, cells * self.patches * width  # with and without the token for the whole cell
        moved = [o.bytes for one in self.launches for o in (*one.reads, *one.writes) if o.values in values]
        ours = sum(launch.ours for launch in self.launches)
        cached = from_cache(self.launches, self.card.l2)
        spared = sum(map(self.seconds, self.launches, cached))
        return {
            "launches": len(self.launches),
            "ours": ours,
            "pytorch": len(self.launches) - ours,
            "replayed": sum(launch.replayed for launch in self.launches),
            "token_tensors": sum(moved) / (BF16 * cells * tokens * width),
            "milliseconds": 1e3 * sum(map(self.seconds, self.launches)),
            "milliseconds_with_cache": 1e3 * spared,
        }


def from_cache(launches: Sequence[Any], capacity: float) -> list[int]:
    """Return the bytes of each launch's reads that the L2 cache still holds, if it drops what was used longest ago."""
    used: OrderedDict[int, int] = OrderedDict()  # bytes by storage, the most recently used last
    found = []
    for launch in launches:
        held, left = set(), capacity
        for storage, size in reversed(used.items()):
            left -= size
            if left < 0:
                break
            held.add(storage)
        found.append(sum(operand.bytes for operand in launch.reads if operand.storage in held))
        for operand in (*launch.reads, *launch.writes):
            used[operand.storage] = max(operand.bytes, used.pop(operand.storage, 0))
    return found


def listing(model: str, task: str, cells: int, card: Card, blocks: str | None = None) -> Listing:
    """Run a task of a model on a pretended GPU and return its launches."""
    from launch_tasks import MODELS, TASKS
    from pretend import gpu

    chosen = MODELS[model]
    with gpu(card.arch) as recorder:
        recorder.choose = chooser(blocks)
        launches = TASKS[task](recorder, chosen, cells)
    shape = cells, chosen.tokens, chosen.preset.model["hidden_size"]
    return Listing(model, task, cells, card, blocks, launches, chosen.patches, shape)


def chooser(blocks: str | None) -> Callable[[str, Sequence[Any]], Any]:
    """Return the function that chooses among an op's candidates: the first, or a given way to run the blocks."""
    from pretend import DEVICE
    from wbdit.kernels import blocks as ways

    def choose(op: str, candidates: Sequence[Any]) -> Any:
        if op not in ("denoise", "run_blocks") or blocks is None:
            return candidates[0]
        if op == "denoise":  # the last leaves the blocks to run_blocks
            return candidates[-1 if blocks == "unfused" else 0]
        offered = *candidates, *ways.candidates(DEVICE)  # wide models are not offered the latter
        return next(way for way in offered if isinstance(way, ways.Unfused) == (blocks == "unfused"))

    return choose


# output


def as_text(found: Listing) -> Iterator[str]:
    """Yield the lines of a table for a terminal, and of the totals."""
    yield _line("no", "kernel", "programs", "per SM", "read, MB", "of it in L2", "written, MB", "GFLOP", "us", "graph")
    for row in found.rows:
        sizes = (f"{row[name] / 1e6:.3f}" for name in ("read", "cached", "written"))
        flops = "?" if row["flops"] is None else f"{row['flops'] / 1e9:.3f}"
        graph = "yes" if row["replayed"] else ""
        yield _line(row["number"], row["kernel"], *_programs(row), *sizes, flops, f"{row['microseconds']:.2f}", graph)
    yield ""
    yield from summary(found)


def summary(found: Listing) -> Iterator[str]:
    """Yield the totals in words."""
    totals, card = found.totals, found.card
    shape = " x ".join(f"{size:,}" for size in found.token_tensor)
    yield (
        f"{totals['launches']} launches: {totals['ours']} of ours, {totals['pytorch']} of PyTorch's; "
        f"a CUDA graph replays {totals['replayed']} of them"
    )
    yield f"token tensors moved: {totals['token_tensors']:.1f}, each {shape} in bf16"
    yield (
        f"predicted: {totals['milliseconds']:.3f} ms at {card.bandwidth / 1e12:g} TB/s and "
        f"{card.speed / 1e12:g} TFLOP/s; {totals['milliseconds_with_cache']:.3f} ms if reads from the L2 cache "
        f"({card.l2 / 1e6:g} MB) cost nothing"
    )
    unknown = sorted({launch.kernel for launch in found.launches if launch.flops is None})
    if unknown:
        yield f"no FLOPs known of {', '.join(unknown)}: add them to FLOPS in bench/roofline.py"


def as_json(found: Listing) -> str:
    """Return the rows and totals as one line of JSON."""
    asked = {"model": found.model, "task": found.task, "cells": found.cells, "blocks": found.blocks}
    return json.dumps({**asked, **vars(found.card), "launches": found.rows, "totals": found.totals})


def as_markdown(cells: int, card: Card, blocks: str | None) -> Iterator[str]:
    """Yield the section of kernels/README.md: the totals of some tasks, and the launches of a step of each model."""
    listings = [listing(model, task, cells, card, blocks) for model, task in OVERVIEW]
    yield f"{cells:,} cells on sm_{card.arch}, code of commit {commit()}. A launch takes the longer of its bytes at"
    yield f"{card.bandwidth / 1e12:g} TB/s and its FLOPs at {card.speed / 1e12:g} TFLOP/s; see `bench/README.md`.\n"
    yield "| model | task | launches | ours | PyTorch's | in the graph | token tensors moved | ms | ms, L2 reads free |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for found in listings:
        counts = (found.totals[name] for name in ("launches", "ours", "pytorch", "replayed"))
        rest = (f"{found.totals[name]:.1f}" for name in ("token_tensors",))
        times = (f"{found.totals[name]:.2f}" for name in ("milliseconds", "milliseconds_with_cache"))
        yield _cells(found.model, found.task, *counts, *rest, *times)
    for found in listings:
        if found.task == "step":
            yield f"\nA step of `{found.model}`, equal launches together, in the order of their first:\n"
            yield from _grouped(found)


def _grouped(found: Listing) -> Iterator[str]:
    """Yield a table of equal launches; PyTorch's short ones are one row."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found.rows:
        alike = row["kernel"], row["grid"] and tuple(row["grid"]), row["read"], row["written"], row["flops"]
        is_short = not row["ours"] and row["microseconds"] < SHORT
        groups.setdefault(() if is_short else alike, []).append(row)
    short = groups.pop((), [])
    yield "| launches | kernel | programs | per SM | MB read | MB written | GFLOP | us each |"
    yield "|---|---|---|---|---|---|---|---|"
    for rows in groups.values():
        first = rows[0]
        flops = "?" if first["flops"] is None else f"{first['flops'] / 1e9:.1f}"
        sizes = f"{first['read'] / 1e6:.1f}", f"{first['written'] / 1e6:.1f}", flops, f"{first['microseconds']:.1f}"
        yield _cells(len(rows), f"`{first['kernel']}`", *_programs(first), *sizes)
    if short:
        yield _cells(len(short), f"others of PyTorch's, under {SHORT:g} us each", *[""] * 6)


def _cells(*values: object) -> str:
    return f"| {' | '.join(map(str, values))} |"


def _programs(row: dict[str, Any]) -> tuple[str, str]:
    """Return the number of a launch's programs, and per multiprocessor of an H200; PyTorch's are unknown."""
    if row["grid"] is None:
        return "", ""
    programs = math.prod(row["grid"])
    return f"{programs:,}", f"{programs / MULTIPROCESSORS:.1f}"


def _line(*values: object) -> str:
    number, kernel, *rest, graph = map(str, values)
    return f"{number:>5}  {kernel:<28}" + "".join(f"{value:>13}" for value in rest) + f"  {graph}".rstrip()


def put_between(page: Path, lines: Iterator[str]) -> None:
    """Replace what is between the two marks of a page."""
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise click.UsageError(f"{page} has no lines {BEGIN} and {END} to write between")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text("\n".join([before + BEGIN, "", *lines, "", END]) + after)


@click.command()
@click.option("--model", type=click.Choice(["published", "base", "small"]), default="published", show_default=True)
@click.option("--task", type=click.Choice(["forward", "step", "sampling", "train"]), default="step", show_default=True)
@click.option("--cells", type=click.IntRange(1), default=1024, show_default=True, help="Cells per batch.")
@click.option("--arch", type=click.Choice(["80", "86", "90", "100", "120"]), default="90", show_default=True)
@click.option("--blocks", type=click.Choice(BLOCKS), help="How to run the blocks.  [default: the way expected fastest]")
@click.option("--bandwidth", default=H200[0] / 1e12, show_default=True, help="Of memory, in TB/s.")
@click.option("--speed", default=H200[1] / 1e12, show_default=True, help="Of bf16 products, in TFLOP/s.")
@click.option("--l2", default=L2, show_default=True, help="L2 cache in MB.")
@click.option("--json", "output", flag_value="json", help="Print JSON.")
@click.option("--markdown", "output", flag_value="markdown", help="Print the section of kernels/README.md.")
@click.option("--into", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Page to put --markdown in.")
def main(
    model: str,
    task: str,
    cells: int,
    arch: str,
    blocks: str | None,
    bandwidth: float,
    speed: float,
    l2: float,
    output: str | None,
    into: Path | None,
) -> None:
    """List the launches of one call of a model, with bytes, FLOPs and predicted time."""
    card = Card(int(arch), bandwidth * 1e12, speed * 1e12, l2 * 1e6)
    if into is not None:
        put_between(into, as_markdown(cells, card, blocks))
    elif output == "markdown":
        print("\n".join(as_markdown(cells, card, blocks)))
    else:
        found = listing(model, task, cells, card, blocks)
        print(as_json(found) if output == "json" else "\n".join(as_text(found)))


def run(arguments: list[str] | None = None) -> int:
    """Run the command; return 2 after one line on stderr if the input is wrong or triton is missing."""
    try:
        main.main(arguments, prog_name="launch_list.py", standalone_mode=False)
    except click.ClickException as error:
        print(f"launch_list.py: {error.format_message()}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f'launch_list.py: no {error.name}: pip install -e ".[gpu]" installs it', file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(run())
