"""The calls whose launches are listed: a forward, a step of a sampler, all its steps, and a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from pretend import DEVICE
from recorder import Launch, Recorder
from torch import nn

from wbdit import NoiseSchedule
from wbdit.counts.denoiser import CountDenoiser
from wbdit.data.loader import Batches
from wbdit.generator import CellGenerator, Plan, make_model, sampling_precision
from wbdit.nn.denoiser import Denoiser
from wbdit.request import GenerationRequest
from wbdit.run_config import LikelihoodConfig, RunConfig
from wbdit.training.config import PRESETS, Preset
from wbdit.training.losses import CountNLL, LossFunction, SquaredError
from wbdit.training.trainer import Trainer

BATCHES = 3
CALLS = 4  # of the sampling from which the last step but one is taken: it reads and writes all estimates of a solver
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
    """Return the model on the pretended GPU; :meth:`torch.nn.Module.to` cannot move real tensors to fake ones."""
    network = make_model(model.config)
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                moved = torch.empty_like(weight, device=DEVICE)
                module._parameters[name] = nn.Parameter(moved, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device=DEVICE)
    return network


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


def sampling(recorder: Recorder, model: Model, cells: int) -> list[Launch]:
    """Return the launches of a batch's whole sampling, from its noise to its cells."""
    launches, begun, _ = _last_batch(recorder, model, cells)
    return launches[begun:]


def step(recorder: Recorder, model: Model, cells: int) -> list[Launch]:
    """Return the launches of one step in the middle of sampling: the model's call and the sampler's update."""
    launches, _, ends = _last_batch(recorder, model, cells, CALLS)
    return launches[ends[-3] : ends[-2]]


def _last_batch(
    recorder: Recorder, model: Model, cells: int, calls: int | None = None
) -> tuple[list[Launch], int, list[int]]:
    """Return the launches of a generation, where its last batch begins, and where each step ends.

    The batches before have prepared what all share: a CUDA graph is recorded in the first or the second.
    """
    generator = generator_of(model)
    sampling, n = generator._resolve_sampler(None, calls, None), BATCHES * cells
    codes = np.zeros((n, 1 if model.labels else 0), dtype=np.int64)
    asked = GenerationRequest(codes, [1.0] * codes.shape[1], np.empty((n, 0)))
    launches, begun, ends = recorder.launches, list[int](), list[int]()
    own = generator._sample_batch

    def sample_batch(*given: Any) -> Any:
        begun.append(len(launches))
        return own(*given)

    with recorder.recording(), patch.object(generator, "_sample_batch", sample_batch):
        generator._sample(
            Plan(asked, np.ones(n), sampling, 0, {}), range(n), cells, lambda *step: ends.append(len(launches))
        )
    return launches, begun[-1], ends


def train(recorder: Recorder, model: Model, cells: int) -> list[Launch]:
    """Return the launches of a training step: batch, noise, loss, gradients, optimizer and the weights' average."""
    network, schedule = network_of(model), NoiseSchedule(**model.config.schedule)
    loss_fn: LossFunction
    if isinstance(network, CountDenoiser):
        loss_fn = CountNLL(network, schedule, 2 * cells)
    else:
        loss_fn = SquaredError(network, schedule)
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
    "sampling": sampling,
    "train": train,
}
