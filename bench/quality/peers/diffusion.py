"""wbdit with three presets: the default, the same with black-box blocks, and the published model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import anndata as ad
import pandas as pd

import wbdit
from bench.quality.peers.peer import LABEL, Fitted, Peer, cells_of, joined, with_joined
from wbdit.counts.denoiser import NOISE_AXES
from wbdit.sampling import COUNTS_CALLS, COUNTS_SAMPLER, COUNTS_SPACING
from wbdit.training.calibration import CELLS, ROUNDS
from wbdit.training.config import Preset


class Diffusion(Peer):
    """A preset of :func:`wbdit.fit`, trained for a given time.

    Parameters
    ----------
    name, title
        As in :class:`bench.quality.peers.peer.Peer`.
    preset
        One of :data:`wbdit.training.config.PRESETS`.
    """

    def __init__(self, name: str, title: str, preset: str) -> None:
        self.name = name
        self.title = title
        self.preset = preset

    @property
    def settings(self) -> dict[str, Any]:
        preset = Preset.from_name(self.preset)
        settings = {"preset": asdict(preset), "wbdit": wbdit.__version__}
        if not preset.lognorm:  # such presets sample counts, with these settings
            settings["sampling"] = [COUNTS_SAMPLER, COUNTS_CALLS, COUNTS_SPACING]
            settings["spread"] = [NOISE_AXES, CELLS, ROUNDS]
        return settings

    def fit(self, train: ad.AnnData, labels: Sequence[str], minutes: float, seed: int) -> Fitted:
        generator = wbdit.fit(
            with_joined(train, labels),
            label=LABEL,
            preset=self.preset,
            minutes=minutes,
            max_genes=train.n_vars,
            seed=seed,
            progress=False,
        )
        return _Trained(generator, tuple(labels))


class _Trained(Fitted):
    def __init__(self, generator: wbdit.CellGenerator, labels: tuple[str, ...]) -> None:
        super().__init__()
        self.generator = generator
        self.labels = labels
        self.parameters = sum(p.numel() for p in generator.model.parameters() if p.requires_grad)
        self.facts = {**asdict(generator.config.trained), "precision": generator.config.training["precision"]}

    def generate(self, obs: pd.DataFrame, seed: int) -> ad.AnnData:
        wanted = ad.AnnData(obs=joined(obs, self.labels).to_frame(LABEL))
        cells = self.generator.generate(like=wanted, seed=seed)
        return cells_of(cells.X, obs, cells.var_names)
