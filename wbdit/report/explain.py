"""The files of a readout: explain.json, a self-contained HTML page, and each figure as SVG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from wbdit._io import write_atomically
from wbdit._outputs import beside_page, check_writable
from wbdit.report.explain_figures import all_figures, head_name
from wbdit.report.html import render_page
from wbdit.whitebox.ablations import Ablation, Ablations
from wbdit.whitebox.explain import Explanation
from wbdit.whitebox.findings import SIGNIFICANT, causes, findings
from wbdit.whitebox.gene_loadings import Hit

KINDS = {
    "head": "Heads",
    "random": "Random subspaces",
    "PC": "Principal components",
    "NMF": "Non-negative factors",
    "atom": "Atoms that match a type",
    "random atom": "Random atoms",
}
LEAST_CHANGE = 0.01  # of a type's share that is named
PAGE, NUMBERS = "explain.html", "explain.json"
FIGURES = ("rate*.svg", "objective-*.svg", "non-zero*.svg", "closed-form*.svg", "block-*-head-*.svg")

# a separate SVG file has no page to inherit its style from
FIGURE_STYLE = (
    "<style>svg{background:#fff;font-family:sans-serif}text{font-size:20px;fill:#5b5f69;text-anchor:middle}"
    ".axis,.value{fill:#1d1e22}.left{text-anchor:end}.right{text-anchor:start}.fall{fill:#0e7a6d}.rise{fill:#b02a50}"
    ".level,.down{fill:#1c62b0}.up{fill:#d9650a}.grid{stroke:#dfdcd4;fill:none}.line{fill:none;stroke:#1c62b0;stroke-width:3}"
    ".identity{stroke:#1d1e22;stroke-dasharray:6 5;fill:none}.mean{fill:#1d1e22}"
    ".risen,.fallen{fill:none;stroke-width:3}.risen{stroke:#d9650a}.fallen{stroke:#1c62b0}</style>"
)


def write_explanation(explanation: Explanation, out_dir: str | Path, *, title: str) -> Path:
    """Write ``explain.json``, ``explain.html`` and ``figures/*.svg`` into a folder, which is created if necessary.

    Parameters
    ----------
    explanation
        From :func:`wbdit.whitebox.explain.explain`.
    title
        Short title of the page.

    Returns
    -------
    The path of ``explain.html``, a single file that loads nothing from the network.

    Raises
    ------
    InputError
        If the files cannot be written, or jinja2 is not installed.
    """
    out = Path(out_dir)
    figures = all_figures(explanation)
    answers = findings(explanation)
    page = render_page(
        "explain.html.j2",
        title=title,
        explanation=explanation,
        findings=answers,
        figures=figures,
        heads=[_head(explanation, unit) for unit in explanation.units.first_axes()],
        hits={kind: [_row(explanation, *pair) for pair in _pairs(explanation, kind)] for kind in explanation.hits},
        weights=[_weights(i, w) for i, w in enumerate(explanation.weights)],
        significant=SIGNIFICANT,
        causes=None if explanation.ablations is None else _causes(explanation.ablations),
    )
    content = {"title": title, "findings": [answer._asdict() for answer in answers], **explanation.to_dict()}
    write_atomically(out / PAGE, page)  # first: it marks the folder as ours
    for name, figure in figures.items():
        alone = figure.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
            "</title>", "</title>" + FIGURE_STYLE, 1
        )
        write_atomically(out / "figures" / f"{name}.svg", alone)
    write_atomically(out / NUMBERS, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return out / PAGE


def check_explanation(out: Path, *, overwrite: bool = False) -> None:
    """Check early that :func:`write_explanation` can write into a folder, over a readout of wbdit at most.

    Raises
    ------
    InputError
        If it cannot, or would replace files of others; with `overwrite` it may.
    """
    figures = [path for pattern in FIGURES for path in (out / "figures").glob(pattern)]
    for path in (out / PAGE, out / NUMBERS, *figures):
        check_writable(path, overwrite=overwrite, is_ours=beside_page(PAGE))


def _pairs(explanation: Explanation, kind: str) -> list[tuple[Hit, Hit]]:
    """Return each type's best match after and before training."""
    return list(zip(explanation.hits[kind], explanation.untrained[kind], strict=True))


def _row(explanation: Explanation, hit: Hit, before: Hit) -> dict[str, Any]:
    """Return a row of the table of types."""
    return {
        "type": hit.type,
        "unit": explanation.units.name(hit.unit),
        "genes": ", ".join(explanation.top_genes(hit.unit, hit.sign, 8)),
        "shared": hit.shared,
        "p": f"{hit.p:.3f}",
        "fires": hit.fires,
        "holds": hit.p < SIGNIFICANT,
        "before": f"{before.shared} ({before.p:.3f})",
    }


def _head(explanation: Explanation, unit: int) -> dict[str, str]:
    units = explanation.units
    block, head = units.block[unit] + 1, units.number[unit] + 1
    return {"name": f"Block {block}, head {head}", "figure": head_name(explanation, unit)}


def _causes(ablations: Ablations) -> dict[str, Any]:
    """Return the rows of the tables of what was removed: by kind, and by head."""
    named = causes(ablations)
    rows = [{"name": name, "named": named.get(kind), **_means(ablations.of(kind))} for kind, name in KINDS.items()]
    intact = [f"{name} {share:.0%}" for name, share in ablations.intact.items() if share >= LEAST_CHANGE]
    units = [_removed(ablations, one) for one in ablations.removed if "random" not in one.kind]
    return {"kinds": rows, "units": units, "intact": ", ".join(intact)}


def _means(some: list[Ablation]) -> dict[str, str]:
    """Return the mean size and selectivity of ablations, and how many change the types' shares."""
    if not some:
        return {"size": "", "selectivity": "", "changed": ""}
    return {
        "size": f"{np.mean([one.size for one in some]):.1%}",
        "selectivity": f"{np.mean([one.selectivity for one in some]):.0%}",
        "changed": f"{sum(one.p < SIGNIFICANT for one in some)} of {len(some)}",
    }


def _removed(ablations: Ablations, one: Ablation) -> dict[str, str]:
    """Return a row of the table of heads and atoms that were removed."""
    changes = {name: share - ablations.intact[name] for name, share in one.shares.items()}
    most = sorted(changes, key=lambda name: -abs(changes[name]))[:2]
    moved = [f"{name} {_points(changes[name])}" for name in most if abs(changes[name]) >= LEAST_CHANGE]
    return {
        "name": one.name.replace("-", " "),
        "size": f"{one.size:.1%}",
        "type": one.type,
        "selectivity": f"{one.selectivity:.0%}",
        "shares": ", ".join(moved) or "as before",
        "p": f"{one.p:.3f}",
        "falls": ", ".join(one.falls),
        "rises": ", ".join(one.rises),
    }


def _points(change: float) -> str:
    return f"{100 * change:+.0f}".replace("-", "\N{MINUS SIGN}")


def _weights(number: int, weights: Any) -> dict[str, str]:
    """Return a row of the table of weights."""
    heads = len(weights.overlap)
    apart = (weights.overlap.sum() - heads) / max(heads * (heads - 1), 1)
    return {
        "block": str(number + 1),
        "step": f"{weights.step:.2f}",
        "eta": f"{weights.eta:.3g}",
        "lam": f"{weights.lam:.3g}",
        "overlap": f"{float(apart):.3f}" if heads > 1 else "one head",
        "rank": f"{float(weights.rank.mean()):.1f}",
    }
