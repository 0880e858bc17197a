"""The denoisers: sizes, padding, labels, types, compilation, and what they refuse."""

import pytest
import torch
from conftest import relative_error

from wbdit import DiT, WBDiT

SMALL = {"input_size": 40, "patch_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 4}
BOTH = pytest.mark.parametrize("kind", [WBDiT, DiT])


def stirred(model, seed=0):
    """Draw every weight anew, the same for the same shapes, so that every path carries signal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def batch(input_size=40, channels=1, n=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, input_size, generator=generator), torch.tensor([1, 500, 999])[:n]


def test_published_defaults():
    model = WBDiT()
    assert (model.input_size, model.patch_size, model.hidden_size, model.num_heads) == (2000, 10, 768, 8)
    assert len(model.blocks) == 1
    x, t = batch(2000)
    assert model(x, t).shape == x.shape
    assert (model(x, t) == 0).all()  # adaLN-Zero: a fresh model answers zero


def test_published_positional_arguments():
    model = WBDiT(40, 8, 1, 32, 2, 4, 4.0, 0.1)
    assert model(*batch()).shape == (3, 1, 40)


@BOTH
@pytest.mark.parametrize("input_size", [1, 7, 8, 55, 59])
def test_padding_is_invisible(kind, input_size):
    sizes = {**SMALL, "input_size": input_size}
    tokens = -(-input_size // 8)
    model, whole = stirred(kind(**sizes)), stirred(kind(**{**sizes, "input_size": 8 * tokens}))
    x, t = batch(8 * tokens)
    x[..., input_size:] = 0
    out = model(x[..., :input_size], t)
    assert out.shape == (3, 1, input_size)
    torch.testing.assert_close(out, whole(x, t)[..., :input_size])


@BOTH
def test_float_timesteps(kind):
    model = stirred(kind(**SMALL))
    x, t = batch()
    torch.testing.assert_close(model(x, t.float()), model(x, t))
    between = model(x, t - 0.5)
    assert relative_error(between, model(x, t)) > 1e-6


@BOTH
def test_labels(kind):
    model = stirred(kind(**SMALL, num_classes=3))
    x, t = batch()
    first, second = (model(x, t, torch.full((3,), k)) for k in (0, 1))
    assert relative_error(first, second) > 1e-4
    null = model(x, t, torch.full((3,), 3))
    torch.testing.assert_close(model(x, t), null)
    with pytest.raises(ValueError, match="without labels"):
        kind(**SMALL)(x, t, torch.zeros(3, dtype=torch.long))


def test_labels_are_dropped_in_training_alone():
    model = stirred(WBDiT(**SMALL, class_dropout_prob=1.0, num_classes=2))
    x, t = batch()
    y = torch.zeros(3, dtype=torch.long)
    labelled = model(x, t, y)
    torch.testing.assert_close(model.train()(x, t, y), model(x, t))
    assert relative_error(labelled, model(x, t)) > 1e-4


@BOTH
@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 1},
        {"in_channels": 2},
        {"learn_sigma": True},
        {"shared_patches": False},
        {"shared_patches": False, "in_channels": 2, "input_size": 37},
        {"depth": 1, "patch_size": 40},
    ],
    ids=str,
)
def test_other_shapes(kind, change):
    sizes = {**SMALL, **change}
    model = stirred(kind(**sizes))
    x, t = batch(sizes["input_size"], sizes.get("in_channels", 1))
    out = model(x, t)
    assert out.shape == (3, x.shape[1] * (2 if change.get("learn_sigma") else 1), x.shape[2])
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_one_subspace_has_no_output_map():
    """As published: with one head there is nothing to mix, and the checkpoints have no such weights."""
    assert not [name for name in WBDiT(**{**SMALL, "num_heads": 1}).state_dict() if "to_out" in name]


def test_heads_that_do_not_divide_the_width():
    model = stirred(WBDiT(**{**SMALL, "num_heads": 5}))
    assert model.blocks[0].attn.qkv.weight.shape == (30, 32)
    assert model(*batch()).isfinite().all()
    with pytest.raises(ValueError, match="must divide"):
        DiT(**{**SMALL, "num_heads": 5})


def test_own_patches_see_their_own_genes():
    """The same patch in two places gives the same shared token, up to position, but not the same own token."""
    x = torch.randn(1, 1, 8).repeat(1, 1, 5)
    shared, own = (stirred(WBDiT(**SMALL, shared_patches=value)).x_embedder(x) for value in (True, False))
    torch.testing.assert_close(shared[:, 0], shared[:, 1])
    assert relative_error(own[:, 0], own[:, 1]) > 0.1


def test_double_precision():
    model = stirred(WBDiT(**SMALL)).double()
    x, t = batch()
    out = model(x.double(), t)
    assert out.dtype == torch.float64
    assert relative_error(stirred(WBDiT(**SMALL))(x, t), out) < 1e-5


def test_autocast_to_bfloat16():
    model = stirred(WBDiT(**SMALL))
    x, t = batch()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, t)
    assert relative_error(low.float(), model(x, t)) < 3e-2
    low.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_export():
    model = stirred(WBDiT(**SMALL))
    x, t = batch()
    exported = torch.export.export(model, (x, t)).module()
    torch.testing.assert_close(exported(x, t), model(x, t))


def test_foreign_checkpoint(tmp_path):
    """A state dict saved by torch.save is read with weights_only, as the README shows."""
    model = stirred(WBDiT(**SMALL))
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    fresh = WBDiT(**SMALL).eval()
    fresh.load_state_dict(torch.load(tmp_path / "theirs.pt", weights_only=True), strict=True)
    torch.testing.assert_close(fresh(*batch()), model(*batch()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_size": 0}, "at least 1"),
        ({"patch_size": 0}, "at least 1"),
        ({"hidden_size": 30}, "multiple of 4"),
        ({"num_heads": 64}, "at least num_heads"),
        ({"prediction": "score"}, "prediction"),
    ],
)
def test_refused_sizes(change, words):
    with pytest.raises(ValueError, match=words):
        WBDiT(**{**SMALL, **change})


def test_refused_inputs():
    model = WBDiT(**SMALL)
    x, t = batch()
    with pytest.raises(ValueError, match=r"takes \(B, 1, 40\)"):
        model(x[..., :30], t)
    with pytest.raises(ValueError, match="one timestep a sample"):
        model(x, t[:2])
