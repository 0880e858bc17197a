"""For the same seed, kernels and reference give the same loss curve, and so do bf16 and fp32."""

import numpy as np
import pytest
import torch

from wbdit import NoiseSchedule, WBDiT, backend
from wbdit.data.loader import Batches
from wbdit.ops import build
from wbdit.training.config import Budget, Training
from wbdit.training.losses import SquaredError
from wbdit.training.trainer import Trainer

STEPS, WINDOW = 200, 20


def curve(precision, kernels="auto"):
    """Train a small model on three synthetic cell types; return the mean loss of every 20 steps."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    x = torch.randn(3, 60, generator=generator)[y] + 0.3 * torch.randn(300, 60, generator=generator)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = WBDiT(60, 10, hidden_size=32, depth=2, num_heads=2, label_sizes=[3], prediction="v")
    training = Training(batch_size=64, learning_rate=3e-3, warmup_steps=10, precision=precision)
    loss_fn = SquaredError(model, NoiseSchedule(kind="cosine"))
    trainer = Trainer(loss_fn, Batches(x, y, 64), training, Budget(steps=STEPS))
    records = []
    with backend(kernels):
        assert trainer.train(records.append, bar=False)
    return np.array([record["loss"] for record in records]).reshape(-1, WINDOW).mean(1)


@pytest.fixture(scope="module")
def fp32():
    return curve("fp32")


@pytest.fixture(autouse=True, scope="module")
def _every_step_is_logged():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wbdit.training.trainer.LOG_SECONDS", -1.0)
        yield


def test_the_model_learns(fp32):
    assert len(fp32) == STEPS // WINDOW
    assert fp32[-1] < 0.6 * fp32[0]


@pytest.mark.skipif(not build.available(), reason="the kernels cannot be built here")
def test_kernels_train_as_the_reference(fp32):
    """The curves differ by 1e-7; with a gradient 10 % off in one op they would differ by more than 1e-3."""
    np.testing.assert_allclose(fp32, curve("fp32", "reference"), rtol=1e-3)


def test_bf16_trains_as_fp32(fp32):
    """A processor without bf16 products emulates them, slowly but with the same rounding."""
    low = curve("bf16")
    assert (low != fp32).all()
    np.testing.assert_allclose(low, fp32, rtol=1e-2)
