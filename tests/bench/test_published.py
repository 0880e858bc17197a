"""The formula in published.py, against recorded numbers and against models with options beyond the paper."""

import pytest
import torch
from helpers import relative_error
from published import published_forward

from wbdit import NoiseSchedule, WBDiT, backend, samplers

SIZES = ("input_size", "patch_size", "hidden_size", "depth", "num_heads")


@pytest.fixture
def model(golden):
    tensors, config = golden
    model = WBDiT(**{key: config[key] for key in SIZES})
    state = {k.removeprefix("wbdit.state."): v for k, v in tensors.items() if k.startswith("wbdit.state.")}
    model.load_state_dict(state, strict=True)
    return model


def test_output(model, golden):
    tensors, _ = golden
    out = published_forward(model, tensors["wbdit.x"], tensors["wbdit.t"])
    assert relative_error(out, tensors["wbdit.out"]) < 1e-5


def test_every_gradient(model, golden):
    tensors, _ = golden
    out = published_forward(model, tensors["wbdit.x"], tensors["wbdit.t"])
    torch.nn.functional.mse_loss(out, tensors["wbdit.target"]).backward()
    trained = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    errors = {key: relative_error(grad, tensors[f"wbdit.grad.{key}"]) for key, grad in trained.items()}
    assert max(errors.values()) < 1e-4, errors


def test_sampling_path(model, golden):
    tensors, config = golden
    x0 = samplers.ddim(
        lambda x, t: published_forward(model, x, t),
        tensors["ddim_eta1.xT"],
        NoiseSchedule(config["noise_steps"]),
        config["ddim_eta1.timesteps"],
        noise=tensors["ddim_eta1.noise"],
    )
    assert relative_error(x0, tensors["ddim_eta1.x0"]) < 1e-4


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("labels", [(), (3,)])
def test_beyond_the_paper_it_is_the_model(heads, shared, labels):
    """In fp64, two implementations of one formula agree to 1e-9. The 43 genes do not fill the last patch."""
    generator = torch.Generator().manual_seed(0)
    model = WBDiT(43, 8, hidden_size=32, depth=2, num_heads=heads, label_sizes=labels, shared_patches=shared).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    x, t = torch.randn(3, 1, 43, generator=generator).double(), torch.tensor([1, 500, 999])
    for y in (None, torch.tensor([0, 2, 3])) if labels else (None,):
        with backend("reference"):
            expected = model.eval()(x, t, y)
        assert relative_error(published_forward(model, x, t, y), expected) < 1e-9
