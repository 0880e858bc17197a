"""The Triton kernels without a GPU: values in Triton's interpreter, and machine code compiled for absent GPUs.

The C++ kernels' tests (``tests/ops/test_kernels.py``) compare the values with fp64. They run in a process in which the
Triton kernels serve CPU tensors (see conftest).
"""

import functools
import importlib
import os
import pkgutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

TESTS = ROOT / "tests"
BENCH = ROOT / "bench"
INTERPRETED = "TRITON_INTERPRET" in os.environ
pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiling needs a process without the interpreter")


def run(*arguments, **environment):
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=env)


# the interpreter is slow: `make test` runs a test per kernel, `make test-triton` runs all
SOME = (
    "bf16 and (test_mssa or gated_adaln or ista_adaln or test_ista) or test_counts[ or test_count_draw[ or "
    "draws_its_noise or its_parts or test_count_mean_step[ or narrow_launches or "
    "narrow_denoiser and (common or tiles) or test_denoise_step"
)
# other shapes have more chunks of tokens, more cells, more genes and as many levels, and are as ragged
LEFT_OUT = ("test_gated_adaln[(3, 17, 48)-bf16]", "test_ista_adaln[(3, 17, 48)-bf16]", "test_counts[(64, 34, 27)]")


@pytest.mark.parametrize(
    ("chosen", "left_out"), [(SOME, LEFT_OUT), pytest.param("test", (), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_values(chosen, left_out):
    """Run the tests of values: forward and every gradient, fp32 and bf16, ragged shapes, NaN-filled memory."""
    done = run(
        *("-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", chosen, TESTS / "ops" / "test_kernels.py"),
        *(f"--deselect=tests/ops/test_kernels.py::{test}" for test in left_out),
        TRITON_INTERPRET="1",
        WBDIT_TEST_ENGINE="triton",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_the_values_can_be_wrong(tmp_path):
    """With a wrong kernel the tests of values fail: they run the kernels, not the reference."""
    broken = tmp_path / "conftest_broken.py"
    broken.write_text(
        "import wbdit.kernels.adaln as kernels\n"
        "right = kernels.residual_adaln\n"
        "def residual_adaln(x, **named):\n"
        "    right(x, **named)\n"
        "    named['z_new'].mul_(1.001)\n"
        "kernels.residual_adaln = residual_adaln\n"
    )
    done = run(
        *("-m", "pytest", "-p", "no:cacheprovider", "-p", "conftest_broken", "-k", "test_gated_adaln and fp32"),
        TESTS / "ops" / "test_kernels.py",
        TRITON_INTERPRET="1",
        WBDIT_TEST_ENGINE="triton",
        PYTHONPATH=str(tmp_path),
    )
    assert done.returncode == 1, done.stdout[-2000:]
    assert "5 failed" in done.stdout


# machine code


@pytest.fixture(scope="module")
def codegen():
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("codegen")
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def compiled(codegen):
    """Return a function that compiles an op's kernels once for all tests and returns their resources."""
    return functools.cache(codegen.compile_op)


# `make test` compiles for one architecture, `make test-triton` for all
SOME_SLOWLY = [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))]
MATRIX_OPS = ("mssa", "mssa_backward")
ROW_OPS = ("adaln", "adaln_backward", "gated_adaln", "gated_adaln_backward", "ista_adaln", "ista_adaln_backward")


@pytest.mark.parametrize("arch", SOME_SLOWLY)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=["bf16", "fp32"]
)
def test_every_op_compiles_and_keeps_to_its_registers(codegen, compiled, arch, dtype):
    from drylaunch import SHARED

    for op in codegen.launches(dtype):
        if (op, arch) == ("denoise", 100):
            continue  # not offered there
        kernels = compiled(op, arch, dtype)
        assert kernels, op
        for kernel in kernels:
            assert kernel.spills == 0, (op, kernel)
            assert kernel.registers_of_a_program <= 65536, (op, kernel)
            assert kernel.shared <= SHARED[arch], (op, kernel)
            if op in ROW_OPS:
                assert kernel.wide_loads > 0, (op, kernel)


@pytest.mark.parametrize("arch", SOME_SLOWLY)
@pytest.mark.parametrize("op", MATRIX_OPS)
def test_products_are_by_matrix_instructions(compiled, op, arch):
    *_, kernel = compiled(op, arch, torch.bfloat16)
    assert kernel.matrix > 0, kernel
    assert kernel.asynchronous > 0, kernel


@pytest.mark.parametrize("arch", SOME_SLOWLY)
def test_the_blocks_products_are_too(compiled, arch):
    kernels = {kernel.name: kernel for kernel in compiled("run_blocks", arch, torch.bfloat16)}
    for name in ("block_project", "block_compress", "block_sparsify"):
        assert kernels[name].matrix > 0, kernels[name]
        assert kernels[name].asynchronous > 0, kernels[name]


@pytest.mark.parametrize("arch", SOME_SLOWLY[:2])
def test_narrow_rows_use_matrix_instructions_and_asynchronous_copies(compiled, arch):
    """The three launches are the first, one with a next block, and the last one."""
    kernels = [kernel for kernel in compiled("denoise", arch, torch.bfloat16) if kernel.name.startswith("narrow")]
    assert [kernel.name for kernel in kernels] == ["narrow_embed", "narrow_chain", "narrow_chain"]
    for kernel in kernels:
        assert kernel.matrix > 0, kernel
        assert kernel.asynchronous > 0, kernel


@pytest.mark.slow
def test_sizes_of_one_compile(codegen):
    """Triton turns arguments of 1 into constants. The interpreter does not, so only compiling shows such errors."""
    dtype = torch.bfloat16
    ops = *dict.fromkeys(codegen.launches(dtype, d=1, heads=1), 1).items(), ("run_blocks", 16), ("denoise", 16)
    for op, d in ops:
        assert codegen.compile_op(op, 90, dtype, batch=1, tokens=1, d=d, heads=1, genes=1, levels=1), op


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_every_candidate_fits_its_card(codegen, arch, monkeypatch):
    """Each candidate block size of an architecture compiles, fits in shared memory and does not spill."""
    from drylaunch import dry
    from wbdit.kernels import blocks as fused_blocks
    from wbdit.kernels import mssa, narrow

    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    with dry(arch):
        offered = [("mssa", mssa, blocks) for blocks in mssa.candidates(False, bf16, 96, cpu, tokens=200)]
        offered = [entry for entry in offered if entry[2] != mssa.WholeHead(168)]  # spills; it is for smaller heads
        offered += [("mssa_backward", mssa, blocks) for blocks in mssa.candidates(True, bf16, 96, cpu)]
        offered += [("run_blocks", fused_blocks, tiles) for tiles in fused_blocks.candidates(cpu)]
        offered += [("denoise", narrow, rows) for rows in narrow.candidates(cpu)]
    expected = {"mssa", "mssa_backward", "run_blocks"} | ({"denoise"} if arch != 100 else set())
    assert {op for op, *_ in offered} == expected
    for op, module, candidate in offered:
        with monkeypatch.context() as patched:
            patched.setattr(module, "candidates", lambda *_, only=candidate: (only,))
            for kernel in codegen.compile_op(op, arch, bf16, batch=1):
                assert kernel.spills == 0, (candidate, kernel)


def test_the_guards_fire(codegen, monkeypatch):
    """A block with too many rows spills registers; a block that is too large exceeds shared memory."""
    from triton.runtime.errors import OutOfResources
    from wbdit.kernels import mssa

    def only(blocks):
        monkeypatch.setattr(mssa, "candidates", lambda *_: (blocks,))

    only(mssa.Blocks(rows=128, columns=128, warps=4, stages=1))
    *_, kernel = codegen.compile_op("mssa_backward", 90, torch.bfloat16)
    assert kernel.spills > 0
    only(mssa.Blocks(rows=128, columns=256, warps=8, stages=6))
    with pytest.raises(OutOfResources):
        codegen.compile_op("mssa", 90, torch.bfloat16)


@pytest.mark.slow
def test_amd_compiles(codegen):
    """Compile for CDNA 3. No tool here reads the register count from such a binary."""
    from drylaunch import dry

    for op, launch in codegen.launches(torch.bfloat16).items():
        with dry("gfx942") as compiled:
            launch()
        assert compiled, op
        assert all("amdgcn" in kernel.asm for kernel in compiled), op


# dispatch


def test_without_triton_one_warning_and_the_reference():
    code = (
        "import sys; sys.modules['triton'] = None; import warnings, torch; "
        "from wbdit import ops; from wbdit.ops import reference, triton as engine; engine.register('cpu'); "
        "w = torch.randn(1, 4, 8); warnings.simplefilter('always'); "
        "outs = [ops.mssa(w, 2) for _ in range(3)]; "
        "assert torch.equal(outs[0], reference.mssa(w, 2)[0])"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no triton") == 1


@pytest.mark.parametrize("width", [1, 16, 20, 33, 48, 64, 80, 96, 100, 128])
def test_a_head_is_split_where_that_saves(width):
    from wbdit.kernels.mssa import split

    head, tail = split(width)
    assert head + tail >= width
    assert head + tail - width < max(16, width / 2)
    assert all(part == 0 or (part >= 16 and part & (part - 1) == 0) for part in (head, tail))


def test_kernels_have_names_of_their_own():
    """A profiler shows only the name of a kernel."""
    from triton.runtime.jit import JITFunction

    from wbdit import kernels

    modules = [importlib.import_module(f"wbdit.kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    sources = "".join(Path(module.__file__).read_text() for module in modules)
    functions = [
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.module == module.__name__
    ]
    launched = [name for name in functions if f"{name}[" in sources]
    assert len(launched) == len(set(launched)) > 10, sorted(launched)
    assert {"_mssa_forward", "_adaln_forward", "_block_project", "_block_half_step"} < set(launched)


@pytest.mark.parametrize("switch", ["torch.backends.cuda.matmul", "torch.backends"])
def test_products_follow_the_users_precision(switch):
    """Both of PyTorch's switches count: fp32_precision and the older allow_tf32."""
    code = (
        "import torch\nfrom wbdit.kernels import mssa\n"
        "w, (blocks,) = torch.empty(1, 2, 96), mssa.FORWARD_FP32[False]\n"
        "precision = lambda: mssa._options(blocks, w, 96)['PRECISION']\n"
        "assert precision() == 'ieee'\n"
        f"{switch}.fp32_precision = 'tf32'\n"
        "assert precision() == 'tf32'\n"
        f"{switch}.fp32_precision = 'ieee'\n"
        "assert precision() == 'ieee'\n"
        "torch.backends.cuda.matmul.allow_tf32 = True\n"
        "assert precision() == 'tf32'\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def made_up_card(monkeypatch, capability, shared):
    """Simulate a card for CUDA tensors; fake tensors need no GPU."""
    from wbdit.kernels import card

    from wbdit.ops import triton as engine

    for cached in (engine._is_served, engine._attends):
        cached.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(card, "card_of", lambda device: card.Card(shared, capability[0]))


@pytest.fixture
def fits(monkeypatch):
    """Return a function that tells whether attention, forward and backward, fits a simulated card."""
    from wbdit.ops import triton as engine

    def fits(capability, shared, dtype, width=96):
        made_up_card(monkeypatch, capability, shared)
        with FakeTensorMode():
            w = torch.empty(2, 200, 8 * width, dtype=dtype, device="cuda")
        return engine._fits("mssa", (w, 8)), engine._fits("mssa_backward", (w, w, w, w, 8))

    yield fits
    for cached in (engine._is_served, engine._attends):
        cached.cache_clear()


def test_attention_fits_what_the_card_has(fits):
    bf16, fp32 = torch.bfloat16, torch.float32
    assert fits((9, 0), 232448, bf16) == fits((8, 6), 101376, bf16) == (True, True)
    assert fits((9, 0), 232448, fp32) == fits((8, 6), 101376, fp32) == (True, False)  # PyTorch's backward is faster
    for dtype in (bf16, fp32):
        assert fits((7, 5), 65536, dtype) == (False, False)  # Triton does not support this architecture
        assert fits((8, 6), 16384, dtype) == (False, False)
    assert fits((8, 6), 36000, bf16) == (True, False)  # the backward reads twice as much


def test_tiles_never_exceed_the_card(monkeypatch):
    """A tile of 144 KB is not offered first on a card with 99 KB. If no tile fits, the blocks run op by op."""
    from wbdit.kernels import blocks as fused_blocks
    from wbdit.kernels import narrow

    bf16 = torch.bfloat16
    with FakeTensorMode():
        x, weights = torch.empty(2, 200, 256, device="cuda"), [torch.empty(256, 256, dtype=bf16, device="cuda")]
        ragged = [torch.empty(250, 256, dtype=bf16, device="cuda")]
        wider = [torch.empty(272, 256, dtype=bf16, device="cuda")]
    for capability, shared, rows, first in (
        ((9, 0), 232448, narrow.ROWS, fused_blocks.TILES[0]),
        ((10, 0), 232448, (), fused_blocks.TILES[0]),
        ((8, 0), 166912, narrow.ROWS, fused_blocks.TILES[1]),
        ((8, 6), 101376, narrow.ROWS, fused_blocks.TILES[1]),
        ((8, 6), 8192, (), fused_blocks.Unfused()),
    ):
        made_up_card(monkeypatch, capability, shared)
        offered = fused_blocks.ways(x, weights)
        assert offered[: len(rows)] == rows
        assert offered[len(rows)] == fused_blocks.ways(x, wider)[0] == first
        assert offered[-1] == fused_blocks.Unfused()
        assert fused_blocks.ways(x, ragged) == (fused_blocks.Unfused(),)


def test_a_gpu_is_asked_for_nothing_here():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.import_module("wbdit.ops.triton")


@pytest.mark.parametrize(
    ("op", "shapes", "fits"),
    [
        ("gated_adaln", [(1, 2, 8192)], True),
        ("gated_adaln", [(1, 2, 8193)], False),
        ("gated_adaln_backward", [(1,), (1,), (1, 2, 8193)], False),
        ("adaln_backward", [(1, 2, 8193)], False),
        ("sampler_step", [(1, 1, 60000)], True),
    ],
)
def test_rows_too_wide_for_registers_go_to_the_reference(op, shapes, fits):
    from wbdit.ops.triton import _fits

    assert _fits(op, tuple(torch.empty(shape, device="meta") for shape in shapes)) == fits


@pytest.mark.parametrize(("width", "heads", "fits"), [(768, 8, True), (768, 6, True), (768, 3, False)])
def test_heads_too_wide_go_to_the_reference(width, heads, fits):
    from wbdit.ops.triton import _fits

    assert _fits("mssa", (torch.empty(1, 2, width, device="meta"), heads)) == fits
