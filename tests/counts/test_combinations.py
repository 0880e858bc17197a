"""Rates and dispersions of combinations of labels: rows, unseen ones, and training as if unseen."""

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import wbdit
from tests.helpers import tiny_preset
from wbdit import NoiseSchedule, WBDiT
from wbdit._draws import BatchDraws
from wbdit.counts.bins import CountBins
from wbdit.counts.combinations import HOLD_OUT
from wbdit.counts.denoiser import CountDenoiser
from wbdit.counts.foretell import Foretelling
from wbdit.counts.likelihood import CountLikelihood
from wbdit.data.cell_matrix import MemoryMatrix
from wbdit.data.covariates import Covariates
from wbdit.data.draws import TrainingDraws
from wbdit.data.labels import Labels
from wbdit.data.statistics import Statistics, training_combinations
from wbdit.emission import _with_run
from wbdit.ops.reference import count_probabilities
from wbdit.training.foretold_rates import _Path, calibrate_foretold, calibrated, foretold_cells

GENES, TYPES = 40, 4
SIZES = (TYPES, 2)
KNOWN = np.array([[t, c] for t in range(TYPES) for c in range(2) if (t, c) != (3, 1)])


def true_rates():
    """Return rates ``(types, 2, G)``; the first ten genes rise with the condition, in type 2 more than elsewhere."""
    rng = np.random.default_rng(0)
    rates = np.repeat(rng.gamma(2.0, 2.0, (TYPES, 1, GENES)), 2, axis=1)
    rates[3] = rates[2] * rng.lognormal(0, 0.1, GENES)
    rates[:, 1, :10] += 4
    rates[2:, 1, :10] += 8
    return rates


def simulated(n=60, seed=1):
    rng = np.random.default_rng(seed)
    codes = np.repeat(KNOWN, n, axis=0)
    depth = rng.gamma(20, 1 / 20, (len(codes), 1))
    counts = rng.poisson(rng.gamma(4.0, true_rates()[tuple(codes.T)] * depth / 4.0))
    return counts.astype(np.float32), codes


def found_of(counts, codes):
    combinations = training_combinations(codes, SIZES, GENES)
    return Foretelling.of(codes, SIZES, Statistics.of(MemoryMatrix(counts), "log1p", (), combinations))


@pytest.fixture(scope="module")
def fitted():
    """Return an untrained model with its tables, and what they were made of."""
    counts, codes = simulated()
    foretelling = found_of(counts, codes)
    torch.manual_seed(0)
    denoiser = WBDiT(GENES, 4, hidden_size=16, num_heads=2, label_sizes=SIZES, class_dropout_prob=0.0)
    likelihood = CountLikelihood(GENES, len(CountBins.up_to(counts.max()).lowest), 1000)
    model = CountDenoiser(denoiser, likelihood, NoiseSchedule(), combinations=foretelling.rows)
    model.init_from_data(MemoryMatrix(counts), codes, np.log1p(counts).mean(0), 0.5)
    return model.eval(), foretelling


def test_every_combination_has_its_row(fitted):
    model, _ = fitted
    tables = model.combinations
    assert tables.n == (7, 1, 6)
    named = torch.from_numpy(np.concatenate([KNOWN, [[3, 1]]]))
    assert tables.rows(named).tolist() == list(range(1, 9))
    nulls = torch.tensor([[4, 0], [0, 2], [4, 2]])
    assert tables.rows(nulls).tolist() == [0, 0, 0]
    held_out = tables.held_out_row[tables.rows(torch.from_numpy(KNOWN))]
    assert sorted(held_out[held_out > 0].tolist()) == list(range(9, 15))
    assert held_out[6] == 0  # type 3 has no counterpart
    assert tables.foretold_codes().tolist() == [[3, 1]]


@torch.no_grad()
def test_pure_noise_gives_the_tables(fitted):
    """Before training, counts at pure noise have the mean and the mean logarithm of the combination's cells."""
    model, foretelling = fitted
    profiles, known = foretelling.profiles, np.array([foretelling.log_mean(k) for k in range(len(KNOWN))])
    y = torch.from_numpy(np.concatenate([KNOWN, [[3, 1]]]))
    library = torch.from_numpy(np.append(profiles.library, foretelling.unseen[0].library)).float()
    conditioning, t = model.embed(y, library.log()), torch.full((8,), 999)
    x = torch.randn(8, 1, GENES)
    p, _ = count_probabilities(*model._draw_terms(x, t, conditioning), library, rounds=4)
    logs = (p * torch.log1p(model.likelihood.middle * 1e4 / library[:, None, None])).sum(-1).numpy()
    wanted = np.concatenate([known, foretelling.unseen[0].log_mean[None]])
    assert np.abs(logs - wanted).mean() < 0.08
    assert np.corrcoef((logs - wanted.mean(0)).ravel(), (wanted - wanted.mean(0)).ravel())[0, 1] > 0.99


def test_the_denoiser_is_not_told_labels_that_it_has_not_seen_together(fitted):
    model, _ = fitted
    tables = model.combinations
    given = tables(torch.tensor([[0, 1], [3, 1], [4, 1]]))
    assert given.shown.tolist() == [[0, 1], [4, 2], [4, 1]]
    assert given.named[:, 0].tolist() == [True, True, False]
    assert (given.rates[2] == 0).all()


def test_cells_with_a_null_label_have_the_labels_rates_alone(fitted):
    model, _ = fitted
    with torch.no_grad():
        model.label_dispersion.normal_()
        given = model.embed(torch.tensor([[0, 2], [4, 1]]), torch.full((2,), model.log_library_scale[0]))
        rates, dispersion = given[:, 16:].chunk(2, dim=1)
    torch.testing.assert_close(rates, model.label_rates[[0, 6]])
    torch.testing.assert_close(dispersion, model.label_dispersion[[0, 6]] + model.label_dispersion[[7, 4]])
    with torch.no_grad():
        model.label_dispersion.zero_()


def test_a_tenth_of_the_cells_is_trained_as_if_unseen(fitted):
    model, _ = fitted
    tables, n = model.combinations, 4000
    y = torch.from_numpy(KNOWN[np.arange(n) % 6])
    model.train()
    torch.manual_seed(0)
    draws = BatchDraws(n)
    with draws.part(slice(0, n)):
        whole = tables(y)
    torch.manual_seed(0)
    draws = BatchDraws(n)
    with draws.part(slice(0, 1000)):
        first = tables(y[:1000])
    with draws.part(slice(1000, n)):
        rest = tables(y[1000:])
    model.eval()
    hidden = (whole.shown == torch.tensor(SIZES)).any(1).double().mean()
    assert hidden == pytest.approx(HOLD_OUT, abs=0.02)
    torch.testing.assert_close(whole.rates, torch.cat([first.rates, rest.rates]))
    assert (tables(y).shown == y).all()


def test_all_that_is_learned_has_a_gradient(fitted):
    model, _ = fitted
    tables = model.combinations
    model.train()
    given = tables(torch.from_numpy(KNOWN[np.arange(600) % 6]))
    model.eval()
    (given.mixture_logits.sum() + given.vector.sum()).backward()
    assert (tables.dispersion.grad[1:7] > 0).all()
    assert (tables.dispersion.grad[[0, 7]] == 0).sum() == GENES  # row 0 has that of held-out cells, type 3 none
    assert (tables.foretold_embedding.grad > 0).all()
    assert (tables.profile_embedder.weight.grad[:, :6] != 0).any()


# ------------------------------------------------------------------------------------------------ as a user sees it


@pytest.fixture(scope="module")
def cells():
    counts, codes = simulated()
    obs = {"type": [f"T{t}" for t in codes[:, 0]], "condition": [("ctrl", "stim")[c] for c in codes[:, 1]]}
    return ad.AnnData(counts, obs=obs)


@pytest.fixture(scope="module")
def generator(cells):
    return wbdit.fit(cells, label=["type", "condition"], preset=tiny_preset(), steps=60, seed=0, progress=False)


def test_what_is_said_of_an_unseen_combination(generator, caplog):
    with caplog.at_level(logging.WARNING, logger="wbdit"):
        made = generator.generate(n_per_label={"T3/stim": 4, "T0/stim": 2}, calls=2)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(
        "no training cell is T3/stim: it is foretold from other combinations, most from"
    )
    assert "T2/stim (similarity" in caplog.messages[0]
    assert "Of 6 combinations left out in turn, the change was foretold with an R2 of" in caplog.messages[0]
    assert made.uns["wbdit"]["unseen"].tolist() == ["T3/stim"]


def test_what_is_said_of_combinations_with_few_cells(cells, caplog):
    few = (cells.obs["type"] == "T1") & (cells.obs["condition"] == "stim")
    kept = cells[(~few | (few.cumsum() <= 10)).to_numpy()].copy()
    generator = wbdit.fit(kept, label=["type", "condition"], preset=tiny_preset(), steps=1, seed=0, progress=False)
    with caplog.at_level(logging.WARNING, logger="wbdit"):
        made = generator.generate(n_per_label={"T1/stim": 4, "T0/stim": 2}, calls=2)
    (sentence,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert sentence.startswith("few training cells have the labels T1/stim (10): they are foretold in part")
    assert "unseen" not in made.uns["wbdit"]


def test_a_run_keeps_its_tables(generator, tmp_path):
    generator.save(tmp_path / "run")
    loaded = wbdit.load(tmp_path / "run", device="cpu")
    assert loaded.config.foretold == generator.config.foretold
    assert loaded.config.likelihood == generator.config.likelihood
    for name, table in generator.model.combinations.state_dict().items():
        assert torch.equal(loaded.model.combinations.state_dict()[name], table), name
    assert loaded.config.foretold.nearest["T3/stim"][0] == "T2/stim"


def log_mean(cells):
    counts = cells.toarray().astype(float)
    return np.log1p(1e4 * counts / counts.sum(1, keepdims=True)).mean(0)


def test_generated_cells_have_the_means_that_are_foretold(generator):
    tables = generator.model.combinations
    kept = tables.rates.clone()
    row = int(tables.rows(torch.tensor([[3, 1]])))
    with torch.no_grad():
        tables.rates[row] -= 1.0 * (torch.arange(GENES) < 10)  # the network's way leads elsewhere
    before = log_mean(generator.generate(n_per_label={"T3/stim": 800}, seed=1).X)
    changed = calibrate_foretold(generator)
    after = log_mean(generator.generate(n_per_label={"T3/stim": 800}, seed=1).X)
    foretold = tables.foretold_log_means[0].numpy()
    assert list(changed) == ["combinations.rates"]
    assert np.linalg.norm(after - foretold) < 0.4 * np.linalg.norm(before - foretold)
    assert torch.equal(tables.rates[:row], kept[:row])  # other rows stay
    with torch.no_grad():
        tables.rates.copy_(kept)


def test_the_number_of_calibrated_combinations_is_limited(generator):
    assert calibrated(generator).tolist() == [[3, 1]]
    assert foretold_cells(generator) == 4 * 384


def test_library_sizes_of_an_unseen_combination():
    """Type 3 has half the counts of the others, and the condition doubles them."""
    codes = np.repeat(KNOWN, 50, axis=0)
    means = 1000.0 * np.array([1, 1, 1, 0.5])[codes[:, 0]] * np.array([1, 2])[codes[:, 1]]
    library = np.random.default_rng(0).normal(means, 0.1 * means)
    types, conditions = tuple(f"T{t}" for t in range(TYPES)), ("ctrl", "stim")
    labels = Labels(("type", "condition"), (types, conditions), KNOWN, np.full(len(KNOWN), 50))
    draws, u = TrainingDraws(labels, Covariates(), library), (np.arange(200) + 0.5) / 200
    sizes = [draws.draw(np.tile(code, (200, 1)), np.zeros((200, 0)), u).library for code in ([3, 0], [3, 1], [2, 1])]
    assert [size.mean() for size in sizes] == pytest.approx([500, 1000, 2000], rel=0.05)
    assert sizes[1].std() == pytest.approx(100, rel=0.2)


def test_effects_are_emitted_with_the_dispersion_of_the_combinations(generator):
    """The simulated counts have a size of 4, of all genes that the condition leaves as they are."""
    found = _with_run(np.ones((2, GENES)), generator, pd.Index(generator.preprocessor.genes), "type", ["T0", "T2"])
    assert np.median(found[:, 10:]) == pytest.approx(4, rel=0.4)


def test_many_combinations_have_no_tables():
    """A run of 40 by 40 labels goes by the sum of the labels' rates."""
    codes = np.arange(400)[:, None] * np.array([[1, 7]]) % 40
    assert training_combinations(codes, (40, 40), 10) is None
    assert training_combinations(codes, (40, 20), 10_000) is None


def test_rates_do_not_run_away():
    """Rounds whose errors are nearly alike would be extrapolated far."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(5.0, (200, 12))
    path, rates = _Path(np.linspace(5.0, 8.0, 12)), np.zeros(12)
    for part in (counts, counts + (rng.random(counts.shape) < 0.001), counts):
        following = path.next(rates, part)
        assert np.abs(following - rates).max() <= 2.0
        rates = following
