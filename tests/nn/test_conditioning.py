"""Several label columns: their embedding, label dropout, and one computation per combination."""

import pytest
import torch
from helpers import relative_error
from torch.nn import functional as F

from wbdit import WBDiT
from wbdit.nn.embeddings import LabelEmbedder

SMALL = {"input_size": 12, "patch_size": 4, "hidden_size": 8, "depth": 2, "num_heads": 2}


def stirred(label_sizes, seed=0, **settings):
    torch.manual_seed(seed)
    model = WBDiT(**SMALL, label_sizes=label_sizes, **settings).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def test_one_column_is_as_it_was():
    one = stirred([3])
    assert one.y_embedder.embedding_table.weight.shape == (4, 8)
    x, t, y = torch.randn(5, 1, 12), torch.arange(5), torch.tensor([0, 1, 2, 3, 0])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(one(x, t, y), one(x, t, y[:, None]))
    embed = LabelEmbedder([3], 8, 0.5)
    torch.manual_seed(1)
    dropped = embed.train()(y, 5)
    torch.manual_seed(1)
    drop = torch.rand(5) < 0.5  # one random number per sample
    assert torch.equal(dropped, embed.eval()(torch.where(drop, 3, y), 5))


def test_the_vectors_of_the_columns_are_summed():
    embed = LabelEmbedder([3, 2], 8, 0.0)
    first, second = embed.embedding_table.weight[:4], embed.embedding_table.weight[4:]
    y = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    torch.testing.assert_close(
        embed(y, 12), F.one_hot(y[:, 0]).float() @ first + F.one_hot(y[:, 1]).float() @ second, rtol=0, atol=1e-7
    )
    torch.testing.assert_close(embed(None, 2), (first[3] + second[2]).expand(2, -1))
    with pytest.raises(IndexError):
        embed(torch.tensor([[4, 0]]), 1)  # must not read the second column's rows


def test_columns_are_dropped_one_by_one_and_together():
    p, n = 0.3, 40_000
    embed = LabelEmbedder([1, 1, 1], 3, p).train()
    with torch.no_grad():  # component k of the sum is 1 where column k is null
        embed.embedding_table.weight.copy_(torch.eye(3).repeat_interleave(2, 0) * torch.tensor([0.0, 1.0] * 3)[:, None])
    torch.manual_seed(0)
    null = embed(torch.zeros(n, 3, dtype=torch.long), n) == 1
    alone, both = 1 - (1 - p) ** 2, p + (1 - p) * p**2
    assert null.double().mean(0).tolist() == pytest.approx(3 * [alone], abs=0.015)
    assert (null[:, 0] & null[:, 2]).double().mean() == pytest.approx(both, abs=0.015)
    assert null.all(1).double().mean() == pytest.approx(p + (1 - p) * p**3, abs=0.015)


def test_a_combination_is_computed_once(monkeypatch):
    model, computed, condition = stirred([3, 2]), [], WBDiT._condition

    def listed(self, t, y, conditioning=None):
        rows = y if conditioning is None else conditioning
        computed.append(list(zip(t.tolist(), map(tuple, rows.tolist()), strict=True)))
        return condition(self, t, y, conditioning)

    monkeypatch.setattr(WBDiT, "_condition", listed)
    x, t = torch.randn(5, 1, 12), torch.tensor([7])
    y = torch.tensor([[0, 1], [2, 0], [0, 1], [3, 2], [2, 0]])
    with torch.no_grad():
        out = model(x, t.expand(5), y)
        assert computed == [[(7, (0, 1)), (7, (2, 0)), (7, (3, 2))]]
        assert torch.equal(model(x, t.expand(5), y), out)
        parts = [stirred([3, 2])(x[[i]], t, y[[i]]) for i in range(5)]
        mixed = model(x, t.expand(5), conditioning=model.embed(y))
    assert relative_error(torch.cat(parts), out) < 1e-5
    assert relative_error(mixed, out) < 1e-6
    assert [len(rows) for rows in computed] == [3, 1, 1, 1, 1, 1, 5]  # conditioning vectors are not cached


@pytest.mark.parametrize("label_sizes", [[1, 1], [3, 2], [4]])
def test_one_timestep_for_all(monkeypatch, label_sizes):
    """On a GPU, compute one row per possible label combination if there are fewer of them than samples."""
    monkeypatch.setattr("wbdit.nn.conditioning.may_cache", lambda *weights: False)
    model, n = stirred(label_sizes), 9
    y = torch.stack([torch.randint(k + 1, (n,)) for k in label_sizes], 1)
    x, t = torch.randn(n, 1, 12), torch.tensor([123])
    with torch.no_grad():
        for given in ({"y": y}, {}, {"conditioning": model.embed(y)}):
            assert relative_error(model(x, t.expand(n), **given), model(x, t.repeat(n), **given)) < 1e-6
        assert relative_error(model(x, t.expand(n), y), stirred(label_sizes)(x, t.repeat(n), y.roll(1, 0))) > 1e-4


@pytest.mark.parametrize(
    ("label_sizes", "y", "words"),
    [
        ([3, 2], torch.zeros(4, dtype=torch.long), r"expected \(4, 2\)"),
        ([3, 2], torch.zeros(4, 3, dtype=torch.long), r"expected \(4, 2\)"),
        ([3], torch.zeros(4, 2, dtype=torch.long), r"expected \(4,\)"),
    ],
)
def test_labels_that_do_not_fit(label_sizes, y, words):
    with pytest.raises(ValueError, match=words):
        stirred(label_sizes)(torch.zeros(4, 1, 12), torch.ones(4), y)
    with pytest.raises(ValueError, match="at least 1"):
        WBDiT(**SMALL, label_sizes=[3, 0])


def test_vectors_that_do_not_fit():
    with pytest.raises(ValueError, match=r"expected \(4, 8\)"):
        stirred([3])(torch.zeros(4, 1, 12), torch.ones(4), conditioning=torch.zeros(4, 2))
