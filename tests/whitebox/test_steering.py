"""Heads that are turned: what changes in the network and in its cells, and what does not."""

import copy

import anndata as ad
import numpy as np
import pytest
import torch
from helpers import exit_code, make_cells, stirred, tiny_preset

import wbdit
from wbdit import ops
from wbdit.errors import InputError
from wbdit.network_inputs import conditioning_of
from wbdit.nn.activations import iterate_blocks, site
from wbdit.nn.heads import move, remove_atom, remove_head, remove_subspace, turnable
from wbdit.steering import axes_of_cells


@pytest.fixture(scope="module")
def cells():
    return make_cells(120, 80)


@pytest.fixture(scope="module")
def run(cells):
    generator = wbdit.fit(cells, label="type", steps=20, preset=tiny_preset(), progress=False)
    stirred(generator.denoiser)
    return generator


def changed(run, change, *arguments):
    """Return the generator with a changed copy of its network."""
    turned = run.with_model(copy.deepcopy(run.model))
    change(turned.denoiser, *arguments)
    return turned


def axes_of(run, cells):
    return axes_of_cells(run.model, run.schedule, run.preprocessor, cells)


def attended(generator, x):
    """Return the heads' joined outputs, and what the block adds to the stream before its gate."""
    model = generator.denoiser
    t = torch.full((len(x),), 600)
    seen = next(iterate_blocks(model, x, t, torch.zeros(len(x), dtype=torch.int64)))
    attention = model.blocks[0].attn
    return ops.mssa(attention.qkv(seen.before), 2), attention(seen.before)


@torch.no_grad()
def test_a_head_is_removed_from_the_sum(run):
    x = torch.randn(3, 1, 80)
    heads, whole = attended(run, x)
    own = run.denoiser.blocks[0].attn.out.weight[:, 8:] @ heads[..., 8:].mT
    _, rest = attended(changed(run, remove_head, 0, 1), x)
    torch.testing.assert_close(rest, whole - own.mT)
    assert own.abs().max() > 0.01


@torch.no_grad()
def test_a_subspace_may_be_that_of_a_head(run):
    x, basis = torch.randn(3, 1, 80), torch.eye(16)[:, 8:]
    one, other = changed(run, remove_subspace, 0, basis), changed(run, remove_head, 0, 1)
    torch.testing.assert_close(attended(one, x)[1], attended(other, x)[1])


@torch.no_grad()
def test_an_atom_is_gated_off(run):
    turned, t = changed(run, remove_atom, 0, 5), torch.tensor([600])
    before, after = (one.denoiser.modulations(t, torch.tensor([1]))[0] for one in (run, turned))
    assert before[5][0, 5] != 0
    assert after[5][0, 5] == 0
    after[5][0, 5] = before[5][0, 5]
    for part, same in zip(before, after, strict=True):
        torch.testing.assert_close(part, same)


@torch.no_grad()
def test_cells_are_moved_by_standard_deviations_along_the_axis(run, cells):
    (axes,) = axes_of(run, cells)
    assert all(abs(float(axis.direction.norm()) - 1) < 1e-5 and axis.deviation > 0 for axis in axes)
    x = torch.randn(3, 1, 80)
    one, other = attended(run, x)[1], attended(changed(run, move, [axes], {(0, 1): -2.0}), x)[1]
    step = run.denoiser.blocks[0].attn.out.weight[:, 8:] @ axes[1].direction
    torch.testing.assert_close(other - one, (-2 * axes[1].deviation * step).expand_as(one))


@torch.no_grad()
def test_an_axis_is_where_cells_differ_most(run, cells):
    (axes,) = axes_of(run, cells)
    x0 = torch.from_numpy(run.preprocessor.encode(cells))[:, None]
    t = torch.full((len(x0),), 500)
    alpha, sigma = run.schedule.levels(500)
    noised = alpha * x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    seen = next(
        iterate_blocks(run.denoiser, noised, t, conditioning=conditioning_of(run.model, run.preprocessor, cells))
    )
    w = run.denoiser.blocks[0].attn.qkv(site(run.denoiser, seen.before))[:, :8]
    along, across = (w @ axes[0].direction).std(), w.std(0).square().sum().sqrt()
    assert along > across / 8**0.5  # more than a direction on average has
    assert float(along) == pytest.approx(axes[0].deviation, rel=0.3)  # with other noise


def test_a_dose_of_zero_changes_no_bit(run):
    plain, still, far = (
        run.generate(20, calls=3, steer=steer) for steer in (None, {"block-1-head-2": 0}, {"block-1-head-2": 4.0})
    )
    np.testing.assert_array_equal(plain.X.toarray(), still.X.toarray())
    assert (plain.X != far.X).nnz > 0
    assert plain.obs.equals(far.obs)
    np.testing.assert_array_equal(plain.X.toarray(), run.generate(20, calls=3).X.toarray())  # the run is as it was


def test_what_was_steered_is_recorded(run, tmp_path):
    cells = run.generate(5, calls=2, steer={"block-1-head-1": 2})
    assert cells.uns["wbdit"]["steer"] == {"block-1-head-1": 2.0}
    assert cells.uns["wbdit"]["request"] != run.generate(5, calls=2).uns["wbdit"]["request"]
    path = run.generate_to(tmp_path / "cells.h5ad", 5, calls=2, steer={"block-1-head-1": 2})
    again = ad.read_h5ad(path)
    np.testing.assert_array_equal(again.X.toarray(), cells.X.toarray())
    assert again.uns["wbdit"]["steer"] == {"block-1-head-1": 2.0}


def test_the_command_steers_as_the_function_does(run, tmp_path):
    run.save(tmp_path / "run")
    command = ("generate", tmp_path / "run", "--n", 5, "--calls", 2, "--out", tmp_path / "cells.h5ad")
    assert exit_code(*command, "--steer", "block-1-head-1=2") == 0
    wanted = run.generate(5, calls=2, steer={"block-1-head-1": 2})
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "cells.h5ad").X.toarray(), wanted.X.toarray())
    assert exit_code(*command, "--overwrite", "--steer", "block-1-head-1") == 2


@pytest.mark.parametrize(
    ("steer", "told"),
    [
        ({"block-1-head-3": 1.0}, "the heads are block-1-head-1 to block-1-head-2"),
        ({"block-0-head-1": 1.0}, "names no head 'block-0-head-1'"),
        ({"head 1": 1.0}, "names no head 'head 1'"),
        ({"block-1-head-1": float("nan")}, "must be a dict of one finite number per head"),
        ({"block-1-head-1": "much"}, "must be a dict of one finite number per head"),
        ({1: 1.0}, "must be a dict of one finite number per head"),
        (1.5, "must be a dict of one finite number per head"),
    ],
)
def test_what_cannot_be_steered(run, steer, told):
    with pytest.raises(InputError, match=told):
        run.generate(5, calls=2, steer=steer)


def test_black_boxes_have_no_heads_to_turn(cells):
    generator = wbdit.fit(cells, label="type", steps=1, preset=tiny_preset("dit"), progress=False)
    with pytest.raises(InputError, match="DiT blocks"):
        generator.generate(5, steer={"block-1-head-1": 1.0})


def test_tied_heads_have_no_weights_of_their_own():
    model = wbdit.WBDiT(input_size=24, patch_size=4, hidden_size=16, num_heads=2, tie_out=True)
    with pytest.raises(InputError, match="no output weights"):
        turnable(model)
