"""CRATE's blocks and their fast replacements: outputs, gradients, dropout, and blocks that are not replaced."""

import copy

import pytest
import torch
from helpers import relative_error
from torch import nn

import wbdit
from bench.accelerate import Attention, FeedForward, crate
from wbdit import crate as fast


def tokens(width=48, n=11):
    return torch.randn(3, n, width, generator=torch.Generator().manual_seed(1))


def replaced(network):
    return [type(part) for part in network.modules() if isinstance(part, fast.Attention | fast.FeedForward)]


def test_twelve_layers():
    plain = crate(12, 48, 4)
    quick = wbdit.accelerate(copy.deepcopy(plain))
    assert replaced(quick) == [fast.Attention, fast.FeedForward] * 12
    with torch.no_grad():
        assert relative_error(quick(tokens()), plain(tokens())) < 1e-5
    assert plain.state_dict().keys() == quick.state_dict().keys()


def test_gradients():
    plain = crate(3, 48, 4)
    quick = wbdit.accelerate(copy.deepcopy(plain))
    for network in (plain, quick):
        network(tokens()).square().mean().backward()
    found = dict(quick.named_parameters())
    for name, parameter in plain.named_parameters():
        assert relative_error(found[name].grad, parameter.grad) < 1e-4, name


def test_parameters_are_shared():
    """An optimizer created before the replacement still trains the network."""
    network = crate(2, 48, 4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    before = [id(p) for p in network.parameters()]
    assert wbdit.accelerate(network) is network
    assert [id(p) for p in network.parameters()] == before
    weights = network[0].sparsify.weight.clone()
    with torch.no_grad():
        old = network(tokens())
    network(tokens()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(network[0].sparsify.weight, weights)
    with torch.no_grad():
        assert not torch.equal(network(tokens()), old)


@pytest.mark.parametrize(("heads", "dim_head"), [(4, 12), (4, 16), (1, 16), (1, 48)], ids=str)
def test_twins_take_published_state_dicts(heads, dim_head):
    attention = Attention(48, heads, dim_head)
    if (heads, dim_head) == (1, 48):
        attention.to_out = nn.Identity()  # as published: a single head of full width has no output projection
    twin = fast.Attention(48, heads, dim_head)
    twin.load_state_dict(attention.state_dict(), strict=True)
    assert relative_error(twin(tokens()), attention(tokens())) < 1e-5
    feed_forward = FeedForward(48, step_size=0.3)
    twin = fast.FeedForward(48, 192, step_size=0.3)
    twin.load_state_dict(feed_forward.state_dict(), strict=True)
    assert relative_error(twin(tokens()), feed_forward(tokens())) < 1e-5


def test_dropout_drops_in_training_alone():
    plain = crate(1, 48, 4, dropout=0.5)
    quick = wbdit.accelerate(copy.deepcopy(plain))
    assert quick[0].attention.dropout.p == 0.5
    torch.manual_seed(0)
    expected = plain(tokens())
    torch.manual_seed(0)
    assert relative_error(quick(tokens()), expected) < 1e-5  # the same draws, in the same order
    with torch.no_grad():
        assert relative_error(quick.eval()(tokens()), plain.eval()(tokens())) < 1e-5


def test_modes_are_kept():
    network = crate(2, 48, 4)
    network[0].eval()
    wbdit.accelerate(network)
    assert [part.training for part in network.modules()] == [part.training for part in network.modules()]
    assert not network[0].attention.training
    assert network[1].attention.training


class Scaled(Attention):
    """The same parts with another formula."""

    def forward(self, x):
        return 1.01 * super().forward(x)


def test_other_formulas_are_left_alone():
    network = crate(2, 48, 4)
    network[0].attention = Scaled(48, 4, 12)
    wbdit.accelerate(network)
    assert type(network[0].attention) is Scaled
    assert type(network[1].attention) is fast.Attention


def test_watched_blocks_are_left_alone():
    network = crate(1, 48, 4)
    seen = []
    network[0].attention.register_forward_hook(lambda *given: seen.append(1))
    wbdit.accelerate(network)
    network(tokens())
    assert seen == [1]


@pytest.mark.parametrize("network", [nn.Linear(4, 4), nn.TransformerEncoderLayer(16, 2, 32)], ids=["linear", "torch's"])
def test_a_network_without_such_blocks_is_named(network):
    with pytest.raises(wbdit.InputError, match="no CRATE block"):
        wbdit.accelerate(network)
