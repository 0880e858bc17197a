"""One peer on one split: train, generate and score once, and keep the result, so that interrupted runs continue."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anndata as ad

import wbdit
from bench.machine import commit, machine
from bench.quality.peers.cells import Choice, DataSet
from bench.quality.peers.peer import Peer
from wbdit._io import write_atomically, write_h5ad
from wbdit.data.expression import read_h5ad
from wbdit.evaluation.evaluate import evaluate
from wbdit.evaluation.registry import METRICS

FORMAT = 1
Result = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Settings that all peers share.

    Attributes
    ----------
    choice
        The split, and the selection of cells and genes.
    minutes
        Training time in minutes.
    out
        Folder for results.
    """

    choice: Choice
    minutes: float
    out: Path


@dataclass(frozen=True)
class Run:
    """One peer on one split of one data set; `seed` determines the split, training, generation and scored cells."""

    data: DataSet
    peer: Peer
    seed: int
    plan: Plan

    @property
    def stem(self) -> Path:
        """Path of the result, without a suffix."""
        return self.plan.out / self.data.name / f"{self.peer.name}-{self.seed}-{_key(self.settings())}"

    @property
    def cells(self) -> Path:
        """Path of the synthetic cells."""
        return self.stem.with_name(f"{self.stem.name}.h5ad")

    def settings(self) -> Result:
        """Return the settings that determine the synthetic cells."""
        return {
            "format": FORMAT,
            "data": self.data.digest(),
            "labels": self.data.labels,
            "choice": asdict(self.plan.choice),
            "minutes": self.plan.minutes,
            "seed": self.seed,
            "peer": self.peer.name,
            "of peer": self.peer.settings,
        }

    def result(
        self, say: Callable[[str], object], again: bool = False, kept_only: bool = False, score: bool = True
    ) -> Result | None:
        """Return the peer's result, from kept files if possible.

        Parameters
        ----------
        say
            Function that receives one-line progress messages.
        again
            Train and score again, even if results are kept.
        kept_only
            Return None instead of training or scoring.
        score
            If false, only train and keep the generated cells, and return None.
        """
        stem, settings = self.stem, self.settings()
        scored = stem.with_name(f"{stem.name}.scores-{_key({'metrics': list(METRICS)})}.json")
        made = stem.with_name(f"{stem.name}.json")
        if made.exists() and not again and not score:
            return None
        if made.exists() and scored.exists() and not again:
            return json.loads(made.read_text()) | {"scores": json.loads(scored.read_text())}
        if kept_only:
            return None
        where = f"{self.data.name}, seed {self.seed}, {self.peer.name}"
        split = self.data.split(self.plan.choice, self.seed)
        if again or not made.exists():
            say(f"{where}: training for at most {self.plan.minutes:g} minutes")
            synthetic, facts = self._make(split.train, split.test)
            for old in stem.parent.glob(f"{stem.name}.scores-*.json"):
                old.unlink()
            write_h5ad(synthetic, self.cells)
            about = {"name": self.data.name, "n_train": split.train.n_obs, "n_test": split.test.n_obs}
            about |= {"n_genes": split.train.n_vars, "notes": split.notes}
            # written last: its presence means that the cells are complete
            _write(made, {"settings": settings, "title": self.peer.title, "about": about, "facts": facts})
            seconds = (facts["seconds_to_train"], facts["seconds_to_generate"])
            say(f"{where}: trained in {seconds[0]:.0f} s, generated in {seconds[1]:.0f} s")
        if not score:
            return None
        say(f"{where}: scoring")
        evaluation = evaluate(
            split.test,
            read_h5ad(self.cells),
            train=split.train,
            label=self.data.labels[0],
            full=True,
            n_cells=split.test.n_obs,
            n_genes=split.train.n_vars,
            seeds=[self.seed],
            bootstrap=0,  # the table has the spread over seeds
            progress=False,
        )
        _write(scored, evaluation.to_dict())
        return json.loads(made.read_text()) | {"scores": json.loads(scored.read_text())}

    def _make(self, train: ad.AnnData, test: ad.AnnData) -> tuple[ad.AnnData, Result]:
        """Train and generate; the peer sees only the labels of the held-out cells."""
        start = time.perf_counter()
        fitted = self.peer.fit(train, self.data.labels, self.plan.minutes, self.seed)
        trained = time.perf_counter()
        synthetic = fitted.generate(test.obs, self.seed)
        generated = time.perf_counter()
        facts = {
            "seconds_to_train": trained - start,
            "seconds_to_generate": generated - trained,
            "parameters": fitted.parameters,
            "training": fitted.facts,
            "commit": commit(),
            "machine": machine(),
            "versions": {"wbdit": wbdit.__version__, "python": platform.python_version()},
        }
        return synthetic, facts


def _key(settings: Result) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _write(path: Path, content: Result) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")
