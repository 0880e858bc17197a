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
from wbdit.nn.activations import iterate_blocks
from wbdit.nn.heads import head_axes, places, remove_atom, remove_head, remove_subspace


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


def test_a_dose_is_the_length_of_the_shift(run):
    shifts = run.head_directions.shifts
    assert shifts.shape == (1, 2, 80)
    np.testing.assert_allclose(np.linalg.norm(shifts, axis=-1), 1)
    both = run._shift({"block-1-head-1": 2.0, "block-1-head-2": -1.0})
    np.testing.assert_allclose(both, 2 * shifts[0, 0] - shifts[0, 1], atol=1e-6)


@torch.no_grad()
def test_a_loading_is_what_a_gene_adds_to_the_place(run):
    """Without the norm, whose scale differs between cells, a cell's place is linear in its genes."""
    model = run.denoiser
    x, t = torch.randn(60, 1, 80), torch.full((60,), 500)
    axes = head_axes(model, x, t, None)
    found = places(model, axes, x, t, None)[0]
    told = (x[:, 0] @ axes.loadings[0].T).T
    for one, other in zip(found, told, strict=True):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.8
    assert (axes.directions.norm(dim=-1) - 1).abs().max() < 1e-5


def test_cells_move_the_way_of_the_dose(cells):
    """A Gaussian of two programs: the head's axis is one of them, and generated cells move along it."""
    rng = np.random.default_rng(0)
    program = rng.normal(size=400)[:, None] * np.where(np.arange(40) < 10, 1.0, 0.0)
    counts = rng.poisson(np.exp(1.5 + 0.8 * program))
    real = ad.AnnData(counts.astype(np.float32), obs={"type": np.repeat(["B"], 400)})
    generator = wbdit.fit(real, label="type", epochs=40, preset=tiny_preset(), progress=False)
    program_of = [
        np.log1p(generator.generate(256, steer={"block-1-head-1": dose}).X.toarray())[:, :10].mean()
        for dose in (-3.0, 0.0, 3.0)
    ]
    steps = np.diff(program_of)
    assert abs(steps.sum()) > 0.3
    assert steps.min() * steps.max() > 0


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
        remove_head(model, 0, 1)


def test_noise_of_a_sampler_would_hide_the_shift(run):
    with pytest.raises(InputError, match="use `sampler` unipc or dpmpp"):
        run.generate(5, steer={"block-1-head-1": 1.0}, sampler="ddim")
