"""AdamW with clipping and averaging in one step: the C++ kernel against PyTorch's own functions."""

import math
from copy import deepcopy

import pytest
import torch
from helpers import relative_error

from wbdit.nn.weight_cache import WeightCache
from wbdit.ops import build, cpu
from wbdit.training.optimizer import AveragingAdamW

KERNELS = pytest.mark.skipif(not build.available(), reason="the kernels cannot be built here")
SHAPES = (3, 7), (20_001,), (), (33, 500)  # one of several chunks, one that ends within a vector, a scalar


def setting(clip_norm=1.0, averaged=True):
    """Return an optimizer, its weights and their averages; the groups differ in rate and decay, as in training."""
    torch.manual_seed(0)
    weights = [torch.randn(shape).requires_grad_() for shape in SHAPES]
    averages = {p: p.detach().clone() for p in weights} if averaged else {}
    groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0, "lr": 0.1}]
    return AveragingAdamW(groups, averages, clip_norm, lr=0.01, betas=(0.9, 0.99)), weights, averages


def take(steps, optimizer, weights, first=0):
    """Take steps with random gradients; return all tensors that they change."""
    for step in range(first, first + steps):
        torch.manual_seed(100 + step)
        for p in weights:
            p.grad = 0.3 * torch.randn(p.shape)
        optimizer.decay = 1 - 1 / (step + 2)
        optimizer.step()
    states = [value for p in weights for value in optimizer.state[p].values()]
    return [t.detach().clone() for t in (*weights, *optimizer.averages.values(), *states)]


@KERNELS
@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 1e6])
def test_the_kernel_follows_pytorch(monkeypatch, clip_norm, averaged):
    optimizer, weights, _ = setting(clip_norm, averaged)
    found = take(4, optimizer, weights)
    monkeypatch.setattr(cpu, "serves", lambda *tensors: False)
    optimizer, weights, _ = setting(clip_norm, averaged)
    expected = take(4, optimizer, weights)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


@KERNELS
def test_a_step_does_not_depend_on_the_threads():
    many, results = torch.get_num_threads(), []
    for threads in (1, max(2, many)):
        torch.set_num_threads(threads)
        results.append(take(2, *setting()[:2]))
    torch.set_num_threads(many)
    assert all(map(torch.equal, *results))


@KERNELS
def test_the_state_is_that_of_adamw():
    """It loads into PyTorch's optimizer and back, and continues from there."""
    optimizer, weights, _ = setting(averaged=False)
    take(2, optimizer, weights)
    other = torch.optim.AdamW(optimizer.param_groups, fused=True)
    other.load_state_dict(optimizer.state_dict())
    again, own, _ = setting(averaged=False)
    again.load_state_dict(deepcopy(other.state_dict()))
    with torch.no_grad():
        for p, value in zip(own, weights, strict=True):
            p.copy_(value)
    for a, b in zip(take(2, again, own, first=2), take(2, optimizer, weights, first=2), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("served", [True, False], ids=["kernel", "pytorch"])
def test_weights_without_a_gradient_stay(monkeypatch, served):
    """Their averages still approach them."""
    if not served:
        monkeypatch.setattr(cpu, "serves", lambda *tensors: False)
    optimizer, weights, averages = setting()
    before = weights[1].detach().clone()
    averages[weights[1]].zero_()
    weights[0].grad = torch.ones(SHAPES[0])
    optimizer.decay = 0.75
    optimizer.step()
    assert torch.equal(weights[1], before)
    torch.testing.assert_close(averages[weights[1]], before / 4)
    assert not torch.equal(weights[0], averages[weights[0]])


def test_a_step_clears_what_is_cached_of_weights():
    optimizer, weights, _ = setting()
    cache = WeightCache()
    version = cache.version(weights)
    weights[2].grad = torch.zeros(())
    optimizer.step()
    assert cache.version(weights) > version


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_hidden(bad):
    optimizer, weights, _ = setting()
    for p in weights:
        p.grad = torch.ones_like(p)
    weights[0].grad[1, 2] = bad
    optimizer.step()
    assert not weights[0][1, 2].isfinite()
