"""The C++ kernels against the reference in fp64: forward and every gradient, fp32 and bf16, ragged shapes.

Tolerances are relative errors of whole tensors. conftest fills uninitialized memory with NaN, so that a test fails if a
kernel leaves an element unwritten. ``make test-sanitized`` runs this file with every read and write checked.
"""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from helpers import relative_error

from wbdit import WBDiT, ops
from wbdit.ops import build, cpu, cpu_blocks, dispatch, reference

pytestmark = pytest.mark.skipif(not build.available(), reason="the kernels cannot be built here")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
INTERPRETED = "WBDIT_TEST_ENGINE" in os.environ  # Triton's kernels in its interpreter: see test_triton.py
MANY = 34 if INTERPRETED else 130  # more tokens than two chunks of a sum (16 for Triton, 64 for C++)
WHOLE = 40 if INTERPRETED else 300  # tokens for which the C++ kernel keeps all scores, in two blocks
LONG = 70 if INTERPRETED else 513  # tokens for which it does not
# (samples, tokens, width): ones, primes, sizes below and above a vector, a tile and a chunk of a sum
SHAPES = pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (3, 17, 48), (2, MANY, 65), (1, 5, 256)], ids=str)
HEADS = pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width"),
    [(1, 1, 1, 1), (2, 3, 2, 5), (2, 17, 3, 16), (1, 33, 2, 96), (2, 64, 1, 128), (1, WHOLE, 2, 20), (1, LONG, 1, 33)],
    ids=str,
)


MEASURED = cpu_blocks.MEASURED


@pytest.fixture(autouse=True)
def every_level(monkeypatch):
    """Test the kernel of whole blocks at each instruction set, also where others are preferred."""
    monkeypatch.setattr(cpu_blocks, "MEASURED", range(len(cpu.LEVELS)))


def rand(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def check(function, inputs, tolerance, seed=100, least=1e-3):
    """Compare outputs and gradients of `function` with those of its reference in fp64 at the same inputs.

    The allowed error is `tolerance` times the norm of the expected tensor, or times `least` if the norm is smaller.
    """
    low = [t.detach().requires_grad_() for t in inputs]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out, expected = _tuple(function(*low)), _tuple(function(*wide))
    cotangents = [rand(*o.shape, dtype=o.dtype, seed=seed + i) for i, o in enumerate(out)]
    grads = torch.autograd.grad(out, low, cotangents)
    wanted = torch.autograd.grad(expected, wide, [c.double() for c in cotangents])
    for value, right in zip((*out, *grads), (*expected, *wanted), strict=True):
        value, right = value.detach().double(), right.detach()
        assert value.isfinite().all()
        assert (value - right).norm() <= tolerance * max(right.norm(), least)


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


def modulation(batch, d, parts, dtype):
    """Return slices of one table, as the model passes them: rows are not adjacent in memory."""
    return (0.5 * rand(batch, parts * d, dtype=dtype, seed=5)).chunk(parts, dim=1)


# agreement


@DTYPES
@SHAPES
def test_adaln(shape, dtype):
    batch, _, d = shape
    check(ops.adaln, [rand(*shape, dtype=dtype), *modulation(batch, d, 2, dtype)], TOLERANCE[dtype])


@DTYPES
@SHAPES
def test_gated_adaln(shape, dtype):
    """The residual stream stays fp32, while the added branch has the dtype of the products."""
    batch, _, d = shape
    inputs = [rand(*shape), rand(*shape, dtype=dtype, seed=1), *modulation(batch, d, 3, dtype)]
    check(ops.gated_adaln, inputs, TOLERANCE[dtype])
    inputs.append(rand(d, seed=7))
    check(lambda *tensors: ops.gated_adaln(*tensors[:-1], bias=tensors[-1]), inputs, TOLERANCE[dtype])


@DTYPES
@SHAPES
def test_in_place(shape, dtype):
    batch, _, d = shape
    x, (z, folded), bias, m = rand(*shape), off_the_kink(shape, dtype), rand(d, seed=7), modulation(batch, d, 3, dtype)
    for fresh, in_place in (
        (ops.gated_adaln(x, z, *m, bias=bias), ops.gated_adaln_(x.clone(), z.clone(), *m, bias=bias)),
        (ops.ista_adaln(x, z, folded, *m), ops.ista_adaln_(x.clone(), z.clone(), folded, *m)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(fresh, in_place, strict=True))


@DTYPES
@SHAPES
def test_ista_adaln(shape, dtype):
    batch, _, d = shape
    z, folded = off_the_kink(shape, dtype)
    check(ops.ista_adaln, [rand(*shape), z, folded, *modulation(batch, d, 3, dtype)], TOLERANCE[dtype])


@DTYPES
@SHAPES
def test_ista(shape, dtype):
    check(ops.ista, off_the_kink(shape, dtype), TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("d", [1, 7, 48, 100])
def test_fold(d, dtype):
    check(ops.fold, [rand(d, d, dtype=dtype) / d**0.5], TOLERANCE[dtype])


@DTYPES
@HEADS
def test_mssa(batch, tokens, heads, width, dtype):
    w = rand(batch, tokens, heads * width, dtype=dtype) * width**-0.25
    check(lambda w: ops.mssa(w, heads), [w], TOLERANCE[dtype])


def test_mssa_of_large_scores():
    """Scores of 2,500, which fp32 holds only to about 1e-4, and rows with all weight on a few tokens."""
    w = 100 * torch.nn.functional.one_hot(torch.arange(40) % 16, 16)[None].float() + 0.01 * rand(1, 40, 16)
    check(lambda w: ops.mssa(w, 1), [w], 1e-3)


def off_the_kink(shape, dtype, eta=0.1, lam=0.1, band=1e-2):
    """Return z and F such that no value lies in a band around the threshold, where the mask may differ."""
    d = shape[-1]
    z, folded = rand(*shape, dtype=dtype), (rand(d, d, seed=2) / d**0.5).to(dtype)
    for _ in range(20):
        value = z.double() + eta * (z.double() @ folded.double()) - eta * lam
        z = torch.where(value.abs() < band, (z.double() + 3 * band * value.sign()).to(dtype), z)
    return z, folded


@DTYPES
def test_band_round_the_threshold(dtype):
    """Only within a narrow band around the threshold may the mask differ from fp64."""
    z, folded = rand(4, 50, 64, dtype=dtype), (rand(64, 64, seed=2) / 8).to(dtype)
    value = z.double() + 0.1 * (z.double() @ folded.double()) - 0.01
    x, zero = torch.zeros(4, 50, 64), torch.zeros(4, 64, dtype=dtype)
    for mask in (
        ops.ista(z, folded) > 0,
        ops.ista_adaln(x, z, folded, zero + 1, zero, zero)[0] > 0,
    ):
        differs = mask != (value > 0)
        assert not differs[value.abs() > {torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]].any()
        assert 0.2 < mask.double().mean() < 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_modulation_for_all(dtype):
    """A row expanded over the batch, as in sampling, is read correctly."""
    shift, scale = (0.5 * rand(1, 20, dtype=dtype, seed=i).expand(3, -1) for i in (1, 2))
    x = rand(3, 6, 20)
    assert relative_error(ops.adaln(x, shift, scale), reference.adaln(x, shift, scale, 1e-6)) < 1e-6


def test_adaln_into_the_products_type():
    x, shift, scale = rand(2, 5, 24), rand(2, 24), rand(2, 24, seed=9)
    z = ops.adaln(x, shift, scale, dtype=torch.bfloat16)
    assert z.dtype == torch.bfloat16
    assert relative_error(z, ops.adaln(x, shift, scale)) < 5e-3


def test_inputs_are_left_alone_and_may_have_gaps():
    x, out = rand(2, 6, 40)[..., ::2], rand(2, 6, 20, seed=3).transpose(0, 1).contiguous().transpose(0, 1)
    kept = x.clone(), out.clone()
    gate, shift, scale = (rand(20, 2, seed=i).T for i in (1, 2, 3))
    x_new, z_new = ops.gated_adaln(x, out, gate, shift, scale)
    expected = reference.gated_adaln(x, out, None, gate, shift, scale, 1e-6)
    assert relative_error(x_new, expected[0]) < 1e-6
    assert relative_error(z_new, expected[1]) < 1e-6
    assert torch.equal(x, kept[0])
    assert torch.equal(out, kept[1])


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=str)
def test_nothing_to_do(shape):
    x, m = torch.randn(shape), torch.randn(shape[0], 8)
    assert ops.adaln(x, m, m).shape == shape
    assert ops.mssa(x, 2).shape == shape
    assert ops.ista_adaln(x, x, torch.randn(8, 8), m, m, m)[0].shape == shape


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shared", [True, False], ids=["one embedding", "one per patch"])
def test_a_model_takes_the_kernels_throughout(monkeypatch, shared, autocast):
    """No tensor layout inside a model makes an op fall back to the reference, which is correct but slow."""
    for name in ("adaln", "gated_adaln_", "ista_adaln_", "mssa"):
        monkeypatch.setattr(reference, name, lambda *args, name=name: pytest.fail(f"{name} ran on the reference"))
    model = WBDiT(input_size=24, patch_size=8, hidden_size=16, depth=2, num_heads=2, shared_patches=shared).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert model(rand(3, 1, 24), torch.tensor([1, 2, 3])).shape == (3, 1, 24)


def test_other_types_take_the_reference():
    w = rand(1, 5, 8).half()
    assert torch.equal(ops.mssa(w, 2), reference.mssa(w, 2)[0])


# all blocks at once


def blocks_inputs(tokens, d, heads, depth=2, batch=2, rows=None):
    """Return a residual stream whose rows are not centered, and blocks that change it noticeably."""
    p = d // heads
    parts = [(0.3 * rand(rows or batch, d, seed=i)).expand(batch, -1) for i in range(6 * depth + 2)]
    weights = [
        [rand(n, k, seed=9 * block + i) / d**0.5 for block in range(depth)]
        for i, (n, k) in enumerate([(heads * p, d), (d, heads * p), (d, d)])
    ]
    biases = [0.1 * rand(d, seed=block) for block in range(depth)]
    x = rand(batch, tokens, d) + 3 * rand(batch, tokens, 1, seed=1)
    return x, parts, weights[0], weights[1], biases, weights[2], heads


def blocks_in(inputs, dtype):
    x, parts, projections, outs, biases, folded, heads = inputs
    wide = dtype if dtype == torch.float64 else torch.float32
    cast = [
        [t.to(to) for t in ts]
        for ts, to in zip((parts, projections, outs, biases, folded), (wide, dtype, dtype, wide, dtype), strict=True)
    ]
    return ops.run_blocks(x.to(wide), *cast, heads)


@DTYPES
@pytest.mark.parametrize("rows", [None, 1], ids=["one row per sample", "one row for all"])
@pytest.mark.parametrize(("tokens", "d", "heads"), [(9, 48, 3), (70, 144, 3), (5, 64, 2), (6, 128, 4)], ids=str)
def test_run_blocks(tokens, d, heads, rows, dtype):
    """Compare with fp64 on weights that are rounded first, so that only the arithmetic is measured."""
    inputs = blocks_inputs(tokens, d, heads, rows=rows)
    inputs = (*inputs[:2], *([t.to(dtype).float() for t in ts] for ts in inputs[2:6]), heads)
    out = blocks_in(inputs, dtype)
    assert out.dtype == dtype
    assert relative_error(out, blocks_in(inputs, torch.float64)) < TOLERANCE[dtype]


@pytest.mark.skipif(not INTERPRETED, reason="the C++ kernels have one implementation")
@pytest.mark.parametrize("way", range(7))
def test_every_way_of_the_blocks(way, monkeypatch):
    """Each block size, and op by op; a tile covers rows of two or more samples."""
    from wbdit.kernels import blocks as fused_blocks

    every = fused_blocks.ways
    monkeypatch.setattr(fused_blocks, "ways", lambda *given: every(*given)[way : way + 1])
    x, parts, *weights, heads = blocks_inputs(130, 48, 3)
    inputs = (x, parts, *([t.bfloat16().float() for t in ts] for ts in weights), heads)
    assert relative_error(blocks_in(inputs, torch.bfloat16), blocks_in(inputs, torch.float64)) < 2e-2


def test_the_blocks_inputs_may_have_gaps():
    """Rows, channels and biases that are not adjacent in memory are read correctly."""
    x, parts, *weights, heads = blocks_inputs(9, 48, 3)
    weights = [[t.bfloat16() for t in ts] for ts in weights]
    dense = ops.run_blocks(x.bfloat16(), parts, *weights, heads)
    gaps = [[with_gaps(t) for t in ts] for ts in (parts, *weights)]
    x = x.bfloat16()
    for strided in (with_gaps(x), x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert not strided.is_contiguous()
        assert torch.equal(ops.run_blocks(strided, *gaps, heads), dense)


def test_a_bias_may_have_gaps():
    x, out, bias, m = rand(2, 5, 24), rand(2, 5, 24, seed=1), rand(24, seed=2), rand(2, 24, seed=3)
    for op in (ops.gated_adaln, ops.gated_adaln_):
        dense, strided = (op(x.clone(), out.clone(), m, m, m, bias=b) for b in (bias, with_gaps(bias)))
        assert all(map(torch.equal, dense, strided))
    gradients = [
        torch.autograd.grad(ops.gated_adaln(x, out, m, m, m, bias=b)[1].square().sum(), b)[0]
        for b in (bias.requires_grad_(), with_gaps(bias.detach()).requires_grad_())
    ]
    assert torch.equal(*gradients)


def with_gaps(t):
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def test_run_blocks_is_its_parts():
    x, parts, projections, outs, biases, folded, heads = blocks_inputs(7, 24, 3)
    z = ops.adaln(x, *parts[:2])
    stream = x
    for i in range(2):
        _, _, gate1, shift2, scale2, gate2, shift, scale = parts[6 * i : 6 * i + 8]
        step = ops.mssa(z @ projections[i].T, heads) @ outs[i].T + biases[i]
        stream, z = ops.gated_adaln(stream, step, gate1, shift2, scale2)
        stream, z = ops.ista_adaln(stream, z, folded[i], gate2, shift, scale)
    assert relative_error(ops.run_blocks(x, parts, projections, outs, biases, folded, heads), z) < 1e-5


def with_gradients(inputs, dtype=None):
    """Run blocks with gradients, on inputs of :func:`blocks_inputs`; return the function of flat tensors, and these."""
    x, parts, *weights, heads = inputs
    sizes = [len(parts), *map(len, weights)]

    def function(x, *flat):
        given = [list(of) for of in torch.split(torch.arange(len(flat)), sizes)]
        return ops.training_blocks(x, *([flat[i] for i in of] for of in given), heads, dtype=dtype)

    return function, [x, *parts, *(t for of in weights for t in of)]


# all samples in a task, one sample in several tiles of rows, fewer rows than a tile, and widths that the kernel refuses
@pytest.mark.parametrize(
    ("batch", "tokens", "d", "heads", "depth"),
    [(5, 33, 64, 2, 2), (2, 130, 96, 3, 1), (1, 1, 32, 1, 1), (3, 7, 48, 3, 2)],
    ids=str,
)
def test_training_blocks(batch, tokens, d, heads, depth):
    check(*with_gradients(blocks_inputs(tokens, d, heads, depth, batch)), TOLERANCE[torch.float32])


def test_training_blocks_in_bf16():
    """The weights and the stream stay fp32, the products are in bf16: as op by op."""
    inputs = blocks_inputs(9, 32, 2)
    function, flat = with_gradients(inputs, torch.bfloat16)
    exact, _ = with_gradients(inputs)
    low, wide = ([t.detach().to(to).requires_grad_() for t in flat] for to in (torch.float32, torch.float64))
    out, expected = function(*low), exact(*wide)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected) < 2e-2
    grads, wanted = torch.autograd.grad(out.float().sum(), low), torch.autograd.grad(expected.sum(), wide)
    assert max(map(relative_error, grads, wanted)) < 0.1


def test_training_blocks_takes_each_dtype():
    """No kernel computes in fp16: the reference does."""
    function, flat = with_gradients(blocks_inputs(5, 32, 2), torch.float16)
    assert function(*flat).dtype == torch.float16
    function, (x, *flat) = with_gradients(blocks_inputs(5, 32, 2), torch.float16)
    assert function(x, *(t.half() for t in flat)).dtype == torch.float16


def test_training_blocks_has_no_second_derivative():
    function, (x, *flat) = with_gradients(blocks_inputs(5, 32, 2))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(function(x, *flat).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.skipif(INTERPRETED, reason="the C++ kernel")
@pytest.mark.parametrize(
    ("level", "threads", "chosen"), [(0, 2, False), (1, 2, True), (1, 10, True), (1, 11, False), (2, 2, False)]
)
def test_blocks_take_the_kernel_where_it_was_faster(monkeypatch, level, threads, chosen):
    """The kernel runs with AVX2, and with at most twice as many threads as samples."""

    class Chosen(Exception):
        pass

    class Engine:
        cpu_level = staticmethod(lambda: level)

        def blocks(self, *args, **named):
            raise Chosen

    monkeypatch.setattr(cpu_blocks, "MEASURED", MEASURED)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setitem(dispatch._adapters, "run_blocks", lambda engine, x, *args: x)
    x, parts, *weights, heads = blocks_inputs(9, 32, 2, batch=5)
    with pytest.raises(Chosen) if chosen else nullcontext():
        cpu_blocks.run_blocks(Engine(), x, parts, *weights, heads, 0.1, 0.1, 1e-6)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has one thread")
def test_blocks_do_not_depend_on_the_threads_or_the_batch(monkeypatch):
    """The C++ kernel takes tasks of a few samples: their number and order change no bit."""
    for op in ("run_blocks", "training_blocks", "training_blocks_backward"):
        monkeypatch.setitem(dispatch._adapters, op, lambda *args, op=op: pytest.fail(f"{op} ran op by op"))
    function, flat = with_gradients(blocks_inputs(9, 32, 2, batch=11))
    flat, many, results = [t.detach().requires_grad_() for t in flat], torch.get_num_threads(), []
    for threads in (1, max(2, many)):
        torch.set_num_threads(threads)
        out = function(*flat)
        results.append((out, *torch.autograd.grad(out.square().sum(), flat)))
    torch.set_num_threads(many)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    x, parts, *weights, heads = blocks_inputs(9, 32, 2, batch=11)
    with torch.no_grad():
        all_at_once = ops.run_blocks(x, parts, *weights, heads)
        alone = ops.run_blocks(x[4:5], [part[4:5] for part in parts], *weights, heads)
    assert torch.equal(all_at_once[4:5], alone)


# a whole denoiser


def denoiser_inputs(
    cells, channels, genes, patch, d, heads, *, outputs=None, width=None, cell=True, own=True, rows=None, depth=2
):
    """Return the arguments of ``ops.denoise`` with bf16 products; the ends' weights have bf16's digits too."""
    outputs = outputs or channels
    patches, inner = -(-genes // patch), heads * (width or d // heads)
    n, spans = patches if own else 1, (channels * patch, channels * genes)
    table = [0.3 * rand(rows or cells, 6 * d, seed=i) for i in range(depth)] + [0.3 * rand(rows or cells, 2 * d)]
    parts = [part.expand(cells, -1) for row in table for part in row.chunk(row.shape[1] // d, 1)]
    embedding = [rounded(rand(n, spans[0], d).mT / spans[0] ** 0.5), 0.1 * rand(n, d), rand(patches + cell, d)]
    readout = [rounded(rand(n, outputs * patch, d) / d**0.5), 0.1 * rand(n, outputs * patch)]
    if cell:
        embedding += [rounded(rand(d, spans[1]) / spans[1] ** 0.5), 0.1 * rand(d, seed=1)]
        readout += [rounded(rand(outputs * genes, d) / d**0.5), 0.1 * rand(outputs * genes)]
    weights = [
        [(rand(rows, columns, seed=9 * block + i) / columns**0.5).bfloat16() for block in range(depth)]
        for i, (rows, columns) in enumerate([(inner, d), (d, inner), (d, d)])
    ]
    biases = [0.1 * rand(d, seed=block) for block in range(depth)]
    return rand(cells, channels, genes), parts, embedding, *weights[:2], biases, weights[2], readout, heads


def rounded(t):
    return t.bfloat16().float()


def wide(given):
    x, *lists, heads = given
    return x.double(), *([t.double() for t in ts] for ts in lists), heads


# ragged last patches; rows of all samples that fill no tile, more than one, and exactly a row
NARROW = {
    "own": ((3, 1, 20, 8, 64, 2), {}),
    "common": ((1, 2, 30, 8, 48, 3), {"cell": False, "own": False, "rows": 1}),
    "several tiles": ((2, 1, 67, 2, 32, 2), {"depth": 1}),
    "one row": ((3, 1, 20, 8, 64, 2), {"rows": 1, "own": False}),
    "thin": ((2, 2, 9, 4, 64, 2), {"width": 16, "cell": False}),
    "widest": ((2, 1, 33, 8, 256, 4), {}),
    "three pieces": ((2, 1, 20, 8, 144, 3), {}),
}


@pytest.mark.parametrize("case", NARROW)
def test_narrow_denoiser(case):
    """Compare with fp64 on weights that are rounded first, so that only the arithmetic is measured."""
    sizes, options = NARROW[case]
    given = denoiser_inputs(*sizes, **options)
    out = ops.denoise(*given)
    assert out.dtype == torch.float32
    assert relative_error(out, ops.denoise(*wide(given))) < TOLERANCE[torch.bfloat16]


# the chain of narrow models needs widths that 16 divides
WIDE = {
    "common": ((3, 1, 39, 10, 40, 2), {"cell": False, "own": False}),
    "one row": ((2, 1, 40, 10, 72, 3), {"cell": False, "own": False, "rows": 1}),
    "own": ((3, 2, 12, 5, 24, 2), {}),
    "several tiles": ((35, 1, 6, 3, 24, 2), {"depth": 1}),
    "two outputs": ((2, 1, 12, 4, 24, 2), {"outputs": 2}),
}


@pytest.mark.parametrize("case", WIDE)
def test_wide_denoiser(case):
    sizes, options = WIDE[case]
    given = denoiser_inputs(*sizes, **options)
    out = ops.denoise(*given)
    assert out.dtype == torch.float32
    assert relative_error(out, ops.denoise(*wide(given))) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("d", [24, 32], ids=["wide", "narrow"])
def test_the_inputs_of_denoise_may_have_gaps(d):
    x, *lists, heads = denoiser_inputs(2, 1, 9, 4, d, 2, depth=1)
    strided = with_gaps(x), *([with_gaps(t) for t in ts] for ts in lists), heads
    assert torch.equal(ops.denoise(*strided), ops.denoise(x, *lists, heads))


def test_denoise_in_fp32():
    x, *lists, heads = denoiser_inputs(3, 2, 12, 5, 24, 2)
    given = x, *([t.float() for t in ts] for ts in lists), heads
    assert relative_error(ops.denoise(*given), ops.denoise(*wide(given))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("clean", [None, (0.25, 1.5)], ids=["state", "state and estimate"])
def test_denoise_step(clean):
    """The update equals that of ``sampler_step`` on the output of ``denoise``; the noise is that of its address."""
    inputs = denoiser_inputs(3, 1, 9, 4, 24, 2, depth=1)
    x = inputs[0]
    terms = ["previous", "earlier", "noise"] if clean else ["previous"]
    given = {name: rand(*x.shape, seed=20 + i) for i, name in enumerate(terms)}
    if clean is None:
        given |= {"samples": torch.tensor([0, 5, 2**33 + 1]), "seed": 2**40 + 3, "step": 7}
    factors = {"a": 0.7, "b": -0.4, "c": 0.3, "d": -0.2, "e": 0.5, "clamp_min": -0.5}
    out = ops.denoise(*inputs)
    new, estimate = ops.denoise_step(*inputs, **given, **factors, clean=clean)
    torch.testing.assert_close(new, ops.sampler_step(x, out, **given, **factors), rtol=1e-4, atol=1e-5)
    if clean is None:
        assert estimate is None
    else:
        torch.testing.assert_close(estimate, 0.25 * x + 1.5 * out, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="the C++ kernels have one implementation")
@pytest.mark.parametrize("rows", range(2))
def test_narrow_candidates(rows, monkeypatch):
    """Each block size, with tiles that cover rows of several samples."""
    from wbdit.kernels import narrow

    given = denoiser_inputs(3, 1, 67, 2, 64, 2, depth=1)
    monkeypatch.setattr(narrow, "candidates", lambda _, only=narrow.ROWS[rows]: (only,))
    assert relative_error(ops.denoise(*given), ops.denoise(*wide(given))) < 2e-2


@pytest.mark.skipif(not INTERPRETED, reason="counts launches of Triton's kernels")
def test_narrow_launches(monkeypatch):
    """1 + 2 launches per block, none of PyTorch's between them, and the same for a step of a sampler."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton.runtime.interpreter import GridExecutor
    from wbdit.kernels import narrow

    launched, run = [], GridExecutor.__call__

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            launched.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    def launch(self, *args, **named):
        with torch.utils._python_dispatch._disable_current_modes():
            launched.append(self.fn.__name__)
            return run(self, *args, **named)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    x, *network, readout, heads = denoiser_inputs(2, 1, 20, 8, 32, 2)
    empty, expected = ("empty", "new_empty", "empty_like"), ["_narrow_embed", *["_mssa_forward", "_narrow_chain"] * 2]
    with Recorder():
        narrow.run_denoiser(x, *network, heads, 0.1, 0.1, 1e-6, narrow.ROWS[0])
    assert [name for name in launched if name not in empty] == expected
    launched.clear()
    with Recorder():
        ops.denoise_step(x, *network, readout, heads, a=0.5, b=0.5)
    assert [name for name in launched[1:] if name not in empty] == [*expected, "_read_patches"]


# the noise schedule's updates


def test_noise_is_the_references():
    samples = torch.tensor([0, 1, 5, 2**33 + 7, 64])
    for length in (1, 3, 255, 256, 1001):
        z = ops.normal(2**62 + 12345, samples, 7, length)
        torch.testing.assert_close(z, reference.normal(2**62 + 12345, samples, 7, length), rtol=1e-5, atol=2e-6)


@DTYPES
def test_noising(dtype):
    x0, noise, alpha, sigma = rand(3, 1, 37, dtype=dtype), rand(3, 1, 37, dtype=dtype, seed=1), rand(3), rand(3, seed=1)
    check(lambda x, n: ops.noising(x, n, alpha.to(x), sigma.to(x)), [x0, noise], TOLERANCE[dtype])


@DTYPES
def test_sampler_step(dtype):
    terms = [rand(3, 2, 301, dtype=dtype, seed=i) for i in range(5)]
    factors = {"a": 1.5, "b": -0.5, "c": 0.25, "d": 2.0, "e": 0.1}
    check(lambda *t: ops.sampler_step(*t, **factors), terms, TOLERANCE[dtype])
    clamped = ops.sampler_step(*terms, **factors, clamp_min=0.25)
    assert clamped.min() == 0.25


def test_sampler_step_draws_its_noise():
    """The noise drawn inside the op equals explicit noise, whatever the batch."""
    x, out, samples = rand(4, 1, 301), rand(4, 1, 301, seed=1), torch.arange(4)
    drawn = ops.sampler_step(x, out, a=1.5, b=-0.5, e=0.3, samples=samples, seed=11, step=3)
    noise = reference.normal(11, samples, 3, 301).view(4, 1, 301)
    torch.testing.assert_close(drawn, 1.5 * x - 0.5 * out + 0.3 * noise, rtol=1e-5, atol=1e-6)
    alone = ops.sampler_step(x[2:3], out[2:3], a=1.5, b=-0.5, e=0.3, samples=samples[2:3], seed=11, step=3)
    assert torch.equal(alone, drawn[2:3])
    assert torch.equal(ops.sampler_step(x, out, a=1.5, b=-0.5, e=0.3, samples=samples.int(), seed=11, step=3), drawn)


# counts with a few levels per gene


def count_inputs(cells, genes, levels, sigma=None, seed=0):
    """Return per-gene tables, NaN at levels that a gene lacks, and cells noised from existing levels."""
    draws = torch.Generator().manual_seed(seed)
    rows = torch.arange(levels)
    counts = torch.where(rows < 9, rows, 8 * 1.4 ** (rows - 8)).round()
    n_levels = (1 + torch.rand(genes, generator=draws) * levels).int().clamp(max=levels)
    absent = rows >= n_levels[:, None]
    values = torch.log1p(counts) * (0.5 + torch.rand(genes, 1, generator=draws))
    base = [torch.randn(genes, levels, generator=draws) - 0.1 * counts for _ in range(2)]
    log_base0, log_base1, values = (t.masked_fill(absent, torch.nan) for t in (*base, values))
    target = (torch.rand(cells, genes, generator=draws) * n_levels).to(torch.uint8)
    sigma = 0.05 + 0.95 * torch.rand(cells, generator=draws) if sigma is None else torch.full((cells,), sigma)
    alpha = (1 - sigma**2).sqrt()
    clean = torch.take_along_dim(values, target.long().T, 1).T
    x = alpha[:, None] * clean + sigma[:, None] * torch.randn(cells, genes, generator=draws)
    log_odds, mixture = 0.3 * torch.randn(cells, genes, generator=draws), torch.rand(cells, genes, generator=draws)
    return x, log_odds, mixture, alpha, sigma, log_base0, log_base1, values, counts, n_levels, target


def check_counts(inputs, tolerance):
    x, log_odds, mixture, alpha, sigma, log_base0, log_base1, *rest, n_levels, target = inputs

    def both(log_odds, mixture, log_base0, log_base1):
        given = (
            *(t.to(log_odds.dtype) for t in (alpha, sigma)),
            log_base0,
            log_base1,
            *(t.to(log_odds.dtype) for t in rest),
            n_levels,
        )
        given = x.to(log_odds.dtype), log_odds, mixture, *given
        with torch.no_grad():
            mean = ops.count_mean(*given)
        return torch.stack((ops.count_nll(*given, target), mean))

    check(both, [log_odds, mixture, log_base0, log_base1], tolerance, least=0.1)  # a single level has loss 0


# cells, genes and levels: one, below and above two vectors, more than a strip
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 130, 27), (3, 5, 2), (17, 5, 64), (64, MANY, 27), (0, 5, 3), (130, 17, 9)], ids=str
)
def test_counts(shape):
    check_counts(count_inputs(*shape), TOLERANCE[torch.float32])


@pytest.mark.parametrize(("sigma", "tolerance"), [(1e-3, 2e-3), (1.0, 1e-5)], ids=str)
def test_counts_at_the_ends_of_the_schedule(sigma, tolerance):
    """At sigma = 1e-3, fp32 rounds x by 1e-3 standard deviations. At sigma = 1, alpha is 0 and x is pure noise."""
    inputs = count_inputs(9, 21, 12, sigma=sigma)
    if sigma < 1:
        inputs[-1].random_(1, generator=torch.Generator())  # wrong target levels: losses in the thousands
    check_counts(inputs, tolerance)


@pytest.mark.parametrize("rate", [1e4, -1e4, 1e20])
def test_counts_of_any_rate(rate):
    """With logits of a million and more, the largest or the smallest level has all the weight."""
    x, log_odds, *rest, n_levels, _ = count_inputs(5, 7, 12)
    mean = ops.count_mean(x, torch.full_like(log_odds, rate), *rest, n_levels)
    level = (n_levels - 1).long() if rate > 0 else torch.zeros(7, dtype=torch.long)
    torch.testing.assert_close(mean, torch.take_along_dim(rest[-2], level[:, None], 1).T.expand(5, -1))
    nll = ops.count_nll(x, torch.full_like(log_odds, rate), *rest, n_levels, level.to(torch.uint8).expand(5, -1))
    assert nll.abs().max() < 1e-6


def test_counts_of_a_cell_do_not_depend_on_the_batch():
    """Nor do they depend on the layout: strided rows, one row for all, inputs under autocast."""
    x, log_odds, mixture, alpha, sigma, *tables, target = count_inputs(70, 19, 9)
    mixture = mixture[:1].expand(70, -1)
    given = x, log_odds, mixture, alpha, sigma, *tables
    nll, mean = ops.count_nll(*given, target), ops.count_mean(*given)
    wide = torch.cat((x, log_odds), 1)
    parts = wide[66:69, :19], wide[66:69, 19:], mixture[66:69], alpha[66:69], sigma[66:69]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.count_nll(*parts, *tables, target[66:69]), nll[66:69])
        assert torch.equal(ops.count_mean(*parts, *tables), mean[66:69])


def step_inputs(cells, genes, levels, outputs=2):
    """Return the inputs of a step at one timestep: x, answer, offsets, sizes of the negative binomials and tables."""
    x, rates, mixture, _, _, *tables, _ = count_inputs(cells, genes, levels, sigma=0.6)
    draws = torch.Generator().manual_seed(2)
    answer, dispersion = torch.randn(cells, outputs, genes, generator=draws), mixture.logit()
    knots, log_mean = torch.randn(2, genes, generator=draws)
    log_size = torch.randn(2, genes, generator=draws)
    return x[:, None], answer, rates, dispersion, knots, log_size, log_mean, *tables


LEVELS = {"alpha": 0.8, "sigma": 0.6}


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (34, 17, 12), (0, 5, 3)], ids=str)
def test_count_mean_step(shape, outputs):
    """All terms of the update at once, and none of them."""
    given = step_inputs(*shape, outputs)
    samples = torch.arange(shape[0]) + 2**33
    previous, earlier, noise = (rand(shape[0], 1, shape[1], seed=i) for i in range(3))
    factors = {"a": 1.5, "b": -0.5, "c": 0.25, "d": 2.0, "e": 0.1, "clamp_min": -0.5}
    own = {"samples": samples, "seed": 11, "step": 3}
    for terms in ({}, {"previous": previous, "earlier": earlier, "noise": noise}, own):
        new, clean = ops.count_mean_step(*given, **terms, **factors, **LEVELS)
        terms = {name: t.double() if name in ("previous", "earlier", "noise") else t for name, t in terms.items()}
        expected = ops.count_mean_step(*wider(given), **terms, **factors, **LEVELS)
        assert new.dtype == clean.dtype == torch.float32
        assert new.shape == clean.shape == (shape[0], 1, shape[1])
        for value, right in zip((new, clean), expected, strict=True):
            assert (value - right).norm() <= 1e-5 * max(right.norm(), 0.1)


def test_a_step_of_counts_is_its_parts():
    """Noise is drawn by address, the estimate is optional, and offsets may be columns of one wider tensor."""
    x, answer, rates, dispersion, *known = step_inputs(3, 19, 9)
    factors = {"a": 1.5, "b": -0.5, "e": 0.3}
    given = x, answer, rates, dispersion, *known
    address = {"samples": torch.arange(3), "seed": 11, "step": 3}
    new, clean = ops.count_mean_step(*given, **factors, **address, **LEVELS)
    expected = ops.sampler_step(x, clean, **factors, **address)
    torch.testing.assert_close(new, expected, rtol=1e-6, atol=1e-6)
    both = torch.cat((rates, dispersion), 1)
    slices = x[1:], answer[1:], both[1:, :19], both[1:, 19:], *known
    address["samples"] = torch.arange(1, 3, dtype=torch.int32)
    alone, nothing = ops.count_mean_step(*slices, **factors, **address, **LEVELS, keep=False)
    # PyTorch computes a tensor's last values, fewer than a vector of them, by another code: the last bit may differ
    torch.testing.assert_close(alone, new[1:], rtol=1e-6, atol=1e-6)
    assert nothing is None
    low, _ = ops.count_mean_step(x.bfloat16(), *given[1:], **factors, **LEVELS)
    assert low.dtype == torch.bfloat16
    for spoilt in (0, 1, 2, 3, 4):
        wrong = [t.clone() for t in given]
        wrong[spoilt][(0,) * wrong[spoilt].ndim] = torch.nan
        for found in ops.count_mean_step(*wrong, **factors, **LEVELS, clamp_min=0.0):
            assert found[0, 0, 0].isnan(), spoilt
            assert found[:, :, 1:].isfinite().all(), spoilt


def draw_inputs(cells, genes, levels, library=3.0):
    """Return the inputs of a draw: levels of one count up to 8, wider ones above, and library sizes per gene."""
    x, log_ratio, *rest, _, n_levels, _ = count_inputs(cells, genes, levels)
    draws, rows = torch.Generator().manual_seed(1), torch.arange(levels)
    growth = min(1.4, 1e7 ** (1 / max(levels - 9, 1)))
    lowest = (rows + (growth ** (rows - 8)).round() * (rows > 8)).int()
    highest = torch.cat((lowest[1:] - 1, lowest[-1:] + 5))
    u = torch.rand(cells, genes, generator=draws)
    size = genes * library * (0.5 + torch.rand(cells, generator=draws))
    return x, log_ratio, *rest, (lowest + highest) / 2, n_levels, lowest, highest, u, size


def wider(given):
    return [t.double() if t.is_floating_point() else t for t in given]


def probabilities(given, log_scale):
    x, log_ratio, *rest = wider(given)
    log_odds = torch.nn.functional.logsigmoid(log_ratio + log_scale.double()[:, None])
    return reference.count_logits(x, log_odds, *rest[:8])[0].softmax(-1)


# one cell, one gene, more cells than a vector, a warp and a strip, more genes than a block, the most levels
DRAWS = [(1, 1, 1), (33, 17, 2), (2, 2, 12), (0, 5, 3)] if INTERPRETED else [
    *((1, 1, 1), (1, 37, 27), (3, 5, 2), (17, 5, 64), (64, 130, 27), (0, 5, 3), (130, 17, 9), (2, 3, 255)),
]  # fmt: skip


@pytest.mark.parametrize("shape", DRAWS, ids=str)
def test_count_draw(shape):
    """Counts are those of fp64, unless u is within rounding of a boundary between two counts."""
    given = draw_inputs(*shape)
    drawn, log_scale = torch.ops.wbdit.count_draw(*given, 4)
    exact, exact_scale = torch.ops.wbdit.count_draw(*wider(given), 4)
    assert drawn.dtype == exact.dtype == torch.int32
    torch.testing.assert_close(log_scale.double(), exact_scale, rtol=1e-5, atol=1e-5)
    assert (drawn != exact).sum() <= 1e-3 * drawn.numel()
    *_, n_levels, lowest, highest, u, _ = given
    p = probabilities(given, log_scale)
    level = torch.bucketize(drawn, highest)[..., None]
    assert (level[..., 0] < n_levels).all()
    mass, until = p.gather(-1, level)[..., 0], p.cumsum(-1).gather(-1, level)[..., 0]
    first, last = lowest[level[..., 0]], highest[level[..., 0]]
    size = mass / (last - first + 1)
    start = until - mass + size * (drawn - first)  # u from `start` to `start + size` draws this count
    assert (start - 1e-5 <= u).all()
    assert (u <= start + size + 1e-5).all()


@pytest.mark.parametrize("library", [0.3, 3.0, 5e5], ids=str)
def test_expected_counts_sum_to_the_library_size(library):
    """The prior is a negative binomial, whose mean is proportional to its ratio: the iteration converges quickly."""
    cells, genes, levels = (3, 2, 12) if INTERPRETED else (20, 37, 60)
    given = list(draw_inputs(cells, genes, levels, library))
    counts, lowest, highest = given[8], given[10], given[11]
    given[5] = given[6] = (highest - lowest + 1).log().expand(genes, -1)  # of size 1: all counts of a level are alike
    given[7], given[9] = torch.log1p(counts).expand(genes, -1), torch.full((genes,), levels, dtype=torch.int32)
    given[3], given[4] = torch.zeros(cells), torch.ones(cells)  # no signal
    given[13] = given[13].clamp(max=genes * counts[-1] / 20)  # within reach of the levels
    _, log_scale = torch.ops.wbdit.count_draw(*given, 12)
    total = (probabilities(given, log_scale) @ counts.double()).sum(1)
    torch.testing.assert_close(total, given[13].double(), rtol=1e-4, atol=0)


def test_draws_of_a_cell_do_not_depend_on_the_batch():
    """Nor do they depend on the layout: strided rows, one row for all, inputs under autocast."""
    (cells, genes, levels), some = ((36, 3, 4), slice(33, 35)) if INTERPRETED else ((70, 19, 9), slice(66, 69))
    x, log_ratio, mixture, alpha, sigma, *tables, u, library = draw_inputs(cells, genes, levels)
    mixture = mixture[:1].expand(cells, -1)
    whole = torch.ops.wbdit.count_draw(x, log_ratio, mixture, alpha, sigma, *tables, u, library, 4)
    wide = torch.cat((x, log_ratio, u), 1)[some]
    x, log_ratio, u = wide[:, :genes], wide[:, genes : 2 * genes], wide[:, 2 * genes :]
    parts = x, log_ratio, mixture[some], alpha[some], sigma[some], *tables, u, library[some]
    with torch.autocast("cpu", torch.bfloat16):
        for found, expected in zip(torch.ops.wbdit.count_draw(*parts, 4), whole, strict=True):
            assert torch.equal(found, expected[some])
    strided = [with_gaps(t) for t in parts[:3]]
    assert torch.equal(ops.count_draw(*strided, *parts[3:]), whole[0][some])


def test_draws_at_the_ends():
    """u = 0 draws the lowest level and u = 1 the highest one that has probability, however improbable others are."""
    given = list(draw_inputs(2, 3, 9))
    given[1] = torch.full((2, 3), -60.0)  # count 1 has probability e^-60
    for u in (0.0, 1 - 2**-24, 1.0):
        given[12] = torch.full((2, 3), u)
        assert (ops.count_draw(*given, rounds=0) == 0).all()
    given[1], given[4] = torch.zeros(2, 3), torch.full((2,), 100.0)
    given[5], given[6] = torch.zeros(3, 9), torch.zeros(3, 9)
    assert torch.equal(ops.count_draw(*given, rounds=0), given[11][given[9] - 1].expand(2, -1))


def test_draws_with_a_nan():
    """A NaN gives all genes of its cell the lowest count, a NaN in u only its own, and no NaN affects other cells."""
    given = draw_inputs(2, 2, 2)
    right = ops.count_draw(*given)
    for spoilt in (0, 1, 2, 3, 4, 12, 13):
        wrong = [t.clone() for t in given]
        wrong[spoilt].view(2, -1)[0, 0] = torch.nan
        for drawn in (ops.count_draw(*wrong), reference.count_draw(*wrong, 4)[0]):
            assert (drawn[0, :1] if spoilt == 12 else drawn[0]).eq(0).all(), spoilt
            assert torch.equal(drawn[1], right[1]), spoilt
            assert spoilt != 12 or torch.equal(drawn[0, 1:], right[0, 1:])
    assert (ops.count_draw(*given[:-1], torch.tensor([0.0, 1.0]))[0] == 0).all()  # an empty library


def test_a_nan_is_not_hidden():
    counts = count_inputs(1, 4, 3)
    for spoilt in (0, 1, 2, 5, 6, 7):
        given = [t.clone() for t in counts]
        given[spoilt][0, 0] = torch.nan
        assert ops.count_nll(*given)[0, 0].isnan(), spoilt
        assert ops.count_mean(*given[:-1])[0, 0].isnan(), spoilt
        grads = torch.ops.wbdit.count_nll_backward(torch.ones(1, 4), *given)
        assert all(grad[0, 0].isnan() for grad in grads), spoilt
    x = torch.full((1, 4), torch.nan)
    assert ops.sampler_step(x, x, a=1.0, b=1.0, clamp_min=0.0).isnan().all()
    assert ops.adaln(x[None], x, x).isnan().all()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has one thread")
def test_sums_do_not_depend_on_the_threads():
    w, dout, many = rand(2, 70, 64), rand(2, 70, 64, seed=1), torch.get_num_threads()
    x, m = rand(3, 150, 32).requires_grad_(), rand(3, 32).requires_grad_()
    results = []
    for threads in (1, max(2, many)):
        torch.set_num_threads(threads)
        out, lse = torch.ops.wbdit.mssa(w, 4)
        dw = torch.ops.wbdit.mssa_backward(dout, w, out, lse, 4)
        grads = torch.autograd.grad(ops.adaln(x, m, m).square().sum(), (x, m))
        grads += torch.ops.wbdit.count_nll_backward(torch.ones(70, 130), *count_inputs(70, 130, 20))
        drawn = torch.ops.wbdit.count_draw(*draw_inputs(70, 130, 20), 4)
        results.append((out, dw, *grads, *drawn))
    torch.set_num_threads(many)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# instruction sets


@pytest.mark.parametrize("level", cpu.LEVELS)
def test_every_instruction_set(level):
    """Run these tests at each lower instruction set, each in a separate process."""
    if INTERPRETED or "WBDIT_CPU" in os.environ:
        pytest.skip("already inside such a process, or testing other kernels")
    if cpu.LEVELS.index(level) > cpu.LEVELS.index(cpu.cpu_level()):
        pytest.skip("this processor lacks the instruction set")
    if level == cpu.cpu_level():
        pytest.skip("the tests above run at this instruction set already")
    said = f"import pytest, wbdit.ops.cpu as c; assert c.cpu_level() == {level!r}; "
    run = f"raise SystemExit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', {__file__!r}]))"
    environment = {**os.environ, "WBDIT_CPU": level}
    done = subprocess.run([sys.executable, "-c", said + run], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
