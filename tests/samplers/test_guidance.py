"""Guidance with one weight per label column, and interpolation between two sets of labels."""

import pytest
import torch
from helpers import relative_error

from wbdit import NoiseSchedule, WBDiT, samplers
from wbdit.samplers import GuidedModel

SMALL = {"input_size": 12, "patch_size": 4, "hidden_size": 8, "depth": 2, "num_heads": 2}


def stirred(label_sizes, seed=0, **settings):
    torch.manual_seed(seed)
    model = WBDiT(**SMALL, label_sizes=label_sizes, **settings).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.fixture
def asked():
    """Return a model with three label columns, and the list of the labels of its calls."""
    model, calls = stirred([3, 2, 2]), []

    class Listening:
        prediction, label_sizes, embed = "epsilon", model.label_sizes, staticmethod(model.embed)

        def __call__(self, x, t, y):
            calls.append(y)
            return model(x, t, y)

    return Listening(), calls


X, T = torch.randn(4, 1, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([300]).expand(4)
Y = torch.tensor([[0, 1, 0], [2, 0, 1], [1, 1, 1], [0, 0, 0]])
NULL = torch.tensor([3, 2, 2])


@torch.no_grad()
def given(model, *columns):
    """Run the model with the labels of the given columns; the other columns are null."""
    keep = torch.tensor([column in columns for column in range(3)])
    return model(X, T, torch.where(keep, Y, NULL))


@torch.no_grad()
def guided(model, weight):
    return GuidedModel(model, Y, weight)(X, T)


@pytest.mark.parametrize("weight", [1, 1.0, [1.0, 1.0, 1.0]])
def test_weights_of_one_are_the_model_at_one_call(asked, weight):
    model, calls = asked
    assert torch.equal(guided(model, weight), given(model, 0, 1, 2))
    assert torch.equal(calls[0], Y)


@pytest.mark.parametrize("weight", [2.5, [2.5, 2.5, 2.5], 0.3])
def test_one_weight_for_all_is_classifier_free_guidance(asked, weight):
    model, calls = asked
    w = weight if isinstance(weight, float) else weight[0]
    null, joint = given(model), given(model, 0, 1, 2)
    calls.clear()
    assert relative_error(guided(model, weight), null + w * (joint - null)) < 1e-6
    assert [len(y) for y in calls] == [8]


@pytest.mark.parametrize("w", [3.0, 0.5, -1.0])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_weight_on_one_column(asked, w, column):
    model, calls = asked
    weights = [1.0, 1.0, 1.0]
    weights[column] = w
    joint, without = given(model, 0, 1, 2), given(model, *{0, 1, 2} - {column})
    calls.clear()
    assert relative_error(guided(model, weights), joint + (w - 1) * (joint - without)) < 1e-5
    assert [len(y) for y in calls] == [8]


def test_a_weight_each(asked):
    model, calls = asked
    f = [given(model), given(model, 2), given(model, 0, 2), given(model, 0, 1, 2)]
    expected = f[0] + 1.5 * (f[1] - f[0]) + 2 * (f[2] - f[1]) + 4 * (f[3] - f[2])
    calls.clear()
    assert relative_error(guided(model, [2.0, 4.0, 1.5]), expected) < 1e-5
    assert [len(y) for y in calls] == [16]


@pytest.mark.parametrize(("weights", "columns"), [([1.0, 0.0, 1.0], (0, 2)), ([0.0, 0.0, 0.0], ())])
def test_a_weight_of_zero_leaves_a_column_open(asked, weights, columns):
    model, calls = asked
    assert torch.equal(guided(model, weights), given(model, *columns))
    assert len(calls[0]) == 4


def test_weights_that_do_not_fit(asked):
    with pytest.raises(ValueError, match="2 guidance weights for 3 columns"):
        GuidedModel(asked[0], Y, [1.0, 2.0])


def test_a_path_is_continuous_before_it_is_counted():
    model = stirred([3, 2])
    y, toward = torch.tensor([[0, 0], [2, 0]]), torch.tensor([[0, 1], [1, 1]])
    x, schedule = torch.randn(2, 1, 12), NoiseSchedule()
    path = samplers.timesteps(schedule, 5)

    def sample(mix):
        return samplers.ddim(
            GuidedModel(model, y, 1.5, toward=toward, mix=mix), x, schedule, path, eta=0, clamp_min=None
        )

    with torch.no_grad():
        ends = [
            samplers.ddim(GuidedModel(model, labels, 1.5), x, schedule, path, eta=0, clamp_min=None)
            for labels in (y, toward)
        ]
        halfway = model.embed(y) / 2 + model.embed(toward) / 2
        seen = GuidedModel(model, y, toward=toward, mix=0.5)(x, torch.tensor([9]).expand(2))
        assert relative_error(seen, model(x, torch.tensor([9, 9]), conditioning=halfway)) < 1e-6
    assert torch.equal(sample(0), ends[0])
    assert torch.equal(sample(1), ends[1])
    whole = float((ends[1] - ends[0]).norm())
    for mix, step in ((0, 1e-4), (0.4999, 2e-4), (1, -1e-4)):
        assert float((sample(mix + step) - sample(mix)).norm()) < 0.01 * whole
