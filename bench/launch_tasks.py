"""The calls whose launches are listed: a forward, a step of a sampler, its whole walk, and a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from pretend import DEVICE
from recorder import Launch, Recorder

from wbdit import NoiseSchedule
from wbdit.counts.denoiser import CountDenoiser
from wbdit.data.loader import Batches
from wbdit.generator import CellGenerator, make_model, sampling_precision
from wbdit.nn.denoiser import Denoiser
from wbdit.request import GenerationRequest
from wbdit.run_config import LikelihoodConfig, RunConfig
from wbdit.training.config import PRESETS, Preset
from wbdit.training.losses import CountNLL, LossFunction, SquaredError
from wbdit.training.trainer import Trainer

CALLS = 4  # of the walk from which the last step but one is taken: it reads and writes all estimates of a solver
LEVELS = 27  # count levels of a gene at most


@dataclass(frozen=True)
class Model:
    """A network as a run would build it: a preset, numbers of genes and labels, and whether it is trained on counts."""

    preset: Preset
    genes: int = 2000
    labels: int = 0
    counts: bool = False

    @property
    def patches(self) -> int:
        """Patches of genes per cell, each with its token."""
        return -(-self.genes // self.preset.model["patch_size"])

    @property
    def tokens(self) -> int:
        """Tokens per cell: those of the patches, and possibly one for the whole cell."""
        return self.patches + self.preset.model.get("cell_token", False)

    @property
    def config(self) -> RunConfig:
        """Configuration of the run."""
        preset, likelihood = self.preset, None
        if self.counts:
            given = preset.likelihood
            likelihood = LikelihoodConfig(LEVELS, given.stop, given.input_dropout, given.learned_dispersion)
        model = {**preset.model, "input_size": self.genes, "label_sizes": [self.labels] if self.labels else []}
        return RunConfig("custom", 0, preset.denoiser, model, {"kind": preset.schedule}, {}, {}, likelihood)


MODELS = {
    "published": Model(PRESETS["paper"]),
    "base": Model(PRESETS["base"], labels=8, counts=True),
    "small": Model(PRESETS["small"], labels=8, counts=True),
}


def network_of(model: Model) -> Denoiser | CountDenoiser:
    """Return the model on the pretended GPU."""
    with DEVICE:
        return make_model(model.config)


def generator_of(model: Model) -> CellGenerator:
    """Return the model's generator on the pretended GPU; nothing but the number of genes is known of its cells."""
    cells = SimpleNamespace(genes=range(model.genes), covariates=SimpleNamespace(columns=()))
    return CellGenerator(network_of(model), NoiseSchedule(**model.config.schedule), cells, model.config, [])  # type: ignore[arg-type]


def forward(recorder: Recorder, model: Model, cells: int) -> list[Launch]:
    """Return the launches of a call without gradients, with a timestep per cell, as generation calls the model."""
    network = generator_of(model).model
    x = torch.empty(cells, 1, model.genes, device=DEVICE)
    t = torch.empty(cells, dtype=torch.int64, device=DEVICE)
    given = {}
    if isinstance(network, CountDenoiser):
        given["conditioning"] = torch.empty(cells, network.denoiser.hidden_size + 2 * model.genes, device=DEVICE)
    with torch.no_grad(), sampling_precision(DEVICE), recorder.recording():
        network(x, t, **given)
    return recorder.launches


def walk(recorder: Recorder, model: Model, cells: int) -> list[Launch]:
    """Return the launches of a batch's whole walk, from its noise to its cells.

    It is the second batch of a generation, which does not record the CUDA graph any more.
    """
    one, _ = _generation(recorder, model, cells, batches=1)
    two, _ = _generation(recorder, model, cells, batches=2)
    return two[len(one) :]


def step(recorder: Recorder, model: Model, cells: int) -> list[Launch]:
    """Return the launches of one step in the middle of a walk: the model's call and the sampler's update."""
    launches, ends = _generation(recorder, model, cells, batches=1, calls=CALLS)
    return launches[ends[CALLS - 3] : ends[CALLS - 2]]


def _generation(
    recorder: Recorder, model: Model, cells: int, batches: int, calls: int | None = None
) -> tuple[list[Launch], list[int]]:
    """Return the launches of a generation, and where each step of its walks ends."""
    generator = generator_of(model)
    sampling, n = generator._resolve_sampler(None, calls, None), batches * cells
    codes = np.zeros((n, 1 if model.labels else 0), dtype=np.int64)
    asked = GenerationRequest(codes, [1.0] * codes.shape[1], np.empty((n, 0)))
    begun, ends = len(recorder.launches), list[int]()

    def end_step(share: float, text: str) -> None:
        ends.append(len(recorder.launches) - begun)

    with recorder.recording():
        generator._sample(asked, np.ones(n), sampling, 0, cells, end_step)
    return recorder.launches[begun:], ends


def train(recorder: Recorder, model: Model, cells: int) -> list[Launch]:
    """Return the launches of a training step: batch, noise, loss, gradients, optimizer and the weights' average."""
    network, schedule = network_of(model), NoiseSchedule(**model.config.schedule)
    loss_fn: LossFunction
    loss_fn = CountNLL(network, schedule) if isinstance(network, CountDenoiser) else SquaredError(network, schedule)
    of_counts = model.counts
    batches = Batches(
        torch.empty(2 * cells, model.genes, dtype=torch.uint8 if of_counts else torch.float32, device=DEVICE),
        torch.empty(2 * cells, dtype=torch.int64, device=DEVICE) if model.labels else None,
        cells,
        torch.empty(2 * cells, device=DEVICE) if of_counts else None,
    )
    trainer = Trainer(loss_fn, batches, model.preset.training, model.preset.budget)
    network.train()
    with recorder.recording():
        trainer._update()  # creates the optimizer's state
        begun = len(recorder.launches)
        trainer._update()
    return recorder.launches[begun:]


TASKS: dict[str, Callable[[Recorder, Model, int], list[Launch]]] = {
    "forward": forward,
    "step": step,
    "walk": walk,
    "train": train,
}
