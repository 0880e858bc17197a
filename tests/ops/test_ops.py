"""Each op: its reference against the formula in fp64, its gradient, its registration, its kernels."""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import Launches, relative_error

from wbdit import InputError, ops
from wbdit.ops import reference
from wbdit.ops.count_step import one_pass

ETA, LAM = 0.1, 0.1


def rand(*shape, dtype=torch.float64, grad=False):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_(grad)


def leaves(shape, number, **kinds):
    """Return `number` different tensors of one shape that require gradients."""
    draws = torch.Generator().manual_seed(0)
    return [
        torch.randn(*shape, dtype=torch.float64, generator=draws).to(**kinds).requires_grad_() for _ in range(number)
    ]


# the reference against the published formula


def test_adaln_is_layer_norm_then_modulation():
    x, shift, scale = rand(2, 5, 12), rand(2, 12), rand(3, 12)[:2]
    centered = x - x.mean(-1, keepdim=True)
    normed = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = normed * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(ops.adaln(x, shift, scale), expected)


@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 1, 1), (5, 3, 4), (33, 2, 7)])
def test_mssa_is_attention_of_one_operand(tokens, heads, width):
    w = rand(2, tokens, heads * width)
    expected = torch.empty_like(w)
    for b in range(2):
        for h in range(heads):
            u = w[b, :, h * width : (h + 1) * width]
            expected[b, :, h * width : (h + 1) * width] = torch.softmax(u @ u.T / math.sqrt(width), -1) @ u
    torch.testing.assert_close(ops.mssa(w, heads), expected)


def test_mssa_of_large_scores_stays_finite():
    w = 1e3 * rand(1, 6, 8, dtype=torch.float32)
    assert ops.mssa(w, 2).isfinite().all()


def test_ista_folded_is_ista_written_out():
    z, dictionary = rand(2, 5, 12), rand(12, 12)
    gradient = z @ dictionary - z @ dictionary.T @ dictionary
    expected = torch.relu(z + ETA * gradient - ETA * LAM)
    torch.testing.assert_close(ops.ista(z, ops.fold(dictionary), ETA, LAM), expected)
    assert (expected == 0).any()  # the threshold is active


def test_gated_adaln_is_a_residual_then_adaln():
    x, out, gate, shift, scale = rand(2, 5, 12), rand(3, 5, 12)[:2], rand(2, 12), rand(3, 12)[:2], rand(4, 12)[:2]
    for bias in (None, rand(12)):
        expected = x + gate[:, None] * (out if bias is None else out + bias)
        x_new, z_new = ops.gated_adaln(x, out, gate, shift, scale, bias=bias)
        torch.testing.assert_close(x_new, expected)
        torch.testing.assert_close(z_new, ops.adaln(expected, shift, scale))
        in_place = ops.gated_adaln_(x.clone(), out.clone(), gate, shift, scale, bias=bias)
        torch.testing.assert_close(in_place, (x_new, z_new))


def test_ista_adaln_is_its_parts():
    x, z, folded = rand(2, 5, 12), rand(3, 5, 12)[:2], ops.fold(rand(12, 12))
    gate, shift, scale = rand(2, 12), rand(3, 12)[:2], rand(4, 12)[:2]
    both = ops.ista_adaln(x, z, folded, gate, shift, scale, ETA, LAM)
    expected = ops.gated_adaln(x, ops.ista(z, folded, ETA, LAM), gate, shift, scale)
    torch.testing.assert_close(both, expected)


def test_noising():
    x0, noise, alpha, sigma = rand(3, 1, 4), rand(3, 1, 5)[..., :4], rand(3), rand(4)[:3]
    expected = torch.stack([alpha[b] * x0[b] + sigma[b] * noise[b] for b in range(3)])
    torch.testing.assert_close(ops.noising(x0, noise, alpha, sigma), expected)


def test_sampler_step():
    x, out, previous, earlier, noise = (rand(2, 1, 6 + i)[..., :6] for i in range(5))
    new = ops.sampler_step(x, out, previous, earlier, noise, a=1.5, b=-0.5, c=0.25, d=2.0, e=0.1)
    torch.testing.assert_close(new, 1.5 * x - 0.5 * out + 0.25 * previous + 2 * earlier + 0.1 * noise)
    clamped = ops.sampler_step(x, out, a=1.5, b=-0.5, clamp_min=0.0)
    torch.testing.assert_close(clamped, (1.5 * x - 0.5 * out).clamp(min=0))


def counts(dtype=torch.float64, grad=False):
    """Return the ops' inputs for five cells of three genes with 1, 2 and 4 of four levels, and the target levels."""
    draws = torch.Generator().manual_seed(3)
    log_odds, log_base0, log_base1 = (
        torch.randn(*shape, dtype=dtype, generator=draws) for shape in ((5, 3), (3, 4), (3, 4))
    )
    values, x = (torch.randn(*shape, dtype=dtype, generator=draws) for shape in ((3, 4), (5, 3)))
    mixture, alpha = torch.rand(5, 3, dtype=dtype, generator=draws), torch.rand(5, dtype=dtype, generator=draws)
    for leaf in (log_odds, mixture, log_base0, log_base1):
        leaf.requires_grad_(grad)
    n_levels, target = torch.tensor([1, 2, 4], dtype=torch.int32), torch.tensor([[0, i % 2, i % 4] for i in range(5)])
    levels = torch.tensor([0, 1, 2, 5], dtype=dtype)
    tables = log_base0, log_base1, values, levels, n_levels
    return x, log_odds, mixture, alpha, (1 - alpha**2).sqrt(), *tables, target.to(torch.uint8)


def test_counts_are_bayes_rule():
    """The posterior of each gene is the prior times the density of the noised value, normalized."""
    x, log_odds, w, alpha, sigma, log_base0, log_base1, values, levels, n_levels, target = given = counts()
    nll, mean = ops.count_nll(*given), ops.count_mean(*given[:-1])
    for b in range(5):
        for g in range(3):
            n = int(n_levels[g])
            prior = (log_base0[g, :n] * (1 - w[b, g]) + log_base1[g, :n] * w[b, g] + log_odds[b, g] * levels[:n]).exp()
            density = torch.distributions.Normal(alpha[b] * values[g, :n], sigma[b]).log_prob(x[b, g]).exp()
            posterior = prior * density / (prior * density).sum()
            torch.testing.assert_close(nll[b, g], -posterior[target[b, g].long()].log())
            torch.testing.assert_close(mean[b, g], (posterior * values[g, :n]).sum())


def count_step_inputs(dtype=torch.float64):
    """Return a step's inputs at the same levels: state, answer, offsets, and each gene's sizes and tables."""
    x, log_odds, _, _, _, *tables, _ = counts(dtype)
    draws = torch.Generator().manual_seed(5)
    answer, dispersion = (torch.randn(*shape, dtype=dtype, generator=draws) for shape in ((5, 2, 3), (5, 3)))
    knots, log_size, log_mean = (torch.randn(*shape, dtype=dtype, generator=draws) for shape in ((3,), (2, 3), (3,)))
    return x[:, None], answer, log_odds, dispersion, knots, log_size, log_mean, *tables


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_step_of_counts_is_its_formula(outputs):
    """The negative binomial's odds are written out, then the mean and the update are those of the other ops."""
    x, answer, rates, dispersion, knots, log_size, log_mean, *tables = count_step_inputs()
    logits = knots + dispersion + (answer[:, 1] if outputs == 2 else 0)
    weight = 1 / (1 + (-logits).exp())
    size = ((1 - weight) * log_size[0] + weight * log_size[1]).exp()
    mean = (log_mean + answer[:, 0] + rates).exp()
    alpha, sigma = (torch.full((5,), level, dtype=torch.float64) for level in (0.8, 0.6))
    clean = ops.count_mean(x[:, 0], (mean / (mean + size)).log(), weight, alpha, sigma, *tables)[:, None]
    previous, earlier, noise = (rand(5 + i, 1, 3)[:5] for i in range(3))
    factors = {"a": 1.5, "b": -0.5, "c": 0.25, "d": 2.0, "e": 0.1, "clamp_min": -0.1}
    given = x, answer[:, :outputs], rates, dispersion, knots, log_size, log_mean, *tables
    for terms in ({}, {"previous": previous, "earlier": earlier, "noise": noise}):
        new, found = ops.count_mean_step(*given, alpha=0.8, sigma=0.6, **terms, **factors)
        torch.testing.assert_close(found, clean)
        torch.testing.assert_close(new, ops.sampler_step(x, clean, **terms, **factors))
    again, nothing = ops.count_mean_step(*given, alpha=0.8, sigma=0.6, **terms, **factors, keep=False)
    assert torch.equal(again, new)
    assert nothing is None
    with pytest.raises(ValueError, match="both noise and samples"):
        ops.count_mean_step(*given, alpha=0.8, sigma=0.6, **terms, **factors, samples=torch.arange(5))


@pytest.mark.parametrize("keep", [True, False])
def test_one_pass_is_one_launch(keep):
    """On an engine with the pass, the op allocates its results and copies nothing, though offsets are columns."""
    x, answer, rates, dispersion, *known = count_step_inputs(torch.float32)
    rates, dispersion = torch.cat([rates, dispersion], 1).split(3, dim=1)
    update = rand(5, 1, 3, **F32), None, None, torch.arange(5), 1.5, -0.5, 0.25, 0.0, 0.1, None, 7, 3, keep
    taken = {}
    engine = SimpleNamespace(count_mean_step=lambda *given, **named: taken.update(named, given=given))
    with Launches() as launches:
        new, clean = one_pass(engine, x, answer, rates, dispersion, *known, 0.8, 0.6, *update)
    assert launches.names in ([], ["aten.fill_"] * 2)  # memory is filled in these tests
    assert taken["new"] is new
    assert taken["mean"] is (clean if keep else None)
    assert new.shape == x.shape
    assert taken["given"][2].data_ptr() == rates.data_ptr()


def draws():
    """Return the inputs of a draw from the same levels; the last one holds the counts 5 to 9."""
    *given, levels, n_levels, _ = counts()
    lowest = levels.int()
    highest = lowest + torch.tensor([0, 0, 0, 4], dtype=torch.int32)
    u = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    library = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    return *given, (lowest + highest).double() / 2, n_levels, lowest, highest, u, library


def test_draws_invert_the_distribution_of_the_scaled_cell():
    """Repeat the iteration and the inversion cell by cell, with the odds of a negative binomial written out."""
    x, log_ratio, w, alpha, sigma, log_base0, log_base1, values, levels, n_levels, lowest, highest, u, library = draws()
    found, log_scale = torch.ops.wbdit.count_draw(*draws(), 4)
    for b in range(5):
        factor = torch.tensor(1.0, dtype=torch.float64)

        def posterior(g, factor, b=b):
            n, ratio = int(n_levels[g]), log_ratio[b, g].exp() * factor
            prior = (log_base0[g, :n] * (1 - w[b, g]) + log_base1[g, :n] * w[b, g]).exp()
            prior = prior * (ratio / (1 + ratio)) ** levels[:n]
            density = torch.distributions.Normal(alpha[b] * values[g, :n], sigma[b]).log_prob(x[b, g]).exp()
            return prior * density / (prior * density).sum()

        for _ in range(4):
            expected = sum((posterior(g, factor) * levels[: n_levels[g]]).sum() for g in range(3))
            factor = factor * library[b] / expected
        torch.testing.assert_close(log_scale[b].exp(), factor)
        for g in range(3):
            cumulative = [0.0, *posterior(g, factor).cumsum(0).tolist()]
            level = next(i for i, until in enumerate(cumulative[1:]) if until >= u[b, g])
            share = (float(u[b, g]) - cumulative[level]) / (cumulative[level + 1] - cumulative[level])
            assert found[b, g] == lowest[level] + int(share * (highest[level] - lowest[level] + 1))


def test_draws_of_tensors_that_do_not_match():
    given = list(draws())
    given[-2] = given[-2][:, :1]
    with pytest.raises(ValueError, match="same shape"):
        ops.count_draw(*given)


def test_the_mean_of_counts_takes_no_gradient():
    with pytest.raises(RuntimeError, match="count_mean"):
        ops.count_mean(*counts(grad=True)[:-1]).sum().backward()


# gradients, in fp64 by finite differences

GRADIENTS = {
    "adaln": (ops.adaln, lambda: (rand(2, 3, 8, grad=True), rand(2, 8, grad=True), rand(3, 8)[:2].requires_grad_())),
    "gated_adaln": (
        lambda x, out, gate, shift, scale, bias: ops.gated_adaln(x, out, gate, shift, scale, bias=bias),
        lambda: (*leaves((2, 3, 8), 2), *leaves((2, 8), 3), *leaves((8,), 1)),
    ),
    "mssa": (lambda w: ops.mssa(w, 2), lambda: (rand(2, 5, 6, grad=True),)),
    "fold": (ops.fold, lambda: (rand(6, 6, grad=True),)),
    "ista": (lambda z, d: ops.ista(z, ops.fold(d)), lambda: (rand(2, 3, 6, grad=True), rand(6, 6, grad=True))),
    "ista_adaln": (ops.ista_adaln, lambda: (*leaves((2, 3, 8), 2), *leaves((8, 8), 1), *leaves((2, 8), 3))),
    "training_blocks": (
        lambda x, w, o, bias, d, *parts: ops.training_blocks(x, parts, [w], [o], [bias], [d], 2),
        lambda: (*leaves((2, 3, 4), 1), *leaves((4, 4), 2), *leaves((4,), 1), *leaves((4, 4), 1), *leaves((2, 4), 8)),
    ),
    "noising": (
        lambda x, n: ops.noising(x, n, rand(2), rand(3)[:2]),
        lambda: (rand(2, 1, 4, grad=True), rand(2, 1, 5)[..., :4].detach().requires_grad_()),
    ),
    "count_nll": (ops.count_nll, lambda: counts(grad=True)),
    "sampler_step": (
        lambda x, o, n: ops.sampler_step(x, o, noise=n, a=1.5, b=-0.5, e=0.3, clamp_min=0.0),
        lambda: tuple(rand(2, 1, 4 + i)[..., :4].detach().requires_grad_() for i in range(3)),
    ),
}


@pytest.mark.parametrize("op", GRADIENTS)
def test_gradient(op):
    function, inputs = GRADIENTS[op]
    assert torch.autograd.gradcheck(function, inputs())


# registration with PyTorch

F32 = {"dtype": torch.float32}


def network():
    """Return the arguments of ``denoise`` for two patches of 4 genes, of which the last is padded, and a cell token."""
    embedding = rand(2, 8, 4), rand(2, 8), rand(3, 8), rand(8, 7), rand(8)
    readout = rand(2, 4, 8), rand(2, 4), rand(7, 8), rand(7)
    own = [[t.float() for t in ts] for ts in (embedding, readout)]
    _, modulations, *blocks = REGISTERED["run_blocks"]()
    return rand(2, 1, 7, **F32), modulations, own[0], *blocks[:4], own[1], *blocks[4:]


REGISTERED = {
    "adaln": lambda: (rand(2, 3, 8, grad=True, **F32), rand(2, 8, grad=True, **F32), rand(2, 8, **F32), 1e-6),
    "gated_adaln": lambda: (*leaves((2, 3, 8), 2, **F32), *leaves((8,), 1, **F32), *leaves((2, 8), 3, **F32), 1e-6),
    "mssa": lambda: (rand(2, 5, 6, grad=True, **F32), 2),
    "fold": lambda: (rand(6, 6, grad=True, **F32),),
    "ista": lambda: (rand(2, 3, 6, grad=True, **F32), rand(6, 6, grad=True, **F32), ETA, LAM),
    "ista_adaln": lambda: (
        *(*leaves((2, 3, 8), 2, **F32), *leaves((8, 8), 1, **F32), *leaves((2, 8), 3, **F32)),
        *(ETA, LAM, 1e-6),
    ),
    "run_blocks": lambda: (
        *(rand(2, 3, 8, **F32), [rand(2 + i, 8, **F32)[:2] for i in range(8)]),
        *([rand(8, 8, **F32)], [rand(8, 8, **F32)], [rand(8, **F32)], [rand(8, 8, **F32)], 2, ETA, LAM, 1e-6),
    ),
    "denoise": network,
    "denoise_step": lambda: (*network(), *(None,) * 4, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0, 0, [0.1, 0.9]),
    "training_blocks": lambda: (*blocks(), torch.float32),
    "training_blocks_backward": lambda: blocks_backward(),
    "noising": lambda: (rand(2, 1, 4, grad=True, **F32), rand(2, 1, 4, **F32), rand(2, **F32), rand(2, **F32)),
    "sampler_step": lambda: (
        *(rand(2, 1, 4, grad=True, **F32), rand(2, 1, 4, **F32), None, None, rand(2, 1, 4, **F32), None),
        *(1.5, -0.5, 0.0, 0.0, 0.3, 0.0, 0, 0),
    ),
    "normal": lambda: (7, torch.arange(3), 2, 10),
    "count_mean": lambda: counts(torch.float32)[:-1],
    "count_mean_step": lambda: (
        *(*count_step_inputs(torch.float32), 0.8, 0.6, rand(5, 1, 3, **F32), None, None, torch.arange(5)),
        *(1.5, -0.5, 0.25, 0.0, 0.1, None, 7, 3, True),
    ),
    "count_nll": lambda: counts(torch.float32, grad=True),
    "count_draw": lambda: (*draws(), 4),
}


def blocks():
    """Return the arguments of training_blocks for one block, without the dtype."""
    matrices = [[rand(8, 8, **F32)] for _ in range(3)]
    x, parts = rand(2, 3, 8, **F32), [rand(2 + i, 8, **F32)[:2] for i in range(8)]
    return x, parts, *matrices[:2], [rand(8, **F32)], matrices[2], 2, ETA, LAM, 1e-6


def blocks_backward():
    given = blocks()
    return rand(2, 3, 8, **F32), *given[:6], torch.ops.wbdit.training_blocks(*given, torch.float32)[1], *given[6:]


@pytest.mark.parametrize("op", REGISTERED)
def test_opcheck(op):
    torch.library.opcheck(getattr(torch.ops.wbdit, op), REGISTERED[op]())


def test_low_precision_follows_the_wide_result():
    w = rand(2, 9, 16, dtype=torch.float32)
    low = ops.mssa(w.bfloat16(), 4)
    assert low.dtype == torch.bfloat16
    assert relative_error(low, ops.mssa(w.bfloat16().double(), 4)) < 1e-2
    z, folded = rand(2, 9, 16, dtype=torch.float32), ops.fold(rand(16, 16, dtype=torch.float32))
    mixed = ops.ista(z, folded.bfloat16())
    assert mixed.dtype == torch.float32
    assert relative_error(mixed, ops.ista(z, folded)) < 2e-2


# noise


def test_philox_known_answers():
    """Compare with the known answers published by the authors of Philox (Random123, kat_vectors)."""
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in cases:
        bits = reference.philox(tuple(torch.tensor([word]) for word in counter), key)
        assert tuple(int(b) for b in bits) == expected


def test_noise_depends_on_its_address_alone():
    whole = ops.normal(3, torch.arange(10), 5, 101)
    torch.testing.assert_close(ops.normal(3, torch.tensor([7]), 5, 101)[0], whole[7], rtol=0, atol=0)
    torch.testing.assert_close(ops.normal(3, torch.arange(10), 5, 40), whole[:, :40], rtol=0, atol=0)
    for other in (ops.normal(4, torch.arange(10), 5, 101), ops.normal(3, torch.arange(10), 6, 101)):
        assert (other == whole).double().mean() < 0.01
    far = ops.normal(3, torch.arange(10) + 2**32, 5, 101)  # the upper word of the sample counts too
    assert (far == whole).double().mean() < 0.01


def test_noise_is_standard_normal():
    z = ops.normal(0, torch.arange(400), 1, 500).double().flatten()
    n = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(z.pow(4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert abs((z[:-1] * z[1:]).mean()) < 4 / math.sqrt(n)  # Box-Muller pairs are independent


# backends

ONE_OF_OUR_OWN = """
import os, torch
from wbdit import ops, backend
from wbdit.ops import reference
from wbdit.ops.count_step import one_pass
others = ops.serving("cpu")["mssa"]
calls = []
@ops.register_kernel("fold", "cpu", "test")
def fold(dictionary):
    calls.append(1)
    return reference.fold(dictionary)
d = torch.randn(4, 4, requires_grad=True)
ops.fold(d).sum().backward()
print(len(calls), ops.serving("cpu")["fold"], ops.serving("cpu")["mssa"] == others)
with backend("reference"):
    ops.fold(d)
    print(len(calls), ops.serving("cpu")["fold"])
ops.fold(d)
print(len(calls))
os.environ["WBDIT_BACKEND"] = "reference"
ops.fold(d)
print(len(calls), *{*ops.serving("cpu").values()})
"""


def test_a_kernel_enters(monkeypatch):
    """Run in a separate process, because a kernel cannot be unregistered."""
    monkeypatch.setenv("WBDIT_BACKEND", "auto")
    done = subprocess.run([sys.executable, "-c", ONE_OF_OUR_OWN], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["1 test True", "1 reference", "2", "2 reference"]


def test_unknown_backend():
    with pytest.raises(InputError, match="auto, reference"), ops.backend("quick"):
        pass
