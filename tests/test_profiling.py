"""Named ranges: in torch.profiler, with a simulated nvtx, absent without nvtx and GPU, hidden from torch.compile."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from wbdit import WBDiT, profiling, samplers
from wbdit.data.loader import Batches
from wbdit.schedule import NoiseSchedule
from wbdit.training.config import Budget, Training
from wbdit.training.losses import SquaredError
from wbdit.training.trainer import Trainer


@pytest.fixture
def ranges(monkeypatch):
    """Return the list of opened and closed ranges: the name when one opens, None when one closes."""
    seen = []

    @contextmanager
    def annotate(name, domain):
        assert domain == "wbdit"
        seen.append(name)
        yield
        seen.append(None)

    monkeypatch.setattr(profiling, "nvtx", SimpleNamespace(annotate=annotate))
    return seen


def model():
    return WBDiT(input_size=12, patch_size=4, hidden_size=8, depth=2, num_heads=2)


def test_the_parts_of_a_forward(ranges):
    model()(torch.randn(2, 1, 12), torch.tensor([3, 7]))
    opened = [name for name in ranges if name]
    assert opened == ["denoiser", "conditioning", "embedding", "run_blocks", "read-out"]
    assert ranges.count(None) == len(opened)
    assert ranges[-1] is None  # the whole forward closes last


def test_the_parts_of_blocks_with_hooks(ranges):
    denoiser = model()
    denoiser.blocks[0].register_forward_hook(lambda *args: None)
    denoiser(torch.randn(2, 1, 12), torch.tensor([3, 7]))
    assert [name for name in ranges if name in ("mssa", "ista", "run_blocks")] == ["mssa", "ista"] * 2


def test_the_parts_of_a_training_step(ranges):
    loss_fn, batches = SquaredError(model(), NoiseSchedule()), Batches(torch.randn(8, 12), None, 4)
    trainer = Trainer(loss_fn, batches, Training(precision="fp32"), Budget(steps=1))
    trainer.train(bar=False)
    parts = [name for name in ranges if name in ("train step", "batch", "forward", "backward", "optimizer")]
    assert parts == ["train step", "batch", "forward", "backward", "optimizer"]


def test_the_steps_of_a_sampler(ranges):
    with torch.no_grad():
        samplers.ddim(model().eval(), torch.randn(2, 1, 12), NoiseSchedule(), [500, 100])
    assert [n for n in ranges if n in ("sampler step", "denoiser")] == ["denoiser", "sampler step"] * 2


def test_torch_profiler_sees_the_parts(ranges):
    """While torch.profiler records, the ranges are its events and contain the ops, and none goes to nvtx."""
    denoiser = model().eval()
    with torch.profiler.profile() as profile, torch.no_grad():
        samplers.ddim(denoiser, torch.randn(2, 1, 12), NoiseSchedule(), [500, 100])
    calls, steps = ([e for e in profile.events() if e.name == name] for name in ("denoiser", "sampler step"))
    assert (len(calls), len(steps)) == (2, 2)
    inside = [child.name for child in calls[0].cpu_children]
    parts = [name for name in inside if "::" not in name]
    assert parts == ["conditioning", "embedding", "run_blocks", "read-out"]
    assert "wbdit::sampler_step" in {child.name for child in steps[0].cpu_children}
    assert ranges == []
    denoiser(torch.randn(2, 1, 12), torch.tensor([3, 7]))
    assert "denoiser" in ranges  # nvtx again, once the profiler has stopped


def test_pytorchs_own_without_nvtx(ranges, monkeypatch):
    """PyTorch's own NVTX has no domain, and is used only with a GPU: it raises in a PyTorch without CUDA."""
    annotate = profiling.nvtx.annotate
    monkeypatch.setattr(profiling, "nvtx", None)
    monkeypatch.setattr(profiling, "_has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: annotate(name, "wbdit"))
    with profiling.span("forward"):
        pass
    assert ranges == ["forward", None]


def test_nothing_without_nvtx_and_gpu(monkeypatch):
    monkeypatch.setattr(profiling, "nvtx", None)
    monkeypatch.setattr(profiling, "_has_gpu", lambda: False)
    assert profiling.span("forward") is profiling.span("backward")
    with profiling.span("forward"):
        pass


def test_a_compiler_sees_none(ranges):
    compiled = torch.compile(model(), backend="eager", fullgraph=True)
    compiled(torch.randn(2, 1, 12), torch.tensor([3, 7]))
    assert ranges == []
