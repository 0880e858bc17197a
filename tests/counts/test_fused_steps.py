"""A sampler of a count model whose steps are fused: the same states, in two ops per step."""

import numpy as np
import pytest
import torch
from helpers import SMALL, Launches, relative_error, simulate_gpu, stirred

from wbdit import NoiseSchedule, WBDiT, samplers
from wbdit.counts.bins import CountBins
from wbdit.counts.denoiser import CountDenoiser, FixedLibrary
from wbdit.counts.likelihood import CountLikelihood
from wbdit.data.cell_matrix import MemoryMatrix
from wbdit.samplers import GuidedModel

N, GENES, STOP = 5, 40, 500
Y = torch.arange(N) % 3
LIBRARY = torch.linspace(2, 4, N)


def model_of(labels=(3,), **options):
    """Return a count model like the preset "small": patches of their own, a cell token, two outputs."""
    counts = np.random.default_rng(0).poisson(2.0, (40, GENES)).astype(np.float32)
    codes = np.arange(40)[:, None] % 3 if labels else np.zeros((40, 0), np.int64)
    options = {"n_outputs": 2, "shared_patches": False, "cell_token": True, **options}
    likelihood = CountLikelihood(GENES, len(CountBins.up_to(counts.max()).lowest), 1000)
    model = CountDenoiser(WBDiT(**SMALL, label_sizes=labels, **options), likelihood, NoiseSchedule(kind="cosine"))
    stirred(model).init_from_data(MemoryMatrix(counts), codes, np.log1p(counts).mean(0), 0.5)
    with torch.no_grad():
        likelihood.dispersion_knots.normal_(generator=torch.Generator().manual_seed(0))
    return model


def states(model, guided=lambda fixed: fixed, name="unipc", callback=None):
    """Return the final states of a sampler."""
    noise = samplers.PhiloxNoise(3, torch.arange(N), (1, GENES))
    path = samplers.timesteps(model.schedule, 4, "uniform", stop=STOP)
    return samplers.BY_NAME[name].sample(
        guided(FixedLibrary(model, LIBRARY)),
        model.start(noise(-1)),
        model.schedule,
        path,
        stop=STOP,
        clamp_min=None,
        noise=noise,
        callback=callback,
    )


def labeled(fixed):
    return GuidedModel(fixed, Y)


def mixed(fixed):
    return GuidedModel(fixed, Y, toward=Y.flip(0), mix=0.3)


def guided(fixed):
    return GuidedModel(fixed, Y, 2.0)


def along(fixed):
    return GuidedModel(fixed, Y, [1.0, 1.0], covariates=torch.linspace(-1, 1, N)[:, None])


@pytest.mark.parametrize("name", samplers.BY_NAME)
@pytest.mark.parametrize("outputs", [1, 2])
def test_the_states_are_the_same(name, outputs, monkeypatch):
    model = model_of(n_outputs=outputs)
    with torch.no_grad():
        apart = states(model, labeled, name)
        simulate_gpu(monkeypatch)
        assert relative_error(states(model, labeled, name), apart) < 1e-5


@pytest.mark.parametrize(
    ("given", "options"),
    [(mixed, {}), (guided, {}), (along, {"n_covariates": 1}), (lambda fixed: fixed, {"labels": ()})],
    ids=["toward other labels", "two terms", "covariates", "no labels"],
)
def test_whatever_the_model_is_given(given, options, monkeypatch):
    model = model_of(**options)
    with torch.no_grad():
        apart = states(model, given)
        simulate_gpu(monkeypatch)
        assert relative_error(states(model, given), apart) < 1e-5


@pytest.mark.parametrize("given", [labeled, mixed, lambda fixed: fixed], ids=["labels", "vectors", "nothing"])
def test_a_step_is_two_ops(given, monkeypatch):
    """The denoiser, then the counts with the update; in between lies nothing of PyTorch's own."""
    simulate_gpu(monkeypatch)
    model, marks = model_of(), []
    with torch.no_grad(), Launches() as launches:
        states(model, given, callback=lambda *step: marks.append(len(launches.names)))
    assert launches.names[marks[0] :] == ["wbdit.denoise", "wbdit.count_mean_step"] * 3


def test_labels_and_library_sizes_are_embedded_once(monkeypatch):
    model, embedded = model_of(), []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda *given: embedded.append(1) or embed(*given))
    for given in (labeled, guided, lambda fixed: fixed):
        states(model, given)
        assert len(embedded) == 1
        embedded.clear()


def test_other_calls_are_step_by_step(monkeypatch):
    """On a CPU, in training, and with hooks that would not be called."""
    model, x, times = model_of(), torch.randn(N, 1, GENES), torch.tensor([900, 500])
    with torch.no_grad():
        given = model.embed(Y, LIBRARY)
        assert model.fuse_steps(x, times, conditioning=given) is None
        simulate_gpu(monkeypatch)
        assert model.fuse_steps(x, times, conditioning=given) is not None
        assert model.train().fuse_steps(x, times, conditioning=given) is None
        model.eval().register_forward_hook(lambda *given: None)
        assert model.fuse_steps(x, times, conditioning=given) is None
