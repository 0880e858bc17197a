"""The authors' interface: recorded paths, agreement with the formulas, and input errors."""

from itertools import pairwise

import pytest
import torch
from helpers import published_model, relative_error, stirred

from wbdit import WBDiT
from wbdit.compat import DiffusionGene

SIZES = {"input_size": 24, "patch_size": 4, "hidden_size": 16, "num_heads": 2}


@pytest.fixture
def model():
    return stirred(WBDiT(**SIZES)).train()


@pytest.fixture
def diffusion():
    return DiffusionGene(noise_steps=30, gene_size=24, device="cpu")


def draws(monkeypatch, noises):
    """Make PyTorch return the recorded noise as its next draws."""
    left = iter(noises)
    monkeypatch.setattr(torch, "randn_like", lambda x: next(left).to(x))
    return left


def test_schedule(golden):
    tensors, config = golden
    diffusion = DiffusionGene(config["noise_steps"], device="cpu")
    torch.testing.assert_close(diffusion.beta, tensors["schedule.beta"])
    torch.testing.assert_close(diffusion.alpha, 1 - tensors["schedule.beta"])
    torch.testing.assert_close(diffusion.alpha_hat, tensors["schedule.alpha_hat"])


def test_noising(golden, monkeypatch):
    tensors, config = golden
    diffusion = DiffusionGene(config["noise_steps"], device="cpu")
    draws(monkeypatch, [tensors["noising.noise"]])
    x_t, epsilon = diffusion.noise_genes(tensors["noising.x0"], tensors["noising.t"])
    assert relative_error(x_t, tensors["noising.xt"]) < 1e-5
    assert torch.equal(epsilon, tensors["noising.noise"])


def test_golden_ddpm(golden, monkeypatch):
    tensors, config = golden
    diffusion = DiffusionGene(config["noise_steps"], gene_size=config["input_size"], device="cpu")
    left = draws(monkeypatch, tensors["ddpm.noise"])
    x0 = diffusion.sample(published_model("wbdit", golden), 3, seed=tensors["ddpm.xT"])
    assert relative_error(x0, tensors["ddpm.x0"]) < 1e-4
    assert next(left, None) is None  # every recorded draw was used


@pytest.mark.parametrize("eta", [0, 1])
def test_golden_ddim(eta, golden, monkeypatch):
    tensors, config = golden
    key, stride, steps = f"ddim_eta{eta}", config["ddim_stride"], config["noise_steps"]
    diffusion = DiffusionGene(steps, gene_size=config["input_size"], device="cpu")
    draws(monkeypatch, tensors[f"{key}.noise"])
    sequence = [0, 1, *range(stride, steps + 1, stride)]  # the last is past the schedule, as in the authors' script
    x0 = diffusion.sample_ddim(
        published_model("wbdit", golden), 3, eta=eta, sub_time_seq=sequence, seed=tensors[f"{key}.xT"]
    )
    assert relative_error(x0, tensors[f"{key}.x0"]) < 1e-4


def by_formula(diffusion, model, x, sequence, eta):
    """Sample by the formulas of DDIM, using only the attributes of `diffusion` (Song et al. 2021, equation 12)."""
    model.eval()
    for before, i in reversed(list(pairwise(sequence))):
        if i >= diffusion.noise_steps:
            continue
        now, then = diffusion.alpha_hat[i], diffusion.alpha_hat[before]
        with torch.no_grad():
            epsilon = model(x, torch.full((len(x),), i))
        sigma = eta * ((1 - then) / (1 - now)).sqrt() * (1 - now / then).sqrt()
        clean = (x - (1 - now).sqrt() * epsilon) / now.sqrt()
        noise = torch.randn_like(x) if i > 1 else torch.zeros_like(x)
        x = then.sqrt() * clean + (1 - then - sigma**2).sqrt() * epsilon + sigma * noise
    return x


@pytest.mark.parametrize("sequence", [[0, 1, 10, 20, 30], [0, 7, 29], list(range(31))], ids=str)
def test_ddim_is_its_formula(sequence, model, diffusion):
    """The same random draws give the same cells. If the sequence skips t = 1, the last step adds noise."""
    torch.manual_seed(3)
    expected = by_formula(diffusion, model, torch.randn(5, 1, 24), sequence, eta=1.0)
    torch.manual_seed(3)
    found = diffusion.sample_ddim(model, 5, sub_time_seq=sequence, nonnagative=False)
    assert relative_error(found, expected) < 1e-4


def test_no_sequence_means_every_timestep(model, diffusion):
    start = torch.randn(2, 1, 24)
    every = diffusion.sample_ddim(model, 2, eta=0, sub_time_seq=range(31), seed=start)
    assert torch.equal(diffusion.sample_ddim(model, 2, eta=0, seed=start), every)


def test_the_starting_noise_is_left_alone(model, diffusion):
    start = torch.randn(2, 1, 24)
    before = start.clone()
    diffusion.sample(model, 2, seed=start)
    diffusion.sample_ddim(model, 2, seed=start)
    assert torch.equal(start, before)


def test_nonnegative_unless_told(model, diffusion):
    start = torch.randn(4, 1, 24)
    for sample in (diffusion.sample, lambda *given, **named: diffusion.sample_ddim(*given, eta=0, **named)):
        torch.manual_seed(0)
        lowest = sample(model, 4, seed=start, nonnagative=False)
        torch.manual_seed(0)
        assert torch.equal(sample(model, 4, seed=start), lowest.clamp(min=0))
        assert lowest.min() < 0


def test_the_model_trains_on_afterwards(model, diffusion):
    modes = []
    model.register_forward_hook(lambda module, given, out: modes.append(module.training))
    diffusion.sample(model, 1)
    assert set(modes) == {False}
    assert model.training


def test_the_model_trains_on_after_an_error(diffusion):
    broken = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError):
        diffusion.sample(broken, 1)
    assert broken.training


def test_their_training_loop(model, diffusion):
    """In the authors' training loop, the loss decreases."""
    torch.manual_seed(0)
    cells = torch.rand(32, 1, 24)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(100):
        t = diffusion.sample_timesteps(len(cells))
        assert t.min() >= 1
        assert t.max() < 30
        x_t, noise = diffusion.noise_genes(cells, t)
        loss = torch.nn.functional.mse_loss(noise, model(x_t, t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize("sequence", [[1, 10], [0, 20, 10], [0, 30], [], [0, 5, 5]], ids=str)
def test_a_wrong_sequence_is_named(sequence, model, diffusion):
    with pytest.raises(ValueError, match="rise from 0"):
        diffusion.sample_ddim(model, 1, sub_time_seq=sequence)
