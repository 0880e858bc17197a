"""Samplers whose steps are fused with the model: same cells, and nothing of PyTorch's own between two ops."""

import pytest
import torch
from helpers import SMALL, Launches, relative_error, simulate_gpu, stirred

from wbdit import DiT, NoiseSchedule, WBDiT, samplers
from wbdit.samplers import GuidedModel

SCHEDULE = NoiseSchedule(kind="cosine")
SAMPLERS = pytest.mark.parametrize("name", samplers.BY_NAME)
Y = torch.tensor([0, 2, 1])


def cells_of(model, name="unipc", stop=0, steps=4, callback=None, noise=None):
    noise = noise or samplers.PhiloxNoise(3, torch.arange(3), (1, 40))
    path = samplers.timesteps(SCHEDULE, steps, "logsnr", stop=stop)
    sample = samplers.BY_NAME[name].sample
    return sample(model, torch.randn(3, 1, 40), SCHEDULE, path, stop=stop, noise=noise, callback=callback)


def both(monkeypatch, model, **given):
    """Return the cells of a model called step by step, and with fused steps as on a GPU."""
    found = []
    for gpu in (False, True):
        with monkeypatch.context() as patched:
            if gpu:
                simulate_gpu(patched)
            torch.manual_seed(0)
            found.append(cells_of(model, **given))
    return found


@SAMPLERS
@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("stop", [0, 300])
def test_the_cells_are_the_same(name, prediction, stop, monkeypatch):
    options = {"shared_patches": False, "cell_token": True, "label_sizes": [3]}
    model = stirred(WBDiT(**SMALL, **options, prediction=prediction))
    apart, fused = both(monkeypatch, GuidedModel(model, Y), name=name, stop=stop)
    assert relative_error(fused, apart) < 1e-5


@pytest.mark.parametrize(
    "given", [{}, {"toward": Y.flip(0), "mix": 0.3}, {"weight": 2.0}], ids=["labels", "vectors", "two terms"]
)
@pytest.mark.parametrize("most", [2**28, 0], ids=["tables", "step by step"])
def test_whatever_the_model_is_given(given, most, monkeypatch):
    monkeypatch.setattr("wbdit.nn.conditioning.TABLE_BYTES", most)
    model = stirred(WBDiT(**SMALL, label_sizes=[3], prediction="v"))
    apart, fused = both(monkeypatch, GuidedModel(model, Y, **given))
    assert relative_error(fused, apart) < 1e-5
    apart, fused = both(monkeypatch, model)
    assert relative_error(fused, apart) < 1e-5


def test_a_step_is_one_op(monkeypatch):
    simulate_gpu(monkeypatch)
    model, marks = stirred(WBDiT(**SMALL, label_sizes=[3], prediction="v")), []
    with Launches() as launches:
        cells_of(GuidedModel(model, Y), callback=lambda *step: marks.append(len(launches.names)))
    assert launches.names[marks[0] :] == ["wbdit.denoise_step"] * 3


def test_other_models_are_called_step_by_step(monkeypatch):
    """On a CPU, in training, with hooks that would not be called, and a black-box model."""
    x, times = torch.randn(3, 1, 40), torch.tensor([900, 500])
    model = stirred(WBDiT(**SMALL))
    with torch.no_grad():
        assert model.fuse_steps(x, times) is None
        assert stirred(DiT(**SMALL)).fuse_steps(x, times) is None
        simulate_gpu(monkeypatch)
        assert model.fuse_steps(x, times) is not None
        assert model.train().fuse_steps(x, times) is None
        model.eval().register_forward_hook(lambda *given: None)
        assert model.fuse_steps(x, times) is None


def test_inputs_that_do_not_fit(monkeypatch):
    simulate_gpu(monkeypatch)
    model, x, times = stirred(WBDiT(**SMALL, label_sizes=[3])), torch.randn(3, 1, 40), torch.tensor([900, 500])
    with torch.no_grad():
        with pytest.raises(ValueError, match="expected"):
            model.fuse_steps(x[..., 1:], times)
        with pytest.raises(ValueError, match="expected"):
            model.fuse_steps(x, times, Y[:2])


@SAMPLERS
def test_fused_steps_get_the_whole_update(name):
    """Steps that apply the ops one after another give the same cells as calling the model."""

    class Model:
        prediction = "v"

        def __call__(self, x, t):
            return torch.tanh(1.5 * x + t.to(x.dtype).view(-1, 1, 1) / 300) - 0.3 * x.roll(1, -1)

    class Apart:
        def __init__(self, model, x, times):
            self.model, self.times, self.shape = model, times, x.shape

        def step(self, i, x, *, clean, **update):
            assert x.shape == self.shape
            out = self.model(x, self.times[i].expand(len(x)))
            estimate = None if clean is None else clean[0] * x + clean[1] * out
            return samplers.loop.ops.sampler_step(x, out, **update), estimate

    class Fused(Model):
        def fuse_steps(self, x, times):
            assert times.tolist() == pytest.approx(samplers.timesteps(SCHEDULE, 4, "logsnr"))
            return Apart(Model(), x, times)

    found = []
    for model in (Model(), Fused()):
        torch.manual_seed(0)
        found.append(cells_of(model, name))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
