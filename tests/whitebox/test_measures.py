"""The measures of the blocks against the formulas in fp64, on the recorded model."""

import math

import numpy as np
import pytest
import torch
from helpers import published_model
from torch.nn import functional as F

import wbdit
from wbdit import WBDiT
from wbdit.nn.activations import iterate_blocks
from wbdit.nn.heads import gene_embedding
from wbdit.whitebox.gene_loadings import enrichment, marker_genes, read_units
from wbdit.whitebox.measures import (
    coding_rate,
    diagnostics,
    effective_rank,
    largest_rate,
    measure,
    weight_stats,
)

ETA = LAM = 0.1


@pytest.fixture(scope="module")
def recorded(golden):
    tensors, _ = golden
    return published_model("wbdit", golden).double().eval(), tensors["wbdit.x"].double(), tensors["wbdit.t"]


def direct_rate(z, projection, heads):
    """Return the coding rate R^c from the N x N matrix and its determinant."""
    total = []
    for cell in z:
        for rows in (cell @ projection.T).chunk(heads, dim=1):
            n, p = rows.shape
            unit = rows / rows.norm(dim=1, keepdim=True)
            total.append(0.5 * torch.logdet(torch.eye(n, dtype=z.dtype) + p / (n * 0.01) * unit @ unit.T))
    return torch.stack(total).view(len(z), heads)


def by_hand(model, x, t, swapped_gates=False):
    """Return the measures of every block, computed by the formulas."""

    def norm(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    tokens = model.embed_cells(x)
    found = []
    for block, modulation in zip(model.blocks, model.modulations(t), strict=False):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        if swapped_gates:
            gate1, gate2 = gate2, gate1
        heads, U, D = block.attn.num_heads, block.attn.qkv.weight, block.mlp.weight
        before = norm(tokens, shift1, scale1)
        subspaces = [
            torch.softmax(w @ w.mT / math.sqrt(w.shape[-1]), -1) @ w for w in (before @ U.T).chunk(heads, dim=-1)
        ]
        tokens = tokens + gate1[:, None] * (torch.cat(subspaces, -1) @ block.attn.out.weight.T + block.attn.out.bias)
        after = norm(tokens, shift1, scale1)
        z = norm(tokens, shift2, scale2)
        argument = z + ETA * (z @ D - z @ D.T @ D) - ETA * LAM
        code = argument.clamp(min=0)
        tokens = tokens + gate2[:, None] * code
        found.append(
            {
                "rate_before": direct_rate(before, U, heads),
                "rate_after": direct_rate(after, U, heads),
                "non_zero": (code > 0).double().mean((1, 2)),
                "margin": (argument.abs() / (ETA * LAM)).flatten(1).median(1).values,
                "fit_before": ((z - z @ D.T) ** 2).sum(-1).mean(-1) / 2,
                "fit_after": ((z - code @ D.T) ** 2).sum(-1).mean(-1) / 2,
                "fit_empty": (z**2).sum(-1).mean(-1) / 2,
                "size_before": LAM * z.abs().sum(-1).mean(-1),
                "size_after": LAM * code.sum(-1).mean(-1),
            }
        )
    return found


def measured(model, x, t):
    return [measure(b, s)._asdict() for b, s in zip(model.blocks, iterate_blocks(model, x, t), strict=True)]


@torch.no_grad()
def test_measures_are_those_of_the_formulas(recorded):
    model, x, t = recorded
    for wanted, found in zip(by_hand(model, x, t), measured(model, x, t), strict=True):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)


@torch.no_grad()
def test_a_swap_would_be_seen(recorded):
    """On this model, values before and after, and with swapped gates, differ by far more than the tolerance."""
    model, x, t = recorded
    right, swapped = by_hand(model, x, t), by_hand(model, x, t, swapped_gates=True)
    for block in right:
        assert (block["rate_before"] / block["rate_after"] - 1).abs().min() > 1e-4
        assert (block["fit_before"] / block["fit_after"] - 1).abs().min() > 1e-4
    assert (right[0]["rate_after"] / swapped[0]["rate_after"] - 1).abs().min() > 1e-4


@pytest.mark.parametrize(("tokens", "width"), [(5, 8), (20, 8), (8, 8)])
def test_coding_rate_takes_the_smaller_matrix(tokens, width):
    torch.manual_seed(0)
    w = torch.randn(3, tokens, 2 * width, dtype=torch.float64)
    torch.testing.assert_close(coding_rate(w, 2), direct_rate(w, torch.eye(2 * width, dtype=w.dtype), 2))


def test_coding_rate_of_a_model_that_diverged():
    w = torch.randn(3, 6, 8)
    w[1, 2, 3] = torch.inf
    assert coding_rate(w, 1).isnan().flatten().tolist() == [False, True, False]


def test_coding_rate_lies_between_one_direction_and_all():
    alike = torch.ones(1, 6, 8)
    apart = torch.eye(6, 8)[None]
    assert float(coding_rate(alike, 1)) == pytest.approx(0.5 * math.log1p(8 / 0.01))
    assert float(coding_rate(apart, 1)) == pytest.approx(largest_rate(6, 8, 1))
    torch.manual_seed(0)
    assert coding_rate(torch.randn(50, 30, 32), 4).sum(1).max() < largest_rate(30, 32, 4)
    # the rate does not depend on the scale
    torch.testing.assert_close(coding_rate(3 * apart, 1), coding_rate(apart, 1))


def test_effective_rank_counts_directions():
    assert float(effective_rank(torch.eye(5))) == pytest.approx(5)
    assert float(effective_rank(torch.ones(4, 3))) == pytest.approx(1)


def test_weights_of_orthogonal_subspaces():
    block = WBDiT(8, 4, hidden_size=8, num_heads=2).double().blocks[0]
    with torch.no_grad():
        block.attn.qkv.weight.copy_(torch.eye(8))
        block.mlp.weight.copy_(3 * torch.eye(8))
    found = weight_stats(block)
    torch.testing.assert_close(found.overlap, torch.eye(2, dtype=torch.float64))
    assert found.step == pytest.approx(0.9)
    torch.testing.assert_close(found.rank, torch.full((2,), 4.0, dtype=torch.float64))
    with torch.no_grad():
        block.attn.qkv.weight[4:] = block.attn.qkv.weight[:4]
    torch.testing.assert_close(weight_stats(block).overlap, torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("option", [{"tie_out": True}, {"num_heads": 1}])
@torch.no_grad()
def test_every_kind_of_block_is_walked(option):
    """The measured activations of the last block give the same output as the model's own blocks."""
    torch.manual_seed(0)
    model = WBDiT(24, 4, hidden_size=16, depth=2, **{"num_heads": 2, **option}).eval()
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
    x, t = torch.randn(3, 1, 24), torch.tensor([5, 500, 900])
    found = measured(model, x, t)
    assert all(torch.isfinite(value).all() for block in found for value in block.values())
    *_, last = iterate_blocks(model, x, t)
    modulations = model.modulations(t)
    z = model.run_blocks(model.embed_cells(x), modulations)
    stream = _stream(model, x, t)
    again = wbdit.ops.adaln(stream + modulations[-2][5][:, None] * last.code, *modulations[-1][:2])
    torch.testing.assert_close(again, z, rtol=1e-4, atol=1e-5)


def _stream(model, x, t):
    """Return the residual stream before the last ISTA step, computed by the blocks' half-steps."""
    modulations = model.modulations(t)
    stream = model.embed_cells(x)
    z = wbdit.ops.adaln(stream, *modulations[0][:2])
    for block, modulation, following in zip(model.blocks, modulations, modulations[1:], strict=False):
        _, _, gate1, shift2, scale2, gate2 = modulation
        stream = stream + gate1[:, None] * block.attn(z)
        if block is model.blocks[-1]:
            return stream
        stream = stream + gate2[:, None] * block.mlp(wbdit.ops.adaln(stream, shift2, scale2))
        z = wbdit.ops.adaln(stream, *following[:2])
    raise AssertionError


def test_a_glance_is_the_mean_of_the_measures(recorded):
    model, x, t = recorded
    seen, all_ = diagnostics(model, x, t), measured(model, x, t)
    for block in range(len(model.blocks)):
        assert seen["coding_rate_before"][block] == pytest.approx(
            float(all_[block]["rate_before"].sum(1).mean()), abs=1e-3
        )
        assert seen["coding_rate_after"][block] == pytest.approx(
            float(all_[block]["rate_after"].sum(1).mean()), abs=1e-3
        )
        assert seen["non_zero"][block] == pytest.approx(float(all_[block]["non_zero"].mean()), abs=1e-4)


# genes


@pytest.mark.parametrize("options", [{"cell_token": True}, {}, {"shared_patches": False}])
def test_gene_embedding_is_what_a_gene_adds(options):
    torch.manual_seed(0)
    model = WBDiT(10, 4, hidden_size=8, num_heads=2, **options)  # the last patch is padded
    x = torch.randn(1, 1, 10)
    site = (
        (lambda m, x: m.embed_cells(x)[:, -1]) if "cell_token" in options else (lambda m, x: m.embed_cells(x).mean(1))
    )
    with torch.no_grad():
        moved = torch.stack([site(model, x + F.one_hot(torch.tensor(g), 10))[0] - site(model, x)[0] for g in range(10)])
    torch.testing.assert_close(gene_embedding(model), moved, rtol=1e-4, atol=1e-5)


def planted(n=120, genes=200, seed=0):
    """Return a network whose first head reads 50 genes, cells in which these mark one of two types, and the labels."""
    rng = np.random.default_rng(seed)
    labels = np.where(np.arange(n) % 2 == 0, "a", "b")
    values = rng.normal(size=(n, genes)).astype(np.float32)
    values[labels == "a", :50] += 2
    values /= values.std(0)  # the test permutes genes of similar variance: here all are equal
    torch.manual_seed(seed)
    model = WBDiT(genes, 50, hidden_size=16, num_heads=2, cell_token=True).eval()
    with torch.no_grad():
        model.cell_token.proj.weight.normal_(std=0.02)
        model.cell_token.proj.weight[0, :50] = 0.1
        model.cell_token.proj.bias.copy_(5 * torch.randn(16))  # no gene changes the norm of the token much
        model.blocks[0].attn.qkv.weight[:8].normal_(std=0.05)
        model.blocks[0].attn.qkv.weight[0, 0] = 1.0
    return model, torch.from_numpy(values)[:, None], labels


def test_a_planted_head_is_found_and_chance_is_not():
    model, x, labels = planted()
    t, spread = torch.full((len(x),), 10), x[:, 0].std(0)
    units = read_units(model, x, t, None, spread)
    markers = marker_genes(x[:, 0].numpy(), labels)
    assert set(markers) == {"a", "b"}
    assert len(set(markers["a"]) & set(range(50))) == 50
    hits = {hit.type: hit for hit in enrichment(units, markers, labels, spread.numpy())["head"]}
    assert units.name(hits["a"].unit) == "block 1, head 1, axis 1"
    assert hits["a"].fires == "a"
    assert hits["a"].shared >= 45
    assert hits["a"].p == 0.001
    # control: random genes as markers
    noise = {"c": np.random.default_rng(1).permutation(200)[:50]}
    assert enrichment(units, noise, labels, spread.numpy())["head"][0].p > 0.05


def test_units_answer_as_their_loadings_say():
    """One standard deviation of a gene moves a unit of the first block by its loading, up to normalization."""
    model, x, _ = planted()
    spread = x[:, 0].std(0)
    units = read_units(model, x, torch.full((len(x),), 10), None, spread)
    assert (units.activation[units.kind == "atom"] >= 0).all()
    unit = int(np.flatnonzero(units.kind == "head")[0])
    predicted = (x[:, 0] / spread).numpy() @ units.loading[unit]
    assert np.corrcoef(predicted, units.activation[unit])[0, 1] > 0.9
    assert len(units.ends()[0]) == len(units.kind) + (units.kind == "head").sum()
