"""Ablation study: variants of a preset, trained on the same cells and scored in the same way.

    python -m bench.quality.study DATA.h5ad --label cell_type --out DIR [--variant NAME ...] [--seeds 3]

Each variant changes one setting of the preset ``small``. Results are kept as JSON in the folder DIR, so an interrupted
study continues where it stopped. ``table.md`` in DIR is rewritten after each result. The numbers in ``docs/study.md``
come from it.
"""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import anndata as ad
import click
import torch
from torch import Tensor

import wbdit
from bench.quality.peers.cells import Choice, DataSet, Split
from wbdit.evaluation.evaluate import evaluate
from wbdit.evaluation.scores import Score, format_value
from wbdit.network_inputs import conditioning_of
from wbdit.nn.blocks import gated_adaln
from wbdit.nn.wbdit import WhiteBoxBlock
from wbdit.training.config import PRESETS, Likelihood, Preset
from wbdit.whitebox.measures import diagnostics

SMALL = PRESETS["small"]
SHOWN = ("w2", "mmd_scdiffusion", "rf_auc", "rf_auc_genes", "zero_mae", "library_w1", "lfc_slope", "tstr", "mia_auc")


def architecture(**changes: object) -> Preset:
    return replace(SMALL, model={**SMALL.model, **changes})


def training(**changes: object) -> Preset:
    return replace(SMALL, training=replace(SMALL.training, **changes))


class OpByOpBlock(WhiteBoxBlock):
    """A white-box block that is trained op by op, as DiT's blocks are: the kernels take exactly a WhiteBoxBlock."""


class AttentionBlock(WhiteBoxBlock):
    """A block of MSSA alone, without ISTA (Wang et al. 2025, arXiv 2506.03790)."""

    def second_step(
        self, x: Tensor, z: Tensor, gate: Tensor, following: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Add nothing; modulate the tokens for what follows."""
        return gated_adaln(x, torch.zeros_like(x), gate, following)


BLOCKS: dict[str, type[WhiteBoxBlock]] = {"op by op": OpByOpBlock, "attention only": AttentionBlock}

VARIANTS: dict[str, Preset] = {
    "small": SMALL,
    "op by op": SMALL,
    "dit": PRESETS["dit"],
    "attention only": SMALL,
    "without the cell token": architecture(cell_token=False),
    "patches of 16 genes": architecture(patch_size=16),
    "patches of 250 genes": architecture(patch_size=250),
    "one projection for all patches": architecture(shared_patches=True),
    "width 128": architecture(hidden_size=128),
    "width 512": architecture(hidden_size=512, num_heads=8),
    "1 block": architecture(depth=1),
    "6 blocks": architecture(depth=6),
    "tied projections": architecture(tie_out=True),
    "no dropped labels": architecture(class_dropout_prob=0.0),
    "labels dropped in a tenth": architecture(class_dropout_prob=0.1),
    "30 epochs": training(most_epochs=30),
    "120 epochs": training(most_epochs=120),
    "learning rate 3e-4": training(learning_rate=3e-4),
    "learning rate 3e-3": training(learning_rate=3e-3),
    "weight decay 0.01": training(weight_decay=0.01),
    "no average": training(ema=0.0),
    "no input dropout": replace(SMALL, likelihood=Likelihood(input_dropout=0.0)),
    "input dropout 0.5": replace(SMALL, likelihood=Likelihood(input_dropout=0.5)),
    "stop at 350": replace(SMALL, likelihood=Likelihood(stop=350)),
    "stop at 650": replace(SMALL, likelihood=Likelihood(stop=650)),
}


def run(data: DataSet, variant: str, seed: int, minutes: float) -> dict:
    """Train a variant on one split and score it."""
    split, label = data.split(Choice(), seed), data.labels[0]
    PRESETS["variant"] = VARIANTS[variant]
    block = BLOCKS.get(variant, WhiteBoxBlock)

    def make_block(model: wbdit.WBDiT, mlp_ratio: float, **options: Any) -> WhiteBoxBlock:
        return block(model.hidden_size, model.num_heads, **options)

    started = time.monotonic()
    with patch.object(wbdit.WBDiT, "make_block", make_block):
        generator = wbdit.fit(
            split.train, label=data.labels, preset="variant", minutes=minutes, seed=seed, progress=False, max_genes=2000
        )
    trained = time.monotonic()
    cells = generator.generate(like=split.test, seed=seed)
    generated = time.monotonic()
    return {
        "data": data.name,
        "variant": variant,
        "seed": seed,
        "trained": asdict(generator.config.trained),
        "seconds": {"fit": round(trained - started, 1), "generate": round(generated - trained, 1)},
        "blocks": blocks(generator, split),
        "scores": {name: [score.value, score.floor] for name, score in scores(split, cells, label, seed).items()},
    }


def blocks(generator: wbdit.CellGenerator, split: Split, cells: int = 200) -> dict[str, list[float]] | None:
    """Return the diagnostics of :mod:`wbdit.whitebox.measures` on held-out cells, at the last timestep of sampling."""
    model = generator.denoiser
    if not isinstance(model, wbdit.WBDiT):
        return None
    some = split.test[:cells]
    x0 = torch.from_numpy(generator.preprocessor.encode(some))[:, None]
    t = torch.full((len(x0),), max(generator.model.stop, 1))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    noised = generator.schedule.noising(x0, t, noise)
    return diagnostics(model, noised, t, conditioning=conditioning_of(generator.model, generator.preprocessor, some))


def scores(split: Split, cells: ad.AnnData, label: str, seed: int) -> dict[str, Score]:
    """Score cells generated for the held-out cells, without confidence intervals."""
    sizes = {"n_cells": 800, "seeds": (seed,), "bootstrap": 0}
    return evaluate(split.test, cells, train=split.train, label=label, full=True, progress=False, **sizes).scores


def through_blocks(kept: list[dict[str, list[float]] | None]) -> tuple[str, str]:
    """Return the coding rate before and after all blocks, and each block's non-zeros, as text; means over seeds."""
    looks = [look for look in kept if look is not None]
    if not looks:
        return "", ""
    first = mean(look["coding_rate_before"][0] for look in looks)
    last = mean(look["coding_rate_after"][-1] for look in looks)
    shares = [mean(shares) for shares in zip(*(look["non_zero"] for look in looks), strict=True)]
    return f"{first:.0f} to {last:.0f}", ", ".join(f"{share:.2f}" for share in shares)


def table(results: list[dict]) -> str:
    """Return a Markdown table with a row per data set and variant (means over seeds); the floor comes first."""
    lines = [
        "| data | variant | seeds | steps | fit, s | coding rate, nats | non-zeros | "
        + " | ".join(f"`{name}`" for name in SHOWN)
        + " |",
        "|" + "---|" * (7 + len(SHOWN)),
    ]

    def row(data: str, name: str, kept: list[dict], column: int) -> str:
        means = [mean(r["scores"][metric][column] for r in kept) for metric in SHOWN]
        facts = (
            (len(kept), "", "", "", "")
            if column
            else (
                len(kept),
                round(mean(r["trained"]["steps"] for r in kept)),
                round(mean(r["seconds"]["fit"] for r in kept)),
                *through_blocks([r["blocks"] for r in kept]),
            )
        )
        return (
            f"| {data} | {name} | " + " | ".join(map(str, facts)) + " | " + " | ".join(map(format_value, means)) + " |"
        )

    for data in dict.fromkeys(r["data"] for r in results):
        own = [r for r in results if r["data"] == data]
        lines.append(row(data, "real cells (floor)", own, 1))
        for variant in VARIANTS:
            kept = [r for r in own if r["variant"] == variant]
            lines += [row(data, variant, kept, 0)] if kept else []
    return "\n".join(lines)


@click.command()
@click.argument("data", nargs=-1, required=True)
@click.option("--label", default="cell_type", show_default=True, help="Label column of files not given as FILE:COLUMN.")
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)), help="All by default.")
@click.option("--seeds", default=1, show_default=True)
@click.option("--minutes", default=10.0, show_default=True, help="Limit of the training time.")
@click.option("--out", type=Path, required=True)
def main(data, label, variants, seeds, minutes, out):
    out.mkdir(parents=True, exist_ok=True)
    for name in data:
        cells = DataSet.parse(name, [label])
        for seed in range(seeds):
            for variant in variants or VARIANTS:
                kept = out / f"{cells.name}-{variant.replace(' ', '-')}-{seed}.json"
                if not kept.exists():
                    kept.write_text(json.dumps(run(cells, variant, seed, minutes), indent=1))
                    (out / "table.md").write_text(
                        table([json.loads(p.read_text()) for p in sorted(out.glob("*.json"))])
                    )
                    click.echo(f"{kept.stem} done")


if __name__ == "__main__":
    main()
