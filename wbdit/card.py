"""The description of a run: a model card in Markdown, a table in HTML for notebooks, and a plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from typing import Any

import numpy as np

from wbdit.data.labels import Labels
from wbdit.data.preprocessor import Preprocessor
from wbdit.data.space import describe
from wbdit.run_config import RunConfig

CARD = "README.md"
NAMES = {"wbdit": "White-Box Diffusion Transformer", "dit": "Diffusion Transformer (black-box control)"}
MOST_ROWS = 30  # labels that the table in a notebook shows; the card has all

# layout of the Markdown card: Hugging Face's model card (Mitchell et al. 2019)
HEAD = """---
library_name: wbdit
tags:
- single-cell
- scRNA-seq
- diffusion
- synthetic-data
---

# Generator of synthetic single cells

"""
USE = """## Intended use

- Cells for teaching, and for testing an analysis.
- More cells of rare labels to balance a classifier (`wbdit augment`).
- Cells on a path between two labels.

## Limits

- Synthetic cells are no independent observations. They do not increase n, so they are not for statistics such as
  differential expression.
- Synthetic cells are not private: they may resemble training cells.
- The generator knows only the genes and labels above. Label combinations without training cells are extrapolated.
- With few training cells (under about 2,000), cells of one label vary less than real ones.
- This card holds no scores. `wbdit evaluate` compares generated cells with held-out real cells.

"""


def plain_text(config: RunConfig, preprocessor: Preprocessor) -> str:
    """Return the description as plain text of a few lines."""
    lines = [f"    {name.lower()}: {fact}" for name, fact in facts(config, preprocessor).items()]
    return "\n".join(["CellGenerator", *lines])


def html(config: RunConfig, preprocessor: Preprocessor) -> str:
    """Return the description as an HTML fragment, with the labels in a table that opens on a click."""
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(fact)}</td></tr>'
        for name, fact in facts(config, preprocessor).items()
    )
    tables = ""
    for column, sizes in label_sizes(preprocessor.labels):
        shown = "".join(
            f'<tr><td style="text-align:left">{escape(name)}</td><td>{n:,}</td></tr>' for name, n in sizes[:MOST_ROWS]
        )
        more = f"<p>and {len(sizes) - MOST_ROWS} more</p>" if len(sizes) > MOST_ROWS else ""
        tables += (
            f"<details><summary>{escape(column)}: {len(sizes)} labels</summary><table><tr><th>label</th>"
            f"<th>training cells</th></tr>{shown}</table>{more}</details>"
        )
    return f"<div><strong>CellGenerator</strong><table>{rows}</table>{tables}</div>"


def markdown(config: RunConfig, preprocessor: Preprocessor) -> str:
    """Return the model card of a run, the text of ``README.md`` in its folder."""
    labels, covariates = preprocessor.labels, preprocessor.covariates
    known = facts(config, preprocessor)
    conditions = [known[name] for name, has in (("Labels", labels.columns), ("Covariates", covariates.columns)) if has]
    conditioned = f", conditioned on {_md(', '.join(conditions))}" if conditions else ""
    parts = [
        HEAD,
        f"A {NAMES[config.denoiser]} that generates single cells of {len(preprocessor.genes):,} genes{conditioned}. ",
        f"It was trained with wbdit {_md(config.wbdit)}.\n\n",
        "## Generate\n\n",
        "".join(f"    {line}\n" for line in _snippet(labels)),
        "\n## Data\n\n",
        _table(
            ("Training cells", f"{config.trained.cells:,}"),
            *((name, known[name]) for name in ("Genes", "Values", "Covariates") if name in known),
        ),
        *(
            f"{_md(column)}:\n\n" + _table(*((name, f"{n:,}") for name, n in sizes), head=("label", "training cells"))
            for column, sizes in label_sizes(labels)
        ),
        f"The training cells have {_md(labels.summary())}.\n\n" if len(labels.columns) > 1 else "",
        "## Training\n\n",
        _table(*_settings(config), head=("setting", "value")),
        USE,
        "## Versions\n\n",
        _table(
            ("wbdit", config.wbdit), ("torch", config.torch), ("format", config.format), ("hash", config.model_hash)
        ),
        "wbdit writes this card anew whenever it saves the run.\n",
    ]
    return "".join(parts)


def facts(config: RunConfig, preprocessor: Preprocessor) -> dict[str, str]:
    """Return the main facts of a run by name, as text."""
    trained, labels = config.trained, preprocessor.labels
    columns = ", ".join(
        f"{name} ({len(known)} labels)" for name, known in zip(labels.columns, labels.categories, strict=True)
    )
    return {
        "Genes": f"{len(preprocessor.genes):,}",
        "Labels": columns or "none",
        **({"Covariates": preprocessor.covariates.ranges()} if preprocessor.covariates.columns else {}),
        "Values": describe(preprocessor.space),
        "Model": f"{NAMES[config.denoiser]}, preset {config.preset}",
        "Training": (
            f"{trained.cells:,} cells, {trained.steps:,} steps, {trained.epochs:g} passes over the cells, "
            f"{trained.seconds:,.0f} s"
        ),
        "Hash": config.model_hash[:16],
        "Next": _snippet(labels)[-1],
    }


def label_sizes(labels: Labels) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Yield each label column with its labels and their numbers of training cells, most frequent first."""
    for place, (column, names) in enumerate(zip(labels.columns, labels.categories, strict=True)):
        sizes = np.bincount(labels.combinations[:, place], labels.sizes, len(names)).astype(int)
        yield column, [(names[i], int(sizes[i])) for i in np.argsort(-sizes, kind="stable")]


def _snippet(labels: Labels) -> list[str]:
    """Return the lines of Python that load the run and generate cells."""
    lines = ["import wbdit", 'generator = wbdit.load("run")  # this folder']
    if not labels.columns:
        return [*lines, "generator.generate(1000, seed=0)"]
    row = labels.combinations[int(np.argmax(labels.sizes))]
    names = tuple(known[code] for known, code in zip(labels.categories, row, strict=True))
    asked = repr({names[0] if len(names) == 1 else names: 100})  # quotes and line breaks are escaped
    return [*lines, "generator.generate(1000, seed=0)", f"generator.generate(n_per_label={asked}, seed=0)"]


def _settings(config: RunConfig) -> list[tuple[str, Any]]:
    """Return the settings and totals of the training."""
    budget = [(f"budget in {unit}", amount) for unit, amount in config.budget.items() if amount is not None]
    trained = config.trained
    totals = [
        ("steps", trained.steps),
        ("passes over the cells", trained.epochs),
        ("training time, s", trained.seconds),
    ]
    own = [(name.replace("_", " "), value) for name, value in {**config.model, **config.training}.items()]
    return [("preset", config.preset), ("seed", config.seed), *budget, *totals, *own]


def _table(*rows: tuple[str, Any], head: tuple[str, str] = ("", "")) -> str:
    """Return a Markdown table of two columns, with an empty line after it."""
    lines = [head, ("---", "---"), *((_md(name), _md(value)) for name, value in rows)]
    return "".join(f"| {name} | {value} |\n" for name, value in lines) + "\n"


def _md(value: Any) -> str:
    """Return a value as one line of Markdown in which no character has a meaning."""
    return re.sub(r"([\\`*_\[\]<>|&~$#])", r"\\\1", " ".join(str(value).split()))
