"""The denoisers: sizes, padding, labels, dtypes, export, and input errors."""

import inspect

import pytest
import torch
from helpers import SMALL, batch, relative_error, stirred
from published import published_forward

from wbdit import DiT, WBDiT, ops

BOTH = pytest.mark.parametrize("kind", [WBDiT, DiT])


def test_published_defaults():
    model = WBDiT()
    assert (model.input_size, model.patch_size, model.hidden_size, model.num_heads) == (2000, 10, 768, 8)
    assert len(model.blocks) == 1
    x, t = batch(2000)
    assert model(x, t).shape == x.shape
    assert (model(x, t) == 0).all()  # adaLN-Zero: an untrained model outputs zero


AUTHORS = {
    **{"input_size": 2000, "patch_size": 10, "in_channels": 1, "hidden_size": 768, "depth": 1, "num_heads": 8},
    **{"mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 1000, "learn_sigma": False},
}


@BOTH
def test_the_authors_arguments_in_the_authors_order(kind):
    first = list(inspect.signature(kind).parameters.values())[: len(AUTHORS)]
    assert {p.name: p.default for p in first} == AUTHORS
    assert {p.kind for p in first} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    model = kind(40, 8, 1, 32, 2, 4, 4.0, 0.1, 1000, True)
    assert model(*batch()).shape == (3, 2, 40)


@BOTH
def test_the_number_of_classes_is_accepted_and_unused(kind):
    plain = stirred(kind(**SMALL))
    named = kind(**SMALL, num_classes=1000)
    named.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(named.eval()(*batch()), plain(*batch()))


@BOTH
@pytest.mark.parametrize("options", [{}, {"shared_patches": False, "cell_token": True, "label_sizes": [3]}], ids=str)
@torch.no_grad()
def test_weights_are_drawn_anew(kind, options):
    """Initializing again restores the zeros and standard deviations of a new model."""
    made, anew = kind(**SMALL, **options), stirred(kind(**SMALL, **options))
    anew.initialize_weights()
    assert (anew(*batch()) == 0).all()
    for (name, one), other in zip(made.named_parameters(), anew.parameters(), strict=True):
        assert one.std().item() == pytest.approx(other.std().item(), rel=0.35, abs=1e-8), name
    assert torch.equal(made.pos_embed, anew.pos_embed)


@BOTH
def test_unpatchify_puts_values_where_their_genes_are(kind):
    model = kind(7, 3, hidden_size=8, num_heads=2, learn_sigma=True)
    patches = torch.arange(18).reshape(1, 3, 6)  # per patch: gene by gene, two channels each
    expected = torch.stack([torch.arange(0, 14, 2), torch.arange(1, 14, 2)])
    assert torch.equal(model.unpatchify(patches)[0], expected)


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
    model = stirred(kind(**SMALL, label_sizes=[3]))
    x, t = batch()
    first, second = (model(x, t, torch.full((3,), k)) for k in (0, 1))
    assert relative_error(first, second) > 1e-4
    null = model(x, t, torch.full((3,), 3))
    torch.testing.assert_close(model(x, t), null)
    with pytest.raises(ValueError, match="without labels"):
        kind(**SMALL)(x, t, torch.zeros(3, dtype=torch.long))


def test_labels_are_dropped_in_training_alone():
    model = stirred(WBDiT(**SMALL, class_dropout_prob=1.0, label_sizes=[2]))
    x, t = batch()
    y = torch.zeros(3, dtype=torch.long)
    labeled = model(x, t, y)
    torch.testing.assert_close(model.train()(x, t, y), model(x, t))
    assert relative_error(labeled, model(x, t)) > 1e-4


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
    """As published: with one head there is no output projection, and checkpoints hold no such weights."""
    assert not [name for name in WBDiT(**{**SMALL, "num_heads": 1}).state_dict() if "to_out" in name]


def test_heads_that_do_not_divide_the_width():
    model = stirred(WBDiT(**{**SMALL, "num_heads": 5}))
    assert model.blocks[0].attn.qkv.weight.shape == (30, 32)
    assert model(*batch()).isfinite().all()
    with pytest.raises(ValueError, match="must divide"):
        DiT(**{**SMALL, "num_heads": 5})


def test_own_patches_see_their_own_genes():
    """Equal patches give equal tokens (before positions) if the embedding is shared, and different tokens if not."""
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


@BOTH
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 2e-2)], ids=["bfloat16", "half"]
)
@pytest.mark.parametrize("grad", [True, False])
def test_a_model_in_a_low_type(kind, dtype, tolerance, grad):
    model, wide = stirred(kind(**SMALL)).to(dtype), stirred(kind(**SMALL)).double()
    x, t = batch()
    with torch.set_grad_enabled(grad):
        out = model(x.to(dtype), t)
    assert out.dtype == dtype
    assert relative_error(out, wide(x.double(), t)) < tolerance


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("shared", [True, False])
def test_autocast_to_bfloat16(heads, shared):
    """Compare with the published formula in fp64. No value lies at the threshold, where rounding may flip the mask."""
    sizes = {**SMALL, "num_heads": heads, "shared_patches": shared, "label_sizes": [3]}
    model, wide = stirred(WBDiT(**sizes), seed=1), stirred(WBDiT(**sizes), seed=1).double()
    x, t = batch()
    y = torch.tensor([0, 1, 3])
    expected = published_forward(wide, x.double(), t, y)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, t, y)
        with torch.no_grad():
            assert relative_error(model(x, t, y), expected) < 2e-2
    assert relative_error(low, expected) < 2e-2
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    torch.nn.functional.mse_loss(low.float(), target).backward()
    torch.nn.functional.mse_loss(expected, target.double()).backward()
    grads = zip(model.named_parameters(), wide.parameters(), strict=True)
    errors = {name: relative_error(p.grad, right.grad) for (name, p), right in grads if p.requires_grad}
    assert max(errors.values()) < 5e-2, errors


# without gradients: ops run in place, possibly on a few samples at a time


@BOTH
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("n", [1, 5, 700])
def test_without_gradients_the_answer_is_the_same(kind, heads, n):
    model = stirred(kind(**{**SMALL, "num_heads": heads}, label_sizes=[3]))
    x, t, y = torch.randn(n, 1, 40), 1 + 37 * torch.arange(n) % 999, torch.arange(n) % 4
    with torch.no_grad():
        out = model(x, t, y)
        last = [model(x[[i]], t[[i]], y[[i]]) for i in range(max(0, n - 5), n)]
    assert relative_error(out, model(x, t, y)) < 1e-5
    assert relative_error(torch.cat(last), out[-5:]) < 1e-5


@BOTH
@pytest.mark.parametrize("change", [{}, {"num_heads": 1}, {"patch_size": 40}, {"shared_patches": False}], ids=str)
def test_the_callers_tensors_are_left_alone(kind, change):
    model = stirred(kind(**{**SMALL, **change}, label_sizes=[3]))
    given = *batch(), torch.tensor([0, 1, 2])
    kept = [value.clone() for value in given]
    weights = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        first, second = model(*given), model(*given)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))


@BOTH
@pytest.mark.parametrize("labels", [(), (3,)])
@pytest.mark.parametrize("grad", [True, False])
def test_an_empty_batch(kind, labels, grad):
    model = stirred(kind(**SMALL, label_sizes=labels))
    t = torch.zeros(0, dtype=torch.long)
    with torch.set_grad_enabled(grad):
        assert model(torch.zeros(0, 1, 40), t, t if labels else None).shape == (0, 1, 40)


def test_export():
    model = stirred(WBDiT(**SMALL))
    x, t = batch()
    exported = torch.export.export(model, (x, t)).module()
    torch.testing.assert_close(exported(x, t), model(x, t))


def test_foreign_checkpoint(tmp_path):
    """A state dict saved by torch.save loads with weights_only, as the README shows."""
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
    with pytest.raises(ValueError, match=r"expected \(B, 1, 40\)"):
        model(x[..., :30], t)
    with pytest.raises(ValueError, match="one timestep per sample"):
        model(x, t[:2])


@pytest.mark.parametrize(
    "options",
    [{}, {"input_size": 22, "shared_patches": False, "cell_token": True}, {"in_channels": 2, "n_outputs": 2}],
    ids=["as published", "own maps, cell token, padded", "channels"],
)
@torch.no_grad()
def test_a_model_as_one_op(monkeypatch, options):
    """On a GPU one op runs the model: it gets the right weights and modulations."""
    sizes = {"input_size": 24, "patch_size": 4, "hidden_size": 16, "depth": 3, "num_heads": 2, "label_sizes": [2]}
    model = stirred(WBDiT(**{**sizes, **options}))
    x, t = batch(model.input_size, model.in_channels)
    y = torch.tensor([0, 2, 1])
    expected = model(x, t, y)
    monkeypatch.setattr(WBDiT, "_is_one_op", lambda self, x: True)
    assert relative_error(model(x, t, y), expected) < 1e-5


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("change", [{}, {"tie_out": True}, {"num_heads": 1}], ids=str)
def test_training_takes_all_blocks_as_one_op(monkeypatch, change, low):
    """It gives the outputs and gradients of the blocks one by one, as they run with hooks on them."""
    calls, one_op = [], ops.training_blocks
    monkeypatch.setattr(ops, "training_blocks", lambda *args, **more: calls.append(0) or one_op(*args, **more))
    model = stirred(WBDiT(**{**SMALL, **change}))

    def step():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = model(*batch())
        out.float().square().mean().backward()
        return [out, *(p.grad for p in model.parameters() if p.requires_grad)]

    found = step()
    assert len(calls) == ("num_heads" not in change)
    model.blocks[0].register_forward_hook(lambda *args: None)
    expected = step()
    assert len(calls) == ("num_heads" not in change)
    assert max(map(relative_error, found, expected)) < (2e-2 if low else 1e-5)


class Adapted(torch.nn.Linear):
    """A linear map with an addend, as adapters make it of a model's own."""

    def forward(self, x):
        return super().forward(x) + 1


def adapt(model):
    attn = model.blocks[1].attn
    attn.qkv = Adapted(attn.qkv.in_features, attn.qkv.out_features, bias=False)


OP_BY_OP = {
    "frozen weight": lambda model: model.blocks[0].mlp.weight.requires_grad_(False),
    "backward hook": lambda model: model.blocks[0].register_full_backward_hook(lambda *args: None),
    "forward hook": lambda model: model.blocks[1].attn.register_forward_pre_hook(lambda *args: None),
    "replaced part": adapt,
}


@pytest.mark.parametrize("case", OP_BY_OP)
def test_blocks_that_are_not_plain_run_op_by_op(monkeypatch, case):
    for op in ("training_blocks", "run_blocks"):
        monkeypatch.setattr(ops, op, lambda *args, **more: pytest.fail("the blocks ran as one op"))
    model = stirred(WBDiT(**SMALL))
    OP_BY_OP[case](model)
    out = model(*batch())
    out.square().mean().backward()
    assert (model.blocks[0].mlp.weight.grad is None) == (case == "frozen weight")


def test_fake_tensors_train_op_by_op(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(ops, "training_blocks", lambda *args, **more: pytest.fail("the blocks ran as one op"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = WBDiT(**SMALL)(*batch())
        out.sum().backward()
    assert isinstance(out, torch._subclasses.FakeTensor)


@pytest.mark.parametrize("sizes", [(), (2,), (9,)])
def test_one_timestep_for_all(monkeypatch, sizes):
    """On a GPU, a timestep expanded from one number, as samplers pass it, is embedded once per label."""
    monkeypatch.setattr("wbdit.nn.conditioning.may_cache", lambda *weights: False)
    model = stirred(WBDiT(**SMALL, label_sizes=sizes)).eval()
    x, t = torch.randn(5, 1, 40), torch.tensor([123])
    for y in [None, torch.tensor([0, 2, 1, 1, 0])] if sizes else [None]:
        with torch.no_grad():
            assert relative_error(model(x, t.expand(5), y), model(x, t.repeat(5), y)) < 1e-6
