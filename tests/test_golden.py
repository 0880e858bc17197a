"""Outputs, gradients and sampling paths against numbers recorded from the published implementation."""

import pytest
import torch
from helpers import GOLDEN_SIZES, published_model, relative_error

from wbdit import DiT, NoiseSchedule, WBDiT, samplers

MODELS = {"wbdit": WBDiT, "dit": DiT}


@pytest.mark.parametrize("name", MODELS)
def test_output(name, golden):
    tensors, _ = golden
    out = published_model(name, golden)(tensors[f"{name}.x"], tensors[f"{name}.t"])
    assert relative_error(out, tensors[f"{name}.out"]) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient(name, golden):
    tensors, _ = golden
    model = published_model(name, golden)
    out = model(tensors[f"{name}.x"], tensors[f"{name}.t"])
    loss = torch.nn.functional.mse_loss(out, tensors[f"{name}.target"])
    loss.backward()
    assert loss.item() == pytest.approx(tensors[f"{name}.loss"].item(), rel=1e-5)
    trained = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    recorded = {k.removeprefix(f"{name}.grad."): v for k, v in tensors.items() if k.startswith(f"{name}.grad.")}
    assert trained.keys() == recorded.keys()
    errors = {key: relative_error(grad, recorded[key]) for key, grad in trained.items()}
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("name", MODELS)
def test_fresh_positions_are_the_published_ones(name, golden):
    tensors, config = golden
    fresh = MODELS[name](**{key: config[key] for key in GOLDEN_SIZES}).pos_embed
    torch.testing.assert_close(fresh, tensors[f"{name}.state.pos_embed"], rtol=1e-6, atol=1e-6)


def test_schedule(golden):
    tensors, config = golden
    schedule = NoiseSchedule(config["noise_steps"])
    torch.testing.assert_close(schedule.beta.float(), tensors["schedule.beta"])
    torch.testing.assert_close(schedule.alpha_hat.float(), tensors["schedule.alpha_hat"])


def test_noising(golden):
    tensors, config = golden
    x0, t, noise = (tensors[f"noising.{key}"] for key in ("x0", "t", "noise"))
    x_t = NoiseSchedule(config["noise_steps"]).noising(x0, t, noise)
    assert relative_error(x_t, tensors["noising.xt"]) < 1e-5


def test_ddpm_path(golden):
    tensors, config = golden
    schedule, model = NoiseSchedule(config["noise_steps"]), published_model("wbdit", golden)
    x0 = samplers.ddpm(model, tensors["ddpm.xT"], schedule, noise=tensors["ddpm.noise"])
    assert relative_error(x0, tensors["ddpm.x0"]) < 1e-4


@pytest.mark.parametrize("eta", [0, 1])
def test_ddim_path(eta, golden):
    tensors, config = golden
    schedule, model = NoiseSchedule(config["noise_steps"]), published_model("wbdit", golden)
    key = f"ddim_eta{eta}"
    x0 = samplers.ddim(
        model, tensors[f"{key}.xT"], schedule, config[f"{key}.timesteps"], eta=eta, noise=tensors[f"{key}.noise"]
    )
    assert relative_error(x0, tensors[f"{key}.x0"]) < 1e-4
