"""The network beside the Gaussians that sampling starts from: shares by the formulas, estimates after blocks."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers import make_cells, spreading, stirred, tiny_preset

import wbdit
from wbdit.network_inputs import embedding_of, noise_levels
from wbdit.report.explain import write_explanation
from wbdit.samplers.noise import PhiloxNoise
from wbdit.whitebox import closed_form
from wbdit.whitebox.closed_form import closed_form_shares, estimates
from wbdit.whitebox.explain import explain
from wbdit.whitebox.findings import findings

QUESTION = "Does the network do more than a Gaussian of each label?"


@pytest.fixture(scope="module")
def cells():
    return spreading(300)


@pytest.fixture(scope="module")
def run(cells):
    preset = tiny_preset()
    preset = dataclasses.replace(preset, model={**preset.model, "depth": 2})
    return wbdit.fit(cells, label="type", preset=preset, steps=20, seed=0, progress=False)


@pytest.fixture(scope="module")
def readout(run, cells):
    return explain(run, cells, cells=40)


def test_the_last_estimate_is_the_models(run, cells):
    x = torch.randn(5, 1, cells.n_vars, generator=torch.Generator().manual_seed(0))
    t, given = torch.tensor([5, 300, 500, 850, 999]), embedding_of(run.model, run.preprocessor, cells[:5])
    model = copy.deepcopy(run.model)
    stirred(model.denoiser)  # trained for so few steps, the blocks do next to nothing
    found = estimates(model, x, t, given)
    assert len(found) == 3
    wanted = model(x, t, conditioning=given)
    torch.testing.assert_close(found[-1], wanted, rtol=1e-4, atol=1e-4)
    assert (found[-2] - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{}, {"cell_token": True, "n_outputs": 2}])
def test_the_final_layer_after_the_last_block_gives_the_output(options):
    model = stirred(wbdit.WBDiT(40, 8, hidden_size=16, depth=2, num_heads=2, **options)).double()
    x, t = torch.randn(3, 1, 40, dtype=torch.float64), torch.tensor([5, 500, 900])
    with torch.no_grad():
        *_, last = closed_form.iterate_blocks(model, x, t)
        out = model.read_out(wbdit.ops.adaln(last.stream, *model.modulations(t)[-1]))
        torch.testing.assert_close(out, model(x, t), rtol=1e-6, atol=1e-6)


def test_shares_are_those_of_the_formulas(run, cells):
    """Estimates of single cells, by dense matrices in fp64."""
    cells, levels, n = cells[:7], noise_levels(run.schedule, run.model.stop), 7
    shares = closed_form_shares(run, cells, levels, seed=3)
    assert shares.timesteps == tuple(levels[1:])
    assert shares.start == 850
    x0 = torch.from_numpy(run.preprocessor.encode(cells)).double()
    given, noise = embedding_of(run.model, run.preprocessor, cells), PhiloxNoise(3, torch.arange(n), (1, cells.n_vars))
    mean = run.model(noise(0), torch.full((n,), 999), conditioning=given)[:, 0].double()
    gaussians, eye = run.model.gaussians, torch.eye(cells.n_vars, dtype=torch.float64)
    axes, roots = gaussians.axes.double(), gaussians.roots.double()
    for row in (0, len(levels) - 2):
        t = levels[row + 1]
        (alpha, sigma), times = run.schedule.levels(t), torch.full((n,), t)
        x = run.schedule.noising(x0.float()[:, None], times, noise(row + 1))
        closed = mean.clone()
        for cell, label in enumerate(cells.obs["type"]):
            own = 1 + ["a", "b"].index(label)
            covariance = axes.T @ roots[own] @ roots[own].T @ axes + torch.diag(gaussians.variances[own].double())
            gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * eye)
            closed[cell] += gain @ (x[cell, 0].double() - alpha * mean[cell])
        network = run.model(x, times, conditioning=given)[:, 0].double()

        def distance(one, other):
            return float((one - other).square().sum())

        whole = distance(x0, mean)
        assert shares.gaussian[row] == pytest.approx(1 - distance(x0, closed) / whole, abs=1e-4)
        assert shares.network[row, -1] == pytest.approx(1 - distance(x0, network) / whole, abs=1e-4)
        of_update = 1 - distance(network, closed) / distance(network, mean)
        assert shares.of_update[row, -1] == pytest.approx(of_update, abs=1e-3)
    gains = (x0 - closed).square().sum(0) - (x0 - network).square().sum(0)
    np.testing.assert_allclose(shares.gene_gains, gains, rtol=1e-3, atol=1e-3)
    assert [row["gene"] for row in shares.top_genes(3)] == [f"{int(i)}" for i in gains.argsort(descending=True)[:3]]
    assert shares.gain[-1] == pytest.approx(float(gains.sum()) / whole, abs=1e-4)


def test_a_batch_of_cells_is_compared_as_all_are(run, cells, monkeypatch):
    levels = [999, 700, 500]
    whole = closed_form_shares(run, cells[:30], levels)
    monkeypatch.setattr(closed_form, "BATCH", 7)
    parts = closed_form_shares(run, cells[:30], levels)
    for name in ("network", "gaussian", "error", "of_update", "sizes", "gene_network"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-3, atol=1e-5)


def test_the_standard_error_is_that_of_other_cells(run, cells):
    """The standard error of the gain against its deviation over disjoint sets of cells."""
    sets = [closed_form_shares(run, cells[i::10], [999, 500], seed=i) for i in range(10)]
    spread = np.std([one.gain[0] for one in sets], ddof=1)
    assert np.mean([one.error[0] for one in sets]) == pytest.approx(spread, rel=0.6)


def test_the_page_shows_it(readout, tmp_path):
    page = write_explanation(readout, tmp_path, title="run").read_text()
    assert "Beside a Gaussian of each label" in page
    kept = json.loads((tmp_path / "explain.json").read_text())["closed_form"]
    assert kept["timesteps"] == list(readout.timesteps[1:])
    assert np.shape(kept["share_of_update"]) == np.shape(kept["share_of_cells"]["network"]) == (7, 3)
    assert np.shape(kept["size_of_block_updates"]) == (7, 2)
    assert all(f'<th scope="row">{row["gene"]}</th>' in page for row in kept["genes"])
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"closed-form.svg", "closed-form-cells.svg", "closed-form-update.svg"} <= figures
    assert page.count("<svg") == len(figures)


def test_the_finding_follows_the_shares(readout):
    shares = readout.closed_form

    def finding(gain):
        network = np.repeat((shares.gaussian + gain)[:, None], 3, axis=1)
        changed = dataclasses.replace(shares, network=network, error=np.full(7, 0.01))
        (found,) = [one for one in findings(dataclasses.replace(readout, closed_form=changed)) if one[0] == QUESTION]
        return found

    assert finding(np.full(7, 0.03)).verdict == "yes"
    assert finding(np.full(7, 0.01)).verdict == "no"
    lower = finding(np.where(np.array(shares.timesteps) < 600, 0.03, -0.1))
    assert lower.verdict == "in part"
    assert "only at t = 571, 500" in lower.answer
    # above the start of sampling, the network is not used
    assert finding(np.where(np.array(shares.timesteps) > 850, -0.1, 0.03)).verdict == "yes"


def test_runs_without_gaussians_have_none():
    cells = make_cells(120, 80)
    run = wbdit.fit(cells, label="type", preset=tiny_preset(), steps=2, progress=False)
    readout = explain(run, cells, cells=20)
    assert readout.closed_form is None
    assert "closed_form" not in readout.to_dict()
    assert QUESTION not in [one.question for one in findings(readout)]
