"""CUDA-graph replay of a denoiser. The recorder is simulated, since a graph needs a GPU; the copies are real."""

import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from wbdit import WBDiT, backend, samplers
from wbdit.counts.bins import CountBins
from wbdit.counts.denoiser import CountDenoiser, FixedLibrary
from wbdit.counts.likelihood import CountLikelihood
from wbdit.nn import cuda_graph
from wbdit.schedule import NoiseSchedule


@pytest.fixture
def recorded(monkeypatch):
    """Simulate recording on CPU tensors: a replay calls the function again. Return the list of recorded calls."""
    calls = []

    def capture(call):
        calls.append(call)
        call()
        return call

    replays = cuda_graph.CUDAGraphModel._replays
    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(
        cuda_graph.CUDAGraphModel, "_replays", lambda self, x, t: t.stride(0) == 0 and replays(self, _OnGpu(x), t)
    )
    return calls


class _OnGpu:
    is_cuda = True

    def __init__(self, x):
        self.device = x.device


def model(sizes=()):
    model = WBDiT(input_size=12, patch_size=4, hidden_size=8, depth=2, num_heads=2, label_sizes=sizes).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("mix", [0.0, 0.3])
@pytest.mark.parametrize("sizes", [(), (3,), (3, 2)])
def test_a_sampler_gets_the_same_cells(recorded, sizes, mix):
    denoiser, schedule = model(sizes), NoiseSchedule()
    y = torch.tensor([[0, 1], [1, 0], [2, 2], [3, 1], [0, 0]]) if sizes else None
    y = y[:, 0] if len(sizes) == 1 else y
    x, path = torch.randn(5, 1, 12), samplers.timesteps(schedule, 6)
    cells = []
    for call in (denoiser, cuda_graph.CUDAGraphModel(denoiser)):
        guided = call if y is None else samplers.GuidedModel(call, y, 2.0, toward=y.flip(0), mix=mix)
        cells.append(samplers.ddim(guided, x, schedule, path, eta=0.0, clamp_min=None))
    assert torch.equal(*cells)
    assert len(recorded) == 1


def test_each_shape_is_recorded_once(recorded):
    graphed = cuda_graph.CUDAGraphModel(model())
    t = torch.tensor([7])
    with torch.no_grad():
        for batch in (4, 2, 4, 2):
            graphed(torch.randn(batch, 1, 12), t.expand(batch))
        with torch.autocast("cpu", torch.bfloat16):
            graphed(torch.randn(4, 1, 12), t.expand(4))
    assert len(recorded) == 3


def test_a_recording_holds_for_its_backend_and_mode(recorded):
    graphed, x, t = cuda_graph.CUDAGraphModel(model()), torch.randn(3, 1, 12), torch.tensor([7]).expand(3)
    with torch.no_grad():
        graphed(x, t)
        with backend("reference"):
            graphed(x, t)
            graphed(x, t)
    with torch.inference_mode():
        graphed(x, t)
    assert len(recorded) == 3


def test_recording_and_replaying_are_on_the_inputs_device(recorded, monkeypatch):
    """A model is on cuda:1 while cuda:0 is current. Devices are simulated: `device_of` sets the current one."""
    current, seen = ["cuda:0"], []

    @contextmanager
    def device_of(x):
        before, current[0] = current[0], "cuda:1"
        yield
        current[0] = before

    class Replayed(cuda_graph._Recorded):
        def __call__(self, x, t, y):
            seen.append(current[0])
            return super().__call__(x, t, y)

    capture = cuda_graph.capture
    monkeypatch.setattr(cuda_graph, "_Recorded", Replayed)
    monkeypatch.setattr(cuda_graph, "capture", lambda call: seen.append(current[0]) or capture(call))
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    graphed, t = cuda_graph.CUDAGraphModel(model()), torch.tensor([7])
    with torch.no_grad():
        for _ in range(2):
            graphed(torch.randn(3, 1, 12), t.expand(3))
    assert seen == ["cuda:1"] * 3
    assert current == ["cuda:0"]


def test_what_cannot_be_recorded_is_called(recorded, monkeypatch):
    tried = []

    def capture(call):
        tried.append(call)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graph, "capture", capture)
    denoiser, x, t = model(), torch.randn(3, 1, 12), torch.tensor([7]).expand(3)
    graphed = cuda_graph.CUDAGraphModel(denoiser)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="not permitted when stream is capturing$"):
            first = graphed(x, t)
        assert torch.equal(first, denoiser(x, t))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(graphed(x, t), first)
    assert len(tried) == 1


def test_an_answer_outlives_the_next_call(recorded):
    denoiser = model()
    graphed, x, t = cuda_graph.CUDAGraphModel(denoiser), torch.randn(3, 1, 12), torch.tensor([7])
    with torch.no_grad():
        first = graphed(x, t.expand(3))
        kept = first.clone()
        graphed(x + 1, t.expand(3))
        assert torch.equal(first, kept)
        assert torch.equal(first, denoiser(x, t.expand(3)))


def test_weights_may_change(recorded):
    denoiser = model()
    graphed, x, t = cuda_graph.CUDAGraphModel(denoiser), torch.randn(3, 1, 12), torch.tensor([7])
    with torch.no_grad():
        graphed(x, t.expand(3))
        denoiser.blocks[0].attn.qkv.weight.mul_(3)
        for _ in range(2):
            assert torch.equal(graphed(x, t.expand(3)), denoiser(x, t.expand(3)))
        assert len(recorded) == 2
        denoiser.eval()
        graphed(x, t.expand(3))
        assert len(recorded) == 3


def test_what_cannot_be_replayed_is_called(recorded):
    denoiser = model()
    graphed, x = cuda_graph.CUDAGraphModel(denoiser), torch.randn(3, 1, 12)
    with torch.no_grad():
        graphed(x, torch.tensor([7, 8, 9]))
    graphed(x, torch.tensor([7]).expand(3)).sum().backward()
    assert recorded == []


@pytest.mark.parametrize("spacing", ["uniform", "logsnr"])
def test_a_count_denoiser_is_replayed_at_its_depths(recorded, spacing):
    counts, y = np.random.default_rng(0).poisson(2.0, (40, 12)).astype(np.float32), np.arange(40)[:, None] % 3
    schedule = NoiseSchedule(kind="cosine")
    likelihood = CountLikelihood(12, len(CountBins.up_to(counts.max()).lowest), schedule.noise_steps)
    denoiser = CountDenoiser(model((3,)), likelihood, schedule).eval()
    denoiser.init_from_data(counts, y, np.log1p(counts).mean(0), 0.5)
    x, log_library = torch.randn(5, 1, 12), torch.linspace(2, 4, 5)
    path = samplers.timesteps(schedule, 4, spacing, stop=500)
    cells = []
    for call in (denoiser, cuda_graph.CUDAGraphModel(denoiser)):
        guided = samplers.GuidedModel(FixedLibrary(call, log_library), torch.tensor([0, 1, 2, 0, 1]), 1.5)
        cells.append(samplers.ddim(guided, x, schedule, path, stop=500, eta=0.0, clamp_min=None))
    assert torch.equal(*cells)
    assert len(recorded) == 1
