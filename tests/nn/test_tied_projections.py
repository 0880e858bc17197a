"""Tied projections: compared with the formula in fp64, and off by default."""

import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, batch, make_cells, relative_error, stirred
from published import final_layer, modulate, modulation, patch_embedding, timestep_embedding

import wbdit
from wbdit import DiT, WBDiT, backend
from wbdit.nn.denoiser import Denoiser
from wbdit.training.config import PRESETS

OPTIONS = [
    {"tie_out": True},
    {"tie_out": True, "num_heads": 1},
    {"tie_out": True, "num_heads": 5},
]
EACH = pytest.mark.parametrize("options", OPTIONS, ids=str)


def make(options, seed=0):
    return stirred(WBDiT(**{**SMALL, "label_sizes": [3], **options}), seed)


def largest_error(model, wide):
    """Return the largest relative error of a gradient, and assert that every weight has a gradient."""
    weights = [pair for pair in zip(model.parameters(), wide.parameters(), strict=True) if pair[1].requires_grad]
    assert all(right.grad.norm() > 0 for _, right in weights)
    return max(relative_error(weight.grad, right.grad) for weight, right in weights)


# the formula, on weights by their checkpoint names


def expected(model, x, t, y):
    """Return the model's output in fp64, by the formulas of the papers."""
    c = timestep_embedding(model.t_embedder, t) + F.embedding(y, model.y_embedder.embedding_table.weight)
    tokens = patch_embedding(model.x_embedder.proj, x, model.patch_size) + model.pos_embed
    for block in model.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(block, c).chunk(6, dim=1)
        z = modulate(tokens, shift1, scale1)
        tokens = tokens + gate1[:, None] * subspace_attention(block.attn, z, model.num_heads)
        z = modulate(tokens, shift2, scale2)
        tokens = tokens + gate2[:, None] * sparse_step(block.mlp.weight, z)
    return final_layer(model.final_layer, tokens, c, model.patch_size)[..., : model.input_size]


def subspace_attention(attn, z, heads):
    """Return the sum over the subspaces U_k of ``softmax(z U_k^T U_k z^T / sqrt(p)) z U_k^T U_k``."""
    weights = dict(attn.named_parameters())
    bases = weights["qkv.weight"].chunk(heads)  # (p, d) each
    parts = [(z @ u.mT @ (z @ u.mT).mT / len(u) ** 0.5).softmax(-1) @ z @ u.mT for u in bases]
    if "to_out.0.weight" in weights:
        return F.linear(torch.cat(parts, -1), weights["to_out.0.weight"], weights["to_out.0.bias"])
    if heads == 1 and not attn.tied:
        return parts[0]
    return sum(part @ u for part, u in zip(parts, bases, strict=True))


def sparse_step(d, z):
    return F.relu(z + 0.1 * (z @ d - z @ d.mT @ d) - 0.01)


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
    assert largest_error(model, wide) < 1e-4


@EACH
def test_an_option_changes_the_answer(options, given):
    """Otherwise these tests would also pass for a model that ignores the option."""
    plain = {name: value for name, value in options.items() if name in SMALL}
    model = make(options)
    other = make(plain)
    shapes = {name: weight.shape for name, weight in other.state_dict().items()}
    shared = {name: weight for name, weight in model.state_dict().items() if weight.shape == shapes.get(name)}
    other.load_state_dict(shared, strict=False)
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
def test_autocast_to_bfloat16(options, given):
    """With these weights, no value is so close to the threshold that rounding moves it across."""
    x, t, y = given
    model, wide = make(options, seed=1), make(options, seed=1).double()
    right = expected(wide, x.double(), t, y)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, t, y)
        with torch.no_grad():
            assert relative_error(model(x, t, y), right) < 1e-2
    assert relative_error(low, right) < 1e-2
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    F.mse_loss(low.float(), target).backward()
    F.mse_loss(right, target.double()).backward()
    assert largest_error(model, wide) < 5e-2


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
    fresh = WBDiT(**{**SMALL, "label_sizes": [3], **options}).eval()
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    assert torch.equal(fresh(*given), model(*given))


@EACH
def test_export(options, given):
    model = make(options)
    exported = torch.export.export(model, given).module()
    torch.testing.assert_close(exported(*given), model(*given))


@EACH
def test_what_one_op_can_do(options, given, monkeypatch):
    """On a GPU one op runs a model that it supports, with the right weights."""
    model = make(options)
    with torch.no_grad():
        by_blocks = model(*given)
        monkeypatch.setattr("wbdit.nn.wbdit.WBDiT._is_one_op", lambda self, x: self.blocks[0].fits_denoise)
        assert relative_error(model(*given), by_blocks) < 1e-5
    assert model.blocks[0].fits_denoise == (model.num_heads > 1)


def test_fitted_saved_and_read_again(monkeypatch, tmp_path):
    """A preset passes the option to the model, and the config of a saved run restores it."""
    options = {"tie_out": True}
    small = replace(PRESETS["small"], model={**PRESETS["small"].model, "hidden_size": 32, "patch_size": 8, **options})
    monkeypatch.setitem(PRESETS, "whiter", small)
    cells = make_cells(60, 30)
    generator = wbdit.fit(cells, label="type", preset="whiter", steps=8, progress=False, out=tmp_path / "run")
    assert all(p.isfinite().all() for p in generator.model.parameters())
    loaded = wbdit.load(tmp_path / "run")
    assert loaded.config.model.items() >= options.items()
    first, second = (g.generate(5, seed=0, calls=3) for g in (generator, loaded))
    assert (first.X != second.X).nnz == 0


# off by default


def test_off_is_as_published():
    """Names and random weights are the same whether the options are omitted or off."""
    off = {"tie_out": False}
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
    """`WBDiT` repeats the arguments of `Denoiser` with the same names, order, kinds and defaults."""
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
    model = make({"tie_out": True, "num_heads": 5})  # five of width 6 in 32 dimensions leave two unused
    attn = model.blocks[0].attn
    out = attn(torch.randn(2, 7, 32))
    _, _, axes = torch.linalg.svd(attn.qkv.weight)
    assert (out @ axes[30:].mT).abs().max() < 1e-5 * out.abs().max()
