"""CUDA-graph replay of a denoiser. The recorder is simulated, since a graph needs a GPU; the copies are real."""

import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers import relative_error, simulate_gpu

from wbdit import WBDiT, backend, samplers
from wbdit.counts.bins import CountBins
from wbdit.counts.denoiser import CountDenoiser, FixedLibrary
from wbdit.counts.likelihood import CountLikelihood
from wbdit.data.cell_matrix import MemoryMatrix
from wbdit.nn import cuda_graph
from wbdit.schedule import NoiseSchedule


@pytest.fixture
def recorded(monkeypatch):
    """Simulate recording on CPU tensors: a replay calls the function again, and writes its results to the same memory.

    Return the list of recorded calls.
    """
    calls = []

    def capture(call, pool=None):
        def replay():
            for old, new in zip(tensors_of(result), tensors_of(call()), strict=True):
                old.copy_(new)

        calls.append(call)
        result = call()
        for tensor in tensors_of(result):
            tensor.fill_(torch.nan)  # recording computes nothing
        return result, replay

    replayable = cuda_graph.CUDAGraphModel._is_replayable
    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(cuda_graph.CUDAGraphModel, "_is_replayable", lambda self, x: replayable(self, _OnGpu(x)))
    return calls


def tensors_of(result):
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


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
    monkeypatch.setattr(cuda_graph, "capture", lambda call, pool: seen.append(current[0]) or capture(call))
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    graphed, t = cuda_graph.CUDAGraphModel(model()), torch.tensor([7])
    with torch.no_grad():
        for _ in range(2):
            graphed(torch.randn(3, 1, 12), t.expand(3))
    assert seen == ["cuda:1"] * 3
    assert current == ["cuda:0"]


def test_what_cannot_be_recorded_is_called(recorded, monkeypatch):
    tried = []

    def capture(call, pool=None):
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
    denoiser.init_from_data(MemoryMatrix(counts), y, np.log1p(counts).mean(0), 0.5)
    x, log_library = torch.randn(5, 1, 12), torch.linspace(2, 4, 5)
    path = samplers.timesteps(schedule, 4, spacing, stop=500)
    cells = []
    for call in (denoiser, cuda_graph.CUDAGraphModel(denoiser)):
        guided = samplers.GuidedModel(FixedLibrary(call, log_library), torch.tensor([0, 1, 2, 0, 1]), 1.5)
        cells.append(samplers.ddim(guided, x, schedule, path, stop=500, eta=0.0, clamp_min=None))
    assert torch.equal(*cells)
    assert len(recorded) == 1


# a sampler's steps, fused with the model


@pytest.fixture
def counts_model(monkeypatch):
    """Return a count model that one op runs, as on a GPU."""
    counts = np.random.default_rng(0).poisson(2.0, (40, 12)).astype(np.float32)
    likelihood = CountLikelihood(12, len(CountBins.up_to(counts.max()).lowest), 1000)
    denoiser = CountDenoiser(model((3,)), likelihood, NoiseSchedule(kind="cosine")).eval()
    denoiser.init_from_data(MemoryMatrix(counts), np.arange(40)[:, None] % 3, np.log1p(counts).mean(0), 0.5)
    simulate_gpu(monkeypatch)
    return denoiser


def run(call, seed=0, rows=(0, 1, 2), sampler=samplers.sde_dpmpp_2m, steps=5, **options):
    """Return the final states of a count model at labels and library sizes that the rows give, or of a denoiser."""
    rows = torch.tensor(rows)
    if isinstance(getattr(call, "model", call), CountDenoiser):
        call = samplers.GuidedModel(FixedLibrary(call, 2.0 + rows / 7), rows % 3)
    schedule = NoiseSchedule(kind="cosine")
    noise = samplers.PhiloxNoise(seed, rows, (1, 12))
    path = samplers.timesteps(schedule, steps, stop=500)
    with torch.no_grad():
        return sampler(call, noise(-1), schedule, path, stop=500, clamp_min=None, **{"noise": noise, **options})


@pytest.mark.parametrize("most", [2**28, 0], ids=["tables", "step by step"])
@pytest.mark.parametrize("sampler", [samplers.ddim, samplers.unipc, samplers.sde_dpmpp_2m])
def test_a_run_is_recorded_where_it_repeats(recorded, counts_model, sampler, most, monkeypatch):
    """The first run is direct, the second recorded; later ones, of other cells, are replayed."""
    monkeypatch.setattr("wbdit.nn.conditioning.TABLE_BYTES", most)
    graphed = cuda_graph.CUDAGraphModel(counts_model)
    for times, rows in enumerate([(0, 1, 2), (3, 4, 5), (6, 7, 8), (3, 1, 2)]):
        found = run(graphed, rows=rows, sampler=sampler)
        assert relative_error(found, run(counts_model, rows=rows, sampler=sampler)) < 1e-6
        assert len(recorded) == (5 if times else 0)
    assert relative_error(run(graphed, rows=(1, 2), sampler=sampler), found[1:]) < 1e-6  # another shape
    assert len(recorded) == 5


def test_a_denoisers_run_is_recorded_too(recorded, monkeypatch):
    simulate_gpu(monkeypatch)
    denoiser = model()
    denoiser.prediction = "v"
    graphed = cuda_graph.CUDAGraphModel(denoiser)
    for rows in ((0, 1, 2), (3, 4, 5), (6, 7, 8)):
        assert relative_error(run(graphed, rows=rows), run(denoiser, rows=rows)) < 1e-6
    assert len(recorded) == 5


def test_nothing_is_copied_between_steps(recorded, counts_model, monkeypatch):
    copies, copy = [], torch.Tensor.copy_
    graphed = cuda_graph.CUDAGraphModel(counts_model)
    for rows in ((0, 1, 2), (3, 4, 5)):
        run(graphed, rows=rows)
    (first,) = graphed._runs.values()
    steps = [first._steps[i] for i in range(5)]
    own = [step.tensors["x"] for step in steps]
    assert all(after is before.new for before, after in zip(steps, own[1:], strict=False))
    loaded = first._load
    monkeypatch.setattr(first, "_load", lambda name, *given: copies.append(name) or loaded(name, *given))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, value: copies.append(to) or copy(to, value))
    run(graphed, rows=(6, 7, 8))
    inputs = [*first.inputs, first._own["x"], first._own["samples"]]
    assert sum(any(t is own for own in inputs) for t in copies if isinstance(t, torch.Tensor)) == len(inputs)
    assert [name for name in copies if isinstance(name, str)].count("x") == 1


def test_other_coefficients_are_recorded_anew(recorded, counts_model):
    """The seed is part of a step, as are the coefficients; noise that is given is an input."""
    graphed = cuda_graph.CUDAGraphModel(counts_model)
    for seed in (0, 0, 1, 1):
        assert relative_error(run(graphed, seed), run(counts_model, seed)) < 1e-6
    assert len(recorded) == 10
    given = torch.randn(3, 5, 3, 1, 12)
    for noise in given:  # kept in one tensor
        given[0].copy_(noise)
        assert relative_error(run(graphed, noise=given[0]), run(counts_model, noise=given[0])) < 1e-6
    assert len(recorded) == 15
    buffer = torch.empty(3, 1, 12)

    def refilled(step):
        return buffer.fill_(step)

    assert relative_error(run(graphed, noise=refilled), run(counts_model, noise=refilled)) < 1e-6
    assert len(recorded) == 15


def scale_weights(model):
    for p in model.parameters():
        p.mul_(1.1)


def scale_data(model):
    for p in model.parameters():
        p.data.mul_(1.1)
    model.eval()


def replace_weights(model):
    for p in model.parameters():
        p.data = 1.1 * p.data


def scale_tables(model):
    model.likelihood.values.mul_(1.1)


@pytest.mark.parametrize("change", [scale_weights, scale_data, replace_weights, scale_tables])
def test_changed_weights_are_recorded_anew(recorded, counts_model, change):
    graphed, x, t = cuda_graph.CUDAGraphModel(counts_model), torch.randn(3, 1, 12), torch.tensor([700]).expand(3)
    with torch.no_grad():
        given = counts_model.embed(torch.arange(3), torch.ones(3))
        for _ in range(2):
            run(graphed)
            before = graphed(x, t, conditioning=given)
        assert len(recorded) == 6
        change(counts_model)
        for _ in range(2):
            assert torch.equal(graphed(x, t, conditioning=given), counts_model(x, t, conditioning=given))
            assert relative_error(run(graphed), run(counts_model)) < 1e-6
        assert relative_error(graphed(x, t, conditioning=given), before) > 1e-4
        assert len(recorded) == 12


def test_the_last_state_outlives_the_next_run(recorded, counts_model):
    graphed = cuda_graph.CUDAGraphModel(counts_model)
    run(graphed)
    cells = [run(graphed, rows=rows) for rows in ((0, 1, 2), (3, 4, 5))]
    assert relative_error(cells[0], run(counts_model)) < 1e-6
    assert relative_error(cells[1], cells[0]) > 0.1


def test_runs_that_are_not_recorded(recorded, counts_model, monkeypatch):
    """Long ones would take too much memory; where recording fails, the steps are called, after one warning."""
    graphed = cuda_graph.CUDAGraphModel(counts_model)
    monkeypatch.setattr(cuda_graph, "MOST_STEPS", 4)
    for _ in range(3):
        run(graphed)
    assert recorded == []

    def capture(call, pool=None):
        recorded.append(call)
        raise RuntimeError("no graphs today")

    monkeypatch.setattr(cuda_graph, "MOST_STEPS", 5)
    monkeypatch.setattr(cuda_graph, "capture", capture)
    run(graphed)
    with pytest.warns(UserWarning, match="no graphs today"):
        found = run(graphed)
    assert relative_error(run(graphed), found) == 0
    assert relative_error(found, run(counts_model)) == 0
    assert len(recorded) == 1
