"""Options that make the blocks whiter: each against its formula written out in fp64, and off where not asked for."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from published import final_layer, modulate, modulation, patch_embedding, timestep_embedding
from test_model import SMALL, batch, stirred

from wbdit import DiT, WBDiT, backend, ops
from wbdit.model import Denoiser

OPTIONS = [
    {"tie_out": True},
    {"tie_out": True, "num_heads": 1},
    {"tie_out": True, "num_heads": 5},
    {"learned_step": True},
    {"learned_step": True, "tie_out": True},
]
EACH = pytest.mark.parametrize("options", OPTIONS, ids=str)


def make(options, labels=3):
    return stirred(WBDiT(**{**SMALL, "num_classes": labels, **options}))


# the formula, on the weights by the names that checkpoints hold


def expected(model, x, t, y):
    """Answer as the model in fp64, by the formulas of the papers."""
    c = timestep_embedding(model.t_embedder, t) + F.embedding(y, model.y_embedder.embedding_table.weight)
    tokens = patch_embedding(model.x_embedder.proj, x, model.patch_size) + model.pos_embed
    for block in model.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(block, c).chunk(6, dim=1)
        z = modulate(tokens, shift1, scale1)
        tokens = tokens + gate1[:, None] * subspace_attention(block.attn, z, model.num_heads)
        z = modulate(tokens, shift2, scale2)
        tokens = tokens + gate2[:, None] * sparse_step(block.mlp, z)
    return final_layer(model.final_layer, tokens, c, model.patch_size)[..., : model.input_size]


def subspace_attention(attn, z, heads):
    """Sum over the subspaces U_k of ``softmax(z U_k^T U_k z^T / sqrt(p)) z U_k^T U_k``."""
    weights = dict(attn.named_parameters())
    bases = weights["qkv.weight"].chunk(heads)  # (p, d) each
    parts = [(z @ u.mT @ (z @ u.mT).mT / len(u) ** 0.5).softmax(-1) @ z @ u.mT for u in bases]
    if "to_out.0.weight" in weights:
        return F.linear(torch.cat(parts, -1), weights["to_out.0.weight"], weights["to_out.0.bias"])
    return sum(part @ u for part, u in zip(parts, bases, strict=True))


def sparse_step(mlp, z):
    weights = dict(mlp.named_parameters())
    eta, lam = 0.1 * weights["log_step"].exp() if "log_step" in weights else (0.1, 0.1)
    d = weights["weight"]
    return F.relu(z + eta * (z @ d - z @ d.mT @ d) - eta * lam)


@pytest.fixture
def given():
    return *batch(), torch.tensor([0, 1, 3])


@EACH
def test_the_answer_is_the_formulas(options, given):
    x, t, y = given
    model = make(options).double()
    with backend("reference"):
        assert relative_error(model(x.double(), t, y), expected(model, x.double(), t, y)) < 1e-12
    assert relative_error(make(options)(x, t, y), expected(model, x.double(), t, y)) < 1e-5


@EACH
def test_every_gradient_is_the_formulas(options, given):
    x, t, y = given
    model, wide = make(options), make(options).double()
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    F.mse_loss(model(x, t, y), target).backward()
    F.mse_loss(expected(wide, x.double(), t, y), target.double()).backward()
    weights = zip(model.named_parameters(), wide.parameters(), strict=True)
    errors = {name: relative_error(p.grad, right.grad) for (name, p), right in weights if p.requires_grad}
    assert all(right.grad.norm() > 0 for right in wide.parameters() if right.requires_grad)
    assert max(errors.values()) < 1e-4, errors


@EACH
def test_an_option_changes_the_answer(options, given):
    """Else these tests would hold of a model that ignores it."""
    plain = {name: value for name, value in options.items() if name in SMALL}
    model = make(options)
    other = make(plain)
    other.load_state_dict(model.state_dict(), strict=False)
    assert relative_error(model(*given), other(*given)) > 1e-4


@EACH
@pytest.mark.parametrize("n", [1, 5])
def test_without_gradients_the_answer_is_the_same(options, n):
    model = make(options)
    x, t, y = torch.randn(n, 1, 40), 1 + 37 * torch.arange(n) % 999, torch.arange(n) % 4
    kept = x.clone()
    with torch.no_grad():
        first, second = model(x, t, y), model(x, t, y)
    assert torch.equal(first, second)
    assert torch.equal(x, kept)
    assert relative_error(first, model(x, t, y)) < 1e-5


@EACH
@pytest.mark.parametrize("grad", [True, False])
def test_autocast_to_bfloat16(options, grad, given):
    x, t, y = given
    model, wide = make(options), make(options).double()
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        low = model(x, t, y)
    assert relative_error(low, expected(wide, x.double(), t, y)) < 2e-2
    if grad:
        low.float().square().mean().backward()
        expected(wide, x.double(), t, y).square().mean().backward()
        weights = zip(model.named_parameters(), wide.parameters(), strict=True)
        errors = {name: relative_error(p.grad, right.grad) for (name, p), right in weights if p.requires_grad}
        assert max(errors.values()) < 0.1, errors


@EACH
@pytest.mark.parametrize("grad", [True, False])
def test_a_model_in_bfloat16(options, grad, given):
    x, t, y = given
    with torch.set_grad_enabled(grad):
        out = make(options).bfloat16()(x.bfloat16(), t, y)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected(make(options).double(), x.double(), t, y)) < 4e-2


@EACH
def test_state_dict_round_trip(options, given, tmp_path):
    model = make(options)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = WBDiT(**{**SMALL, "num_classes": 3, **options}).eval()
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    assert torch.equal(fresh(*given), model(*given))


@EACH
def test_export(options, given):
    model = make(options)
    exported = torch.export.export(model, given).module()
    torch.testing.assert_close(exported(*given), model(*given))


@EACH
def test_what_one_op_can_do(options, given, monkeypatch):
    """What a GPU runs where the op takes such blocks: the model hands it the right weights."""
    model = make(options)
    with torch.no_grad():
        by_blocks = model(*given)
        monkeypatch.setattr("wbdit.model.WBDiT._is_one_op", lambda self, x: self._blocks_fit_one_op)
        assert relative_error(model(*given), by_blocks) < 1e-5
    assert model._blocks_fit_one_op == (options.keys() <= {"tie_out", "num_heads"} and model.num_heads > 1)


# none where none is asked for


def test_off_is_as_published():
    """The same names and the same random weights, whether the options are left out or off."""
    off = {"tie_out": False, "learned_step": False}
    models = []
    for options in ({}, off):
        torch.manual_seed(0)
        models.append(WBDiT(**SMALL, **options))
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    own = {"attn.qkv.weight", "attn.to_out.0.weight", "attn.to_out.0.bias", "mlp.weight"}
    own |= {"adaLN_modulation.1.weight", "adaLN_modulation.1.bias"}
    assert set(models[0].blocks[0].state_dict()) == own
    assert len(models[0].blocks[0].adaLN_modulation[1].bias) == 6 * 32


def test_the_arguments_of_a_denoiser_are_kept():
    """Written out twice, they are the same: names, order, kinds and defaults."""
    shared = [p for p in inspect.signature(Denoiser).parameters.values() if p.kind is not p.VAR_KEYWORD]
    own = list(inspect.signature(WBDiT).parameters.values())
    assert own[: len(shared)] == shared
    assert all(not p.default and p.kind is p.KEYWORD_ONLY for p in own[len(shared) :])


@EACH
def test_black_box_blocks_take_no_options(options):
    with pytest.raises(TypeError, match=next(iter(options))):
        DiT(**{**SMALL, **options})


# tied projections


@pytest.mark.parametrize("heads", [1, 4])
def test_tied_projections_have_no_weights_of_their_own(heads):
    names = WBDiT(**{**SMALL, "num_heads": heads}, tie_out=True).state_dict()
    assert not [name for name in names if "to_out" in name]


def test_what_tied_attention_adds_lies_in_the_subspaces():
    model = make({"tie_out": True, "num_heads": 5})  # five of width 6 in 32 dimensions: two are left over
    attn = model.blocks[0].attn
    out = attn(torch.randn(2, 7, 32))
    _, _, axes = torch.linalg.svd(attn.qkv.weight)
    assert (out @ axes[30:].mT).abs().max() < 1e-5 * out.abs().max()


# learned step sizes and penalties


def begun(options):
    """A model whose half-steps are as they start, all else stirred."""
    model = make(options)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.log_step.zero_()
    return model


@pytest.mark.parametrize("grad", [True, False])
def test_a_learned_step_starts_as_the_published_one(grad, given):
    assert all((block.mlp.log_step == 0).all() for block in WBDiT(**SMALL, learned_step=True).blocks)
    model, published = begun({"learned_step": True}), make({})
    published.load_state_dict({k: v for k, v in model.state_dict().items() if "log_step" not in k}, strict=True)
    with torch.set_grad_enabled(grad):
        assert relative_error(model(*given), published(*given)) < 1e-6


@pytest.mark.parametrize("learned", [False, True])
@torch.no_grad()
def test_step_size_and_penalty_can_be_read(learned):
    mlp = make({"learned_step": learned}).blocks[1].mlp
    eta, lam = 0.1 * mlp.log_step.exp() if learned else (0.1, 0.1)
    assert float(mlp.eta) == pytest.approx(float(eta))
    assert float(mlp.lam) == pytest.approx(float(lam))
    assert float(mlp.eta) != 0.1 or not learned


@pytest.mark.parametrize("options", [options for options in OPTIONS if "learned_step" in options], ids=str)
def test_a_learned_steps_gradient_by_differences(options):
    mlp = make(options).blocks[0].mlp.double()
    z = torch.randn(2, 3, 32, dtype=torch.double, generator=torch.Generator().manual_seed(0))

    def step(log_step):
        return torch.func.functional_call(mlp, {"log_step": log_step}, z)

    with backend("reference"):
        assert torch.autograd.gradcheck(step, mlp.log_step.detach().requires_grad_())


def test_a_step_that_was_learned_on_is_seen(given):
    """Without gradients its numbers are remembered, until they change."""
    model = make({"learned_step": True})
    with torch.no_grad():
        before = model(*given)
    optimiser = torch.optim.AdamW([block.mlp.log_step for block in model.blocks], lr=0.1, fused=True)
    model(*given).square().mean().backward()
    optimiser.step()
    with torch.no_grad():
        after = model(*given)
    assert relative_error(after, before) > 1e-4
    assert relative_error(after, model(*given)) < 1e-5


def test_without_gradients_a_learned_step_is_one_op(given, monkeypatch):
    model, called = make({"learned_step": True}), []
    fused = ops.ista_adaln_
    monkeypatch.setattr(ops, "ista_adaln_", lambda *args: called.append(args[-2:]) or fused(*args))
    with torch.no_grad():
        model(*given)
    assert called == [(float(block.mlp.eta), float(block.mlp.lam)) for block in model.blocks]
