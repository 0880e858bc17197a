"""The prior on what the denoiser adds to log rates: its loss, what is learned beside it, and what it does."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import wbdit
from tests.helpers import make_cells, tiny_preset, two_columns
from wbdit.data.loader import Batches
from wbdit.data.sources import TrainingData
from wbdit.training.losses import CountNLL


def trained(cells, prior, label="type", **budget):
    preset = tiny_preset()
    preset = replace(preset, likelihood=replace(preset.likelihood, rate_prior=prior))
    return wbdit.fit(cells, label=label, preset=preset, progress=False, **budget)


def batch_of(generator, cells):
    data = TrainingData.of(generator.preprocessor, cells)
    return Batches.of_counts(data, generator.model.likelihood.bin_of, 64, torch.device("cpu")).take(torch.arange(32))


def test_the_loss_is_the_likelihood_and_in_training_the_prior():
    cells = make_cells(90, 20)
    generator = trained(cells, 50.0, steps=30)
    model, batch, t = generator.model, batch_of(generator, cells), torch.full((32,), 600)
    model.input_dropout = 0.0
    loss = CountNLL(model, generator.schedule, 90)

    def terms():
        torch.manual_seed(0)
        x, conditioning = loss._noised(batch, t)
        answer = model.denoiser(x, t, conditioning=conditioning[:, : model.denoiser.hidden_size])[:, 0]
        worth = 50**2 / (torch.from_numpy(cells.X.toarray().sum(0)) + 50)
        return model.nll(x, t, conditioning, batch.x[:, 0]).mean(), (worth * answer.square()).mean()

    with torch.no_grad():
        nll, squares = terms()
        torch.manual_seed(0)
        torch.testing.assert_close(loss(batch, t), nll)
        model.train()
        model.denoiser.y_embedder.dropout_prob = 0.0
        torch.manual_seed(0)
        torch.testing.assert_close(loss(batch, t), nll + squares / (2 * 90), rtol=1e-4, atol=1e-5)
    assert squares > 1e-4  # a trained denoiser adds something


def test_by_default_it_is_as_strong_as_the_training_cells_are_many():
    cells = make_cells(90, 20)
    assert trained(cells, None, steps=1).config.likelihood.rate_prior == 9
    assert trained(cells, None, steps=1).model.rate_prior == 9
    likelihood = wbdit.Preset.from_name("small").likelihood
    assert [likelihood.rate_prior_of(n) for n in (300, 1999, 2001, 10**6)] == [30, 199.9, 200, 200]
    assert replace(likelihood, rate_prior=0.0).rate_prior_of(300) == 0


@pytest.mark.parametrize("prior", [0.0, 50.0])
def test_the_rates_of_labels_are_learned_beside_it(prior):
    cells = make_cells(90, 20)
    begun, after = (trained(cells, prior, steps=n).model for n in (1, 30))
    moved = (after.label_rates - begun.label_rates).abs()
    assert after.label_rates.requires_grad == (prior > 0)
    assert (moved[:3].max() > 0.01) == (prior > 0)


def test_the_rates_of_combinations_are_learned_but_not_foretold_ones():
    cells = two_columns()
    seen = cells[~((cells.obs["type"] == "NK") & (cells.obs["condition"] == "stim"))].copy()
    generator = trained(seen, 50.0, label=["type", "condition"], steps=30)
    model, tables = generator.model, generator.model.combinations
    codes = torch.from_numpy(generator.preprocessor.labels.combinations)
    assert not model.label_rates.requires_grad  # else what is foretold would move with them
    assert tables.rate_offset[1:].abs().amax(1).min() > 1e-3
    with torch.no_grad():
        rows = tables.rows(codes)
        torch.testing.assert_close(tables(codes).rates, tables.rates[rows] + tables.rate_offset[rows])
        told = torch.from_numpy(tables.foretold_codes())
        assert len(told) >= 1
        torch.testing.assert_close(tables(told).rates, tables.rates[tables.rows(told)])
        null = torch.tensor([list(model.label_sizes)])
        assert not tables(null).rates.any()


def test_a_rare_gene_is_not_learned_by_heart():
    """Counts are random given the label: whatever the denoiser adds, it has learned by heart."""
    rng = np.random.default_rng(0)
    cells = make_cells(96, 40)
    cells.X = (rng.random((96, 40)) < 0.08).astype(np.float32) + (np.arange(40) < 4) * rng.poisson(5.0, (96, 40))
    added = []
    for prior in (0.0, 200.0):
        generator = trained(cells, prior, steps=400)
        model, batch, t = generator.model, batch_of(generator, cells), torch.full((32,), 500)
        torch.manual_seed(0)
        with torch.no_grad():
            x, conditioning = CountNLL(model, generator.schedule, 96)._noised(batch, t)
            answer = model.denoiser(x, t, conditioning=conditioning[:, : model.denoiser.hidden_size])[:, 0, 4:]
            added.append(float(answer.std(0).mean()))
    assert added[1] < 0.5 * added[0]


def test_a_run_without_it_is_read_and_continued(tmp_path):
    cells = make_cells(90, 20)
    trained(cells, 0.0, steps=2, out=tmp_path / "run")
    again = wbdit.fit(cells, label="type", resume=True, out=tmp_path / "run", steps=4, progress=False)
    assert again.config.likelihood.rate_prior == 0
    assert again.config.trained.steps == 4
