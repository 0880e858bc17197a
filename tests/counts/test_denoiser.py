"""The count likelihood: Bayes' rule by hand, count bins, label rates, drawn counts, and a trained model."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import wbdit
from wbdit import NoiseSchedule, WBDiT
from wbdit.counts import init
from wbdit.counts.bins import CountBins
from wbdit.counts.denoiser import CountDenoiser, FixedLibrary
from wbdit.counts.likelihood import CountLikelihood
from wbdit.data.cell_matrix import MemoryMatrix
from wbdit.data.statistics import Statistics, training_groups
from wbdit.ops import reference

GENES, NOISE_STEPS = 12, 1000


@pytest.fixture
def cells():
    """Return counts ``(200, 12)`` of two types with varying library sizes, and label codes ``(200, 1)``."""
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2
    rates = np.stack([rng.gamma(1, 3, GENES), rng.gamma(1, 3, GENES)])[y]
    return rng.poisson(rates * rng.gamma(8, 1 / 8, (200, 1))).astype(np.float32), y[:, None]


def model_of(counts, codes, sizes=(2,), **options):
    center = np.log1p(counts).mean(0)
    torch.manual_seed(0)
    denoiser = WBDiT(counts.shape[1], 4, hidden_size=16, num_heads=2, label_sizes=sizes, **options)
    levels = len(CountBins.up_to(counts.max()).lowest)
    model = CountDenoiser(denoiser, CountLikelihood(counts.shape[1], levels, NOISE_STEPS), NoiseSchedule(kind="cosine"))
    model.init_from_data(MemoryMatrix(counts), codes, center, 0.5)
    return model.eval()


def label_rates(counts, codes, sizes, strength=1.0):
    found = Statistics.of(MemoryMatrix(counts), "log1p", training_groups(codes, sizes))
    return init.label_rates(counts.sum(0, dtype=np.float64), found.sums, codes, found.totals, strength)


@torch.no_grad()
def probabilities(model, x, t, conditioning):
    """Return the probability of each level ``(B, G, L)``."""
    given = model._posterior(x, t, *model._answer(x, t, conditioning))
    return reference.count_logits(*given)[0].softmax(-1)


def test_levels_hold_every_count_once():
    levels = CountBins.up_to(300)
    every = np.arange(levels.highest[-1] + 1)
    found = levels.of(every)
    assert levels.highest[-1] >= 1.3 * 300
    assert (levels.lowest[found] <= every).all()
    assert (every <= levels.highest[found]).all()
    np.testing.assert_array_equal(levels.lowest[1:], levels.highest[:-1] + 1)
    np.testing.assert_array_equal(levels.of(np.arange(10)), np.arange(10))


@pytest.mark.parametrize("largest", [1, 12, 5e3, 1e6, 1e9])
def test_there_are_never_too_many_levels(largest):
    levels = CountBins.up_to(largest)
    assert len(levels.lowest) <= 64
    assert levels.highest[-1] >= 1.3 * largest


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_levels_of_noise_as_tensors(kind, dtype):
    schedule = NoiseSchedule(kind=kind)
    t = torch.tensor([0, 1, 500, 998, 999]).to(dtype)
    t = t + 0.3 * (t < 999) if dtype == torch.float32 else t
    found = torch.stack(schedule.level_tensors(t), 1)
    torch.testing.assert_close(found, torch.tensor([schedule.levels(one) for one in t.tolist()]), rtol=1e-5, atol=1e-6)


def test_the_prior_begins_as_negative_binomials(cells):
    """Before training, the prior is each gene's own negative binomial at no signal, and nearly Poisson at no noise."""
    counts, codes = cells
    model = model_of(counts, codes)
    known = model.likelihood
    dense = known.lowest == known.highest
    for end, size in ((0, 20.0), (1, None)):
        for gene in range(GENES):
            mean = counts[:, gene].mean() + 1e-4
            r = size or float(known.log_size[1, gene].exp())
            eta = np.log(mean / (mean + r))
            got = known.prior[end, gene, dense].detach().numpy() + eta * known.lowest[dense].numpy()
            want = stats.nbinom.logpmf(known.lowest[dense].numpy(), r, r / (r + mean))
            np.testing.assert_allclose(got - got[0], want - want[0], atol=2e-3)


def test_the_posterior_is_bayes_rule(cells):
    """Compare the denoiser's mean and likelihood with prior times density, computed with scipy."""
    counts, codes = cells
    model = model_of(counts, codes).double()
    known = model.likelihood
    t = torch.tensor([400, 700])
    x = torch.randn(2, 1, GENES, dtype=torch.float64)
    with torch.no_grad():
        model.label_dispersion.normal_()
    given = model.embed(torch.tensor([0, 1]), torch.tensor([3.0, 4.0], dtype=torch.float64))
    levels = torch.from_numpy(
        known_levels := CountBins.of(CountBins(known.lowest.numpy(), known.highest.numpy()), counts[:2])
    )
    mean, nll = model(x, t, conditioning=given), model.nll(x, t, given, levels).detach()
    rates, shapes = given[:, 16:].chunk(2, dim=1)  # the untrained denoiser outputs zero
    torch.testing.assert_close(shapes, model.label_dispersion[:2])
    eta, weight = (term.detach() for term in known.terms(rates, shapes, t))
    for cell in range(2):
        alpha, sigma = model.schedule.levels(int(t[cell]))
        for gene in range(GENES):
            size = int(known.n_levels[gene])
            w = float(weight[cell, gene])
            shape = (1 - w) * known.prior[0, gene, :size] + w * known.prior[1, gene, :size]
            middle = (known.lowest + known.highest)[:size].numpy() / 2
            values = known.values[gene, :size].numpy()
            log_p = shape.detach().numpy() + float(eta[cell, gene]) * middle
            log_p = log_p + stats.norm.logpdf(float(x[cell, 0, gene]), alpha * values, sigma)
            p = np.exp(log_p - log_p.max())
            p /= p.sum()
            assert float(mean[cell, 0, gene]) == pytest.approx(p @ values, rel=1e-4, abs=1e-5)
            assert float(nll[cell, gene]) == pytest.approx(-np.log(p[known_levels[cell, gene]]), rel=1e-4, abs=1e-5)


def test_counts_are_drawn_from_the_posterior(cells):
    counts, codes = cells
    model = model_of(counts, codes)
    n = 20_000
    x = torch.zeros(n, 1, GENES)
    t = torch.full((n,), 700)
    given = model.embed(torch.zeros(1, dtype=torch.long), torch.tensor([3.5])).expand(n, -1)
    u = torch.rand(n, GENES, generator=torch.Generator().manual_seed(0))
    middle = (model.likelihood.lowest + model.likelihood.highest) / 2
    p = probabilities(model, x[:1], t[:1], given[:1])[0]
    own = (p @ middle).sum().expand(n)  # the expected library size, so that `draw` leaves the rates unchanged
    drawn, p = model.draw(x, t, given, u, own).numpy(), p.numpy()
    lowest, highest = model.likelihood.lowest.numpy(), model.likelihood.highest.numpy()
    for gene in range(GENES):
        seen = np.bincount(CountBins(lowest, highest).of(drawn[:, gene]), minlength=len(lowest)) / n
        np.testing.assert_allclose(seen, p[gene], atol=0.015)
    assert (np.diff(drawn[np.argsort(u[:, 0].numpy()), 0]) >= 0).all()  # counts increase with u


def test_counts_are_drawn_in_fp32_whatever_the_denoiser_computes_in(cells, monkeypatch):
    """Under bf16 autocast the denoiser's output may change, but counts drawn from equal outputs may not."""
    model, n = model_of(*cells), 2000
    answer = torch.randn(n, GENES), torch.rand(n, GENES)
    monkeypatch.setattr(model, "_answer", lambda *given: answer)
    x, u, library = torch.randn(n, 1, GENES), torch.rand(n, GENES), torch.full((n,), 40.0)
    given = x, torch.full((n,), 500), torch.empty(n, 0), u, library
    exact = model.draw(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.draw(*given), exact)


def test_bins_are_drawn_evenly():
    """All counts within one bin are equally likely."""
    counts = np.tile(np.array([[0.0, 200.0]], np.float32), (50, 1))
    model = model_of(counts, np.zeros((50, 0), np.int64), sizes=())
    n = 6000
    u = torch.linspace(1e-4, 1 - 1e-4, n)[:, None].expand(n, 2)
    x = ((torch.log1p(torch.tensor(200.0)) - float(np.log1p(200))) / 0.5).expand(n, 1, 2).clone()
    given = model.embed(None, torch.full((n,), 5.3))
    drawn = model.draw(x, torch.full((n,), 100), given, u, torch.full((n,), 200.0))[:, 1].numpy()
    levels = CountBins(model.likelihood.lowest.numpy(), model.likelihood.highest.numpy())
    at = levels.of(np.array([200]))[0]
    inside = drawn[(drawn >= levels.lowest[at]) & (drawn <= levels.highest[at])]
    share = np.bincount(inside - levels.lowest[at]) / len(inside)
    assert len(share) == levels.highest[at] - levels.lowest[at] + 1
    np.testing.assert_allclose(share, 1 / len(share), rtol=0.1)


def test_drawn_counts_add_up_to_the_library_size(cells):
    counts, codes = cells
    model = model_of(counts, codes)
    n = 2000
    x, t = torch.randn(n, 1, GENES), torch.full((n,), 700)
    library = torch.linspace(20, 60, n)
    given = model.embed(torch.zeros(n, dtype=torch.long), torch.full((n,), 3.6))
    u = torch.rand(n, GENES, generator=torch.Generator().manual_seed(0))
    totals = model.draw(x, t, given, u, library).sum(1).numpy()
    assert np.polyfit(library.numpy(), totals, 1)[0] == pytest.approx(1, abs=0.05)
    assert totals.mean() == pytest.approx(40, rel=0.03)


def test_labels_have_spreads_of_their_own():
    """A gene has equal means in two labels, but is nearly Poisson in one and mostly zero in the other."""
    rng = np.random.default_rng(0)
    y = np.arange(400) % 2
    spread = np.where(y == 0, 1.0, 8.0 * (rng.random(400) < 1 / 8))
    counts = rng.poisson(np.stack([4 * spread, np.full(400, 40.0)], 1)).astype(np.float32)
    model = model_of(counts, y[:, None])
    known, t, labels = model.likelihood, torch.full((400,), 999), torch.from_numpy(y)
    levels = torch.from_numpy(CountBins(known.lowest.numpy(), known.highest.numpy()).of(counts))
    x, log_library = torch.randn(400, 1, 2), torch.from_numpy(counts.sum(1)).log()

    def zeros_and_loss():
        given = model.embed(labels, log_library)
        zeros = probabilities(model, x, t, given)[:, 0, 0]
        means = [float(zeros[labels == label].mean()) for label in (0, 1)]
        return means, model.nll(x, t, given, levels).mean()

    zeros, loss = zeros_and_loss()
    loss.backward()
    assert abs(zeros[0] - zeros[1]) < 0.05
    assert (model.label_dispersion.grad[:2, 0] != 0).all()
    with torch.no_grad():
        model.label_dispersion[:2, 0] = torch.tensor([-12.0, 0.0])
    zeros, better = zeros_and_loss()
    assert zeros[0] == pytest.approx((counts[y == 0, 0] == 0).mean(), abs=0.03)
    assert zeros[1] > 0.4
    assert better < loss - 0.2


def test_a_cell_has_spreads_of_its_own(cells):
    """The second output channel adds to the labels' dispersion, leaves the rates alone, and gets gradients."""
    counts, codes = cells
    one, two = model_of(counts, codes), model_of(counts, codes, n_outputs=2)
    x, t, y = torch.randn(9, 1, GENES), torch.full((9,), 700), torch.from_numpy(codes[:9, 0])
    log_library = torch.from_numpy(counts[:9].sum(1)).log()
    (rates, shapes), (own_rates, own_shapes) = (
        model._answer(x, t, model.embed(y, log_library)) for model in (one, two)
    )
    torch.testing.assert_close(own_rates, rates)  # the untrained denoiser outputs zero
    torch.testing.assert_close(own_shapes, shapes)
    with torch.no_grad():
        two.denoiser.final_layer.linear.weight.normal_(std=0.1)
    given = two.embed(y, log_library)
    answer = two.denoiser(x, t, conditioning=given[:, :16])
    own_rates, own_shapes = two._answer(x, t, given)
    torch.testing.assert_close(own_rates, rates + answer[:, 0])
    torch.testing.assert_close(own_shapes, shapes + answer[:, 1])
    assert answer[:, 1].std(0).min() > 1e-3  # varies between cells
    levels = torch.from_numpy(CountBins(two.likelihood.lowest.numpy(), two.likelihood.highest.numpy()).of(counts[:9]))
    (gradient,) = torch.autograd.grad(two.nll(x, t, given, levels).mean(), two.denoiser.final_layer.linear.bias)
    assert (gradient != 0).all()


def test_gradients_are_the_same_twice():
    """With two threads, and without asking PyTorch for deterministic algorithms, as users train."""
    counts, codes = np.random.default_rng(0).poisson(1.0, (256, 1000)).astype(np.float32), np.arange(256)[:, None] % 2
    model = model_of(counts, codes).train()
    known, x, t = model.likelihood, torch.randn(256, 1, 1000), torch.randint(0, NOISE_STEPS, (256,))
    levels = torch.from_numpy(CountBins(known.lowest.numpy(), known.highest.numpy()).of(counts))
    y, log_library, found = torch.from_numpy(codes), torch.from_numpy(counts.sum(1)).log(), []
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(2)
    try:
        for _ in range(10):
            torch.manual_seed(0)
            model.zero_grad()
            model.nll(x, t, model.embed(y, log_library), levels).mean().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    finally:
        torch.set_num_threads(threads)
    for name, gradient in found[0].items():
        assert all(torch.equal(gradient, again[name]) for again in found), name


def test_label_rates_are_ratios_of_counts(cells):
    counts, codes = cells
    rates = label_rates(counts, codes, [2], strength=1e-9)
    share = counts.sum(0) / counts.sum()
    for label in range(2):
        inside = counts[codes[:, 0] == label]
        np.testing.assert_allclose(np.exp(rates[label]), inside.sum(0) / inside.sum() / share, rtol=1e-4, atol=1e-6)
    assert (rates[2] == 0).all()
    shrunk = label_rates(counts, codes, [2], strength=1e6)
    assert abs(shrunk).max() < 1e-3


def test_label_rates_of_two_columns_multiply():
    """Both rates are recovered from counts generated as type rate times condition rate."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, [3, 2], (4000, 2))
    effects = [rng.normal(0, 0.5, (3, 8)), rng.normal(0, 0.5, (2, 8))]
    counts = rng.poisson(20 * np.exp(effects[0][codes[:, 0]] + effects[1][codes[:, 1]])).astype(np.float32)
    rates = label_rates(counts, codes, [3, 2], strength=1e-9)
    first, second = rates[:3], rates[4:6]

    # effects are identifiable up to a constant per gene and a constant per label (the library size)
    def contrast(table):
        differences = table[1:] - table[:1]
        return differences - differences.mean(1, keepdims=True)

    for found, true in ((first, effects[0]), (second, effects[1])):
        np.testing.assert_allclose(contrast(found), contrast(true), atol=0.05)


def test_conditions_without_labels_are_of_the_depth_alone(cells):
    counts, codes = cells
    model = model_of(counts, codes)
    log_library = torch.tensor([3.0, 5.0])
    free, null = model.embed(None, log_library), model.embed(torch.full((2,), 2), log_library)
    torch.testing.assert_close(free[:, 16:], null[:, 16:])
    torch.testing.assert_close(free[1, 16 : 16 + GENES] - free[0, 16 : 16 + GENES], torch.full((GENES,), 2.0))


def test_guidance_at_a_depth(cells):
    """A guided model repeats each cell's library size for each guidance term."""
    counts, codes = cells
    model = model_of(counts, codes)
    torch.nn.init.normal_(model.denoiser.final_layer.linear.weight)
    at = FixedLibrary(model, torch.tensor([3.0, 4.0]))
    y, x, t = torch.tensor([0, 1]), torch.randn(2, 1, GENES), torch.full((2,), 600)
    guided = wbdit.samplers.GuidedModel(at, y, 2.0)
    joint, null = at(x, t, y), at(x, t, torch.tensor([2, 2]))
    torch.testing.assert_close(guided(x, t), null + 2 * (joint - null))
    torch.testing.assert_close(guided.conditioning, at.embed(y))


def adata_of(counts, codes):
    obs = pd.DataFrame({"type": np.array(["a", "b"])[codes[:, 0]]}, index=map(str, range(len(counts))))
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(counts.shape[1])]))


@pytest.fixture(scope="module")
def trained():
    rng = np.random.default_rng(0)
    y = np.arange(400) % 2
    programme = rng.gamma(4, 1 / 4, (400, 1)) * rng.choice([0.2, 1.0, 3.0], (1, 40))  # gene program within types
    rates = rng.gamma(1, 3, (2, 40))[y] * (1 + programme) / 2
    counts = rng.poisson(rates * rng.gamma(8, 1 / 8, (400, 1))).astype(np.float32)
    adata = adata_of(counts, y[:, None])
    return adata, wbdit.fit(adata, label="type", steps=250, progress=False)


def test_generated_counts_have_the_genes_means_and_zeros(trained):
    adata, generator = trained
    cells = generator.generate(like=adata, seed=1)
    real, made = adata.X, cells.X.toarray()
    assert (made == np.rint(made)).all()
    for label in "ab":
        inside, of = (adata.obs["type"] == label).to_numpy(), (cells.obs["type"] == label).to_numpy()
        assert np.corrcoef(real[inside].mean(0), made[of].mean(0))[0, 1] > 0.99
    assert abs((real == 0).mean(0) - (made == 0).mean(0)).mean() < 0.03
    # generated library sizes follow the requested ones
    assert stats.wasserstein_distance(real.sum(1), made.sum(1)) < 0.1 * real.sum(1).mean()


def test_the_same_cells_in_any_batches_and_after_saving(trained, tmp_path):
    _, generator = trained
    whole = generator.generate(30, seed=3).X
    assert (whole != generator.generate(30, seed=3, batch_size=7).X).nnz == 0
    generator.save(tmp_path / "run")
    assert (whole != wbdit.load(tmp_path / "run").generate(30, seed=3).X).nnz == 0
    assert (whole != generator.generate(30, seed=4).X).nnz > 0
