"""The list of launches: every launch has a row with exact bytes, without a GPU."""

import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, tiny_preset

pytest.importorskip("triton")

BENCH = ROOT / "bench"
CELLS, TOKENS, WIDTH, HEADS, GENES = 64, 5, 16, 2, 50
MODULES = ("launch_list", "launch_tasks", "pretend", "recorder", "access", "roofline", "drylaunch", "codegen")
pytestmark = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="needs a process without the interpreter")


@pytest.fixture(scope="module")
def bench():
    """Return the command's modules by name."""
    from wbdit.ops import triton as engine

    path, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(BENCH))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path[:] = path
    for name in set(MODULES) - known:
        del sys.modules[name]
    for cached in (engine._is_served, engine._attends):  # they saw a GPU
        cached.cache_clear()


@pytest.fixture(scope="module")
def tiny(bench):
    """Return a function that lists a task of a published model of tiny sizes, once for all tests."""
    preset = tiny_preset("paper")
    model = bench.launch_tasks.Model(replace(preset, model={**preset.model, "patch_size": 10}), genes=GENES)
    card = bench.launch_list.Card(90, 4e12, 6e14, 50e6)
    found = {}

    def listing(task):
        if task not in found:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(bench.launch_tasks.MODELS, "small", model)
                found[task] = bench.launch_list.listing("small", task, CELLS, card, "unfused")
        return found[task]

    return listing


def test_every_launch_has_a_row(tiny):
    """One block op by op between the two ends: attention between two products, a half-step, a product, a half-step."""
    launches = tiny("forward").launches
    kernels = [launch.kernel for launch in launches]
    first = kernels.index("_embed_patches")
    half_step = ["aten::mm", "_adaln_forward"]
    block = ["aten::mm", "_mssa_forward", *half_step, *half_step]
    assert kernels[first:] == ["_embed_patches", *block, "_read_patches"]
    assert [launch.ours for launch in launches].count(True) == 5
    assert not any(launch.replayed for launch in launches)
    assert launches[first].grid == (2 * TOKENS, 1, 1)  # a program has half of the cells
    assert [row["number"] for row in tiny("forward").rows] == list(range(1, len(launches) + 1))


def test_the_bytes_of_our_kernels_are_exact(tiny):
    embed, attention, compress, sparsify, read_out = (launch for launch in tiny("forward").launches if launch.ours)
    tokens, row = 2 * CELLS * TOKENS * WIDTH, CELLS * WIDTH  # bytes of a bf16 token tensor; values of a modulation
    cells, patch = 4 * CELLS * GENES, GENES // TOKENS
    ends = 2 * WIDTH * patch  # bytes of a map, in bf16
    assert (embed.read, embed.written) == (cells + ends + 4 * WIDTH * (1 + TOKENS) + 2 * 2 * row, 2 * tokens)
    sums = 4 * CELLS * HEADS * TOKENS
    assert (attention.read, attention.written) == (tokens, tokens + sums)
    assert (compress.read, compress.written) == (2 * tokens + 3 * 2 * row + 4 * WIDTH, 2 * tokens)  # an fp32 bias
    assert (sparsify.read, sparsify.written) == (3 * tokens + 3 * 2 * row, tokens)  # nobody reads the last stream
    assert (read_out.read, read_out.written) == (tokens + ends + 4 * patch, cells)
    assert attention.flops == 2 * 2 * CELLS * TOKENS**2 * WIDTH
    assert embed.flops == read_out.flops == 2 * CELLS * GENES * WIDTH
    assert compress.flops == 0


def test_products_have_flops(tiny):
    products = [launch for launch in tiny("forward").launches if launch.kernel == "aten::mm"]
    assert [launch.flops for launch in products] == 3 * [2 * CELLS * TOKENS * WIDTH**2]


def test_the_flops_of_every_kernel_with_products_are_declared(bench):
    """A kernel multiplies matrices if its function, or one that it calls, does."""
    from triton.runtime.jit import JITFunction

    from wbdit import kernels

    modules = [importlib.import_module(f"wbdit.kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    functions = {name: f for m in modules for name, f in vars(m).items() if isinstance(f, JITFunction)}
    sources = {name: function.src for name, function in functions.items()}
    called = {name: set(re.findall(r"\w+", code)) & sources.keys() - {name} for name, code in sources.items()}

    def multiplies(name):
        return re.search(r"\bdot\(|mma\(", sources[name]) or any(map(multiplies, called[name]))

    launched = "".join(inspect.getsource(module) for module in modules)
    products = {name for name in sources if re.search(rf"\b{name}\[", launched) and multiplies(name)}
    assert products == bench.roofline.FLOPS.keys()


def test_a_step_is_what_a_graph_replays(tiny):
    """The read-out computes the sampler's update, and the tables were computed before."""
    launches, forward = tiny("step").launches, tiny("forward").launches
    first = next(i for i, launch in enumerate(forward) if launch.ours)
    assert [launch.kernel for launch in launches] == [launch.kernel for launch in forward[first:]]
    assert all(launch.replayed for launch in launches)
    # all cells share a row of modulations, and it counts once
    sparsify = [launch for launch in launches if launch.ours][3]
    assert sparsify.read == 3 * 2 * CELLS * TOKENS * WIDTH + 3 * 2 * WIDTH


def test_totals_add_up(tiny):
    found = tiny("step")
    rows, totals = found.rows, found.totals
    assert totals["launches"] == len(rows) == totals["ours"] + totals["pytorch"]
    assert totals["milliseconds"] == pytest.approx(sum(row["microseconds"] for row in rows) / 1e3)
    assert 0 < totals["milliseconds_with_cache"] < totals["milliseconds"]
    for row in rows:
        slowest = max((row["read"] + row["written"]) / 4e12, row["flops"] / 6e14)
        assert row["microseconds"] == pytest.approx(1e6 * slowest)
    # op by op, a block moves 17 token tensors, the last one 1 less; the ends move 3
    assert totals["token_tensors"] == 17 - 1 + 3


def test_what_is_printed(tiny, bench, capsys, monkeypatch):
    found = tiny("step")
    content = json.loads(bench.launch_list.as_json(found))
    assert content["totals"] == found.totals
    assert content["launches"] == found.rows
    _, *rows, _, counts, _, predicted = bench.launch_list.as_text(found)
    assert len(rows) == len(found.launches)
    assert counts.startswith(f"{len(rows)} launches: {found.totals['ours']} of ours")
    assert predicted.endswith("cost nothing")
    monkeypatch.setattr(bench.launch_list, "listing", lambda *given: found)
    page = list(bench.launch_list.as_markdown(CELLS, found.card, None))
    tables = [line for line in page if line.startswith("| ")]
    counts = [line.split(" | ")[0].strip("| ") for line in tables]
    assert sum(int(count) for count in counts if count.isdigit()) == 4 * len(rows)  # of four tasks


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--model", "big"], "'big'"), (["--cells", "0"], "0"), (["--into", "nowhere"], "nowhere")]
)
def test_wrong_input_is_one_line(bench, capsys, arguments, words):
    assert bench.launch_list.run(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert words in said.err


def test_a_page_without_marks_stays(bench, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("no marks")
    assert bench.launch_list.run(["--into", str(page)]) == 2
    assert page.read_text() == "no marks"
    launch_list = bench.launch_list
    page.write_text(f"before\n{launch_list.BEGIN}\nold\n{launch_list.END}\nafter\n")
    launch_list.put_between(page, iter(["new"]))
    assert page.read_text() == f"before\n{launch_list.BEGIN}\n\nnew\n\n{launch_list.END}\nafter\n"


def test_pytorchs_ops_count_if_they_run_a_kernel(bench):
    with bench.pretend.gpu(90) as recorder, torch.no_grad():
        x = torch.empty(6, 4, device="cuda:0")
        with recorder.recording():
            x.t()[0].expand(3, 6).view(-1, 6)
            torch.empty_like(x), torch.arange(3), x[:0] + 1
            assert not recorder.launches
            x[:, :1].expand(6, 4) + x.bfloat16()
            x.copy_(torch.ones(6, 4))
            torch.addmm(x[:4], x[:4, :], x[:4]).zero_()
    kernels = [(launch.kernel, launch.read, launch.written, launch.flops) for launch in recorder.launches]
    assert kernels == [
        ("aten::_to_copy", 96, 48, 0),
        ("aten::add", 24 + 48, 96, 0),
        ("aten::copy_", 0, 96, 0),  # from the host
        ("aten::copy_", 64, 64, 0),  # addmm adds to a copy
        ("aten::addmm", 128, 64, 2 * 4**3),
        ("aten::zero_", 0, 64, 0),
    ]


def test_a_wait_for_the_gpu_is_named(bench):
    with bench.pretend.gpu(90), pytest.raises(RuntimeError, match="the host would wait"):
        float(torch.empty(1, device="cuda:0"))


def test_a_graph_replays_what_it_captured(bench):
    with bench.pretend.gpu(90) as recorder:
        x = torch.empty(4, device="cuda:0")
        with recorder.recording():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                x.mul_(2)
            assert not recorder.launches
            x.add_(1)
            graph.replay()
            graph.replay()
    assert [launch.kernel for launch in recorder.launches] == ["aten::add_", "aten::mul_", "aten::mul_"]
    assert [launch.replayed for launch in recorder.launches] == [False, True, True]


def test_the_cache_drops_what_was_used_longest_ago(bench):
    operand, launch = bench.recorder.Operand, bench.recorder.Launch

    def moves(reads, writes):
        parts = [tuple(operand(storage, 0, 1, 10) for storage in storages) for storages in (reads, writes)]
        return launch("kernel", True, None, *parts, 0.0, False)

    launches = [moves([1], [2]), moves([2], [3]), moves([1, 3], [4]), moves([2], [])]
    assert bench.launch_list.from_cache(launches, 30) == [0, 10, 20, 0]
    assert bench.launch_list.from_cache(launches, 10) == [0, 10, 10, 0]


def test_accesses_are_followed_through_loops(bench):
    """`a` and `b` are advanced in a loop, where `a` is read and `b` written; `c` or `d` is updated; `e` is not used."""
    pointers = ", ".join(f"%{name}: !tt.ptr<f32> loc(#loc)" for name in "abcde")
    code = f"""module {{
  tt.func public @_kernel({pointers}, %n: i32) attributes {{noinline = false}} {{
    %0 = tt.splat %a : !tt.ptr<f32> -> tensor<8x!tt.ptr<f32>>
    %1:2 = scf.for %i = %z to %n step %o iter_args(%p = %0, %q = %b) -> (tensor<8x!tt.ptr<f32>>, !tt.ptr<f32>)  : i32 {{
      %x = tt.load %p : tensor<8x!tt.ptr<f32>>
      %y = "tt.reduce"(%x) <{{axis = 0 : i32}}> ({{
      ^bb0(%l: f32 loc(unknown), %r: f32 loc(unknown)):
        %s = arith.addf %l, %r : f32
        tt.reduce.return %s : f32
      }}) : (tensor<8xf32>) -> f32
      tt.store %q, %y : !tt.ptr<f32>
      %next = tt.addptr %p, %i : tensor<8x!tt.ptr<f32>>, tensor<8xi32>
      %after = tt.addptr %q, %i : !tt.ptr<f32>, i32
      scf.yield %next, %after : tensor<8x!tt.ptr<f32>>, !tt.ptr<f32>
    }} loc(#loc2)
    %2 = scf.if %cond -> (!tt.ptr<f32>) {{
      scf.yield %c : !tt.ptr<f32>
    }} else {{
      scf.yield %d : !tt.ptr<f32>
    }} loc(#loc3)
    %3 = tt.atomic_rmw fadd, acq_rel, gpu, %2, %y2, %true : (!tt.ptr<f32>, f32, i1) -> f32
    tt.store %1#1, %3 : !tt.ptr<f32>
    tt.return
  }}
}}"""
    access = bench.access.read_access(code)
    assert access.reads == (True, False, True, True, False)
    assert access.writes == (False, True, True, True, False)
    assert not access.multiplies
    assert bench.access.read_access(code.replace("arith.addf", "tt.dot")).multiplies


# slow: every kernel is compiled


@pytest.fixture(scope="module")
def recorded(bench):
    """Return a function that records an op, by default for the published sizes."""

    def record(op, dtype=torch.bfloat16, **sizes):
        with bench.pretend.gpu(90) as recorder, torch.no_grad():
            launch = bench.codegen.launches(dtype, device="cuda:0", **sizes)[op]
            with recorder.recording():
                launch()
        return recorder

    return record


@pytest.mark.slow
def test_no_byte_and_no_product_is_missed(bench, recorded):
    """Each tensor of each kernel is read or written, and the FLOPs of each kernel with products are known."""
    seen = set()
    for dtype in (torch.bfloat16, torch.float32):
        for op in bench.codegen.launches(dtype, batch=1):
            recorder = recorded(op, dtype)
            for kernel, access in recorder._access.values():
                kinds = kernel.src.signature
                tensors = [name for name in kinds if kinds[name].startswith(("*", "tensordesc"))]
                for name, *used in zip(tensors, access.reads, access.writes, strict=True):
                    # this one is loaded, but the compiler finds that nothing depends on it
                    assert any(used) or (kernel.metadata.name, name) == ("_block_project", "center_ptr"), name
            for launch in recorder.launches:
                seen.add(launch.kernel)
                assert launch.flops is not None, launch.kernel
    assert len([kernel for kernel in seen if kernel.startswith("_")]) > 15


@pytest.mark.slow
def test_the_costs_by_hand_are_those_of_the_launches(bench, recorded):
    """Modulations and sums over rows are not in the costs by hand: up to 4 % of the published size's bytes."""
    published = bench.roofline.Shape(1024, 200, 768, 8, 2000)
    for op, by_hand in bench.roofline.costs(published).items():
        if by_hand.bytes < 2e8:
            continue  # codegen.py gives these one tensor as several arguments, which here counts once
        if op.startswith("block_"):
            found = [one for one in recorded("run_blocks", batch=1024).launches if one.kernel == f"_{op}"][:1]
        else:
            found = [one for one in recorded(op, batch=1024).launches if one.ours]
        assert sum(one.cost.bytes for one in found) == pytest.approx(by_hand.bytes, rel=0.05), op
        assert sum(one.flops for one in found) == by_hand.flops, op


@pytest.mark.slow
def test_all_steps(tiny):
    kernels = [launch.kernel for launch in tiny("sampling").launches]
    assert kernels.count("_sampler_step") == 50  # the published sampler's calls
    assert kernels[0] == "aten::_to_copy"  # the cells' numbers go to the GPU


@pytest.mark.slow
def test_a_training_step():
    """In a process of its own, since autograd starts a thread for the GPU."""
    command = [
        sys.executable,
        BENCH / "launch_list.py",
        "--model",
        "small",
        "--task",
        "train",
        "--cells",
        "64",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = [row["kernel"] for row in json.loads(done.stdout)["launches"]]
    for kernel, count in (("_mssa_backward", 3), ("_adaln_backward", 7), ("_noising", 1), ("_count_likelihood", 2)):
        assert kernels.count(kernel) == count, kernel
    assert kernels[-2:] == ["aten::_fused_adamw_", "aten::_foreach_lerp_"]
