"""Do synthetic cells of a rare type help a classifier? F1 with and without them, on held-out real cells.

    python -m bench.quality.rare_types pbmc3k.h5ad:"CD8 T,DC" kang_ifnb_pbmc.h5ad:"DC,pDC" --draws 10

Per draw, all rare types of a data set are cut to 20 cells, and the rest of them is held out. So are 30 % of the other
cells. A logistic regression on log-normalized genes learns all types, in one of three ways:

- none: from the cut cells as they are
- oversampling: each rare type's cells are drawn with replacement until there are 200
- wbdit: synthetic cells are added to each rare type until there are 200. :func:`wbdit.augment` would do the same for
  every type; here the other types stay as they are.

All three see the genes of the wbdit run. Each draw appends one line per rare type to the results file, and draws in
that file are skipped. So an interrupted study continues where it stopped. ``--table`` prints the table of
``docs/study.md`` from the file.
"""

import json
import time
from collections import defaultdict
from pathlib import Path

import anndata as ad
import click
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

import wbdit
from wbdit.data.expression import read_h5ad

LABEL = "cell_type"
LEFT_OUT = "unassigned"
GIVEN, WANTED = 20, 200
ARMS = ("none", "oversampling", "wbdit")
RESAMPLES = 1000
RESULTS = Path("bench/results/rare_types.jsonl")


def cut(cells: ad.AnnData, rare: list[str], seed: int) -> tuple[ad.AnnData, ad.AnnData]:
    """Return training cells with 20 cells of each rare type, and held-out cells."""
    rng = np.random.default_rng(seed)
    labels = cells.obs[LABEL].astype(str)
    training = np.zeros(cells.n_obs, bool)
    for name in labels.unique():
        rows = rng.permutation(np.flatnonzero(labels == name))
        training[rows[: GIVEN if name in rare else round(0.7 * len(rows))]] = True
    return cells[training].copy(), cells[~training].copy()


def resampled(labels: np.ndarray, rare: list[str], seed: int) -> np.ndarray:
    """Return the rows of all cells, and of copies of rare cells so that each rare type has 200."""
    rng = np.random.default_rng(seed)
    copies = [rng.choice(np.flatnonzero(labels == name), WANTED - GIVEN) for name in rare]
    return np.concatenate([np.arange(len(labels)), *copies])


def predictions(values: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Train the classifier and return its labels of the held-out cells."""
    return LogisticRegression(max_iter=500).fit(values, labels).predict(test)


def interval(truth: np.ndarray, found: np.ndarray, seed: int) -> list[float]:
    """Return the 95 % bootstrap interval of F1 over held-out cells, from resamples of the cells."""
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, len(truth), len(truth)) for _ in range(RESAMPLES)]
    scores = [f1(truth[rows], found[rows]) for rows in draws]
    return [round(float(edge), 4) for edge in np.quantile(scores, (0.025, 0.975))]


def f1(truth: np.ndarray, found: np.ndarray) -> float:
    """Return F1 of booleans, 0 if nothing is found."""
    hits = float((truth & found).sum())
    return 2 * hits / max(float(truth.sum() + found.sum()), 1.0)


def run(cells: ad.AnnData, data: str, rare: list[str], seed: int, steps: int) -> list[dict]:
    """Return one row per rare type for one draw."""
    train, test = cut(cells, rare, seed)
    started = time.monotonic()
    generator = wbdit.fit(train, label=LABEL, steps=steps, seed=seed, progress=False)
    seconds = time.monotonic() - started
    synthetic = generator.generate(n_per_label=dict.fromkeys(rare, WANTED - GIVEN), seed=seed)
    genes = list(generator.preprocessor.genes)
    labels, truth = (part.obs[LABEL].astype(str).to_numpy() for part in (train, test))
    values, held_out = (lognorm(part[:, genes]) for part in (train, test))
    rows = resampled(labels, rare, seed)
    found = {
        "none": predictions(values, labels, held_out),
        "oversampling": predictions(values[rows], labels[rows], held_out),
        "wbdit": predictions(
            np.vstack([values, synthetic.layers["lognorm"].toarray()]),
            np.concatenate([labels, synthetic.obs[LABEL].astype(str)]),
            held_out,
        ),
    }
    macro = {arm: round(float(f1_score(truth, found[arm], average="macro")), 4) for arm in ARMS}
    return [
        {
            "data": data,
            "type": name,
            "draw": seed,
            "steps": steps,
            "wbdit": wbdit.__version__,
            "genes": len(genes),
            "train": len(labels),
            "held_out": len(truth),
            "held_out_of_type": int((truth == name).sum()),
            "f1": {arm: round(f1(truth == name, found[arm] == name), 4) for arm in ARMS},
            "interval": {arm: interval(truth == name, found[arm] == name, seed) for arm in ARMS},
            "macro_f1": macro,
            "fit_seconds": round(seconds, 1),
        }
        for name in rare
    ]


def lognorm(cells: ad.AnnData) -> np.ndarray:
    """Return ln(1 + counts per 10,000) over these genes, dense."""
    counts = cells.X.toarray()
    return np.log1p(counts * (1e4 / np.maximum(counts.sum(1, keepdims=True), 1)))


def table(rows: list[dict]) -> str:
    """Return Markdown: mean F1 over draws with its bootstrap interval over draws, and the paired gain of wbdit."""
    rng = np.random.default_rng(0)

    def spanned(values: np.ndarray, sign: str = "") -> str:
        means = values[rng.integers(0, len(values), (RESAMPLES * 10, len(values)))].mean(1)
        low, high = np.quantile(means, (0.025, 0.975))
        return f"{values.mean():{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"

    by_type = defaultdict(list)
    for row in rows:
        by_type[row["data"], row["type"]].append(row)
    lines = [
        "| data | rare type | draws | held out | none | oversampling | wbdit | wbdit less oversampling |",
        "|" + "---|" * 8,
    ]
    for (data, name), own in by_type.items():
        f1s = {arm: np.array([row["f1"][arm] for row in own]) for arm in ARMS}
        cells = [spanned(f1s[arm]) for arm in ARMS] + [spanned(f1s["wbdit"] - f1s["oversampling"], "+")]
        lines.append(f"| {data} | {name} | {len(own)} | {own[0]['held_out_of_type']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kept(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@click.command()
@click.argument("data", nargs=-1)
@click.option("--draws", default=10, show_default=True)
@click.option("--steps", default=1000, show_default=True, help="Optimizer steps of a training.")
@click.option("--out", type=Path, default=RESULTS, show_default=True)
@click.option("--table", "only_table", is_flag=True, help="Print the table of the results so far.")
def main(data, draws, steps, out, only_table):
    """Measure DATA.h5ad:TYPE,TYPE ..."""
    sets = {}
    for text in data:
        path, _, names = text.partition(":")
        cells = read_h5ad(path)
        sets[Path(path).stem] = cells[cells.obs[LABEL] != LEFT_OUT].copy(), names.split(",")
    for seed in range(draws):  # all data sets after each draw, so that an early stop leaves equally many
        for name, (cells, rare) in sets.items():
            done = {row["type"] for row in kept(out) if (row["data"], row["draw"], row["steps"]) == (name, seed, steps)}
            if not only_table and done != set(rare):
                with out.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in run(cells, name, rare, seed, steps))
                click.echo(f"{name}, draw {seed}: done")
    click.echo(table(kept(out)))


if __name__ == "__main__":
    main()
