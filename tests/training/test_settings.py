"""Presets as objects, settings by dotted names, and one line for each impossible value."""

import math
from dataclasses import replace

import pytest
from helpers import make_cells, tiny_preset

import wbdit
from wbdit import InputError, Preset
from wbdit.training.config import PRESETS, Likelihood, Training
from wbdit.training.resume import preset_name
from wbdit.training.settings import setting_types, with_settings

SMALL = Preset.from_name("small")


def test_a_preset_object():
    cells = make_cells(60, 12)
    preset = tiny_preset(batch_size=20, learning_rate=1e-2)
    generator = wbdit.fit(cells, label="type", preset=preset, epochs=1, progress=False)
    config = generator.config
    assert config.preset == "custom"
    assert (config.training["batch_size"], config.training["learning_rate"]) == (20, 1e-2)
    assert (config.model["hidden_size"], config.model["depth"]) == (16, 1)
    assert config.trained.steps == 3
    assert preset_name(SMALL) == "small"


def test_patches_widen_with_the_genes():
    """Between 64 and 4,096 genes the preset's own patches are used; a run keeps the size that it was trained with."""
    for genes in (64, 2000, 4096):
        assert SMALL.model_for(genes) == {**SMALL.model, "input_size": genes}
    for genes in (4097, 13_714, 36_601):
        size = SMALL.model_for(genes)["patch_size"]
        assert size > 64
        assert math.ceil(genes / size) <= 64
    assert with_settings(SMALL, ["most_patches=none"]).model_for(14_000)["patch_size"] == 64
    tiny = tiny_preset()
    narrow = replace(tiny, model={**tiny.model, "patch_size": 8}, most_patches=2)
    generator = wbdit.fit(make_cells(20, 50), preset=narrow, steps=1, progress=False)
    assert generator.config.model["patch_size"] == generator.denoiser.patch_size == 32


def test_a_presets_precision_counts_unless_another_is_given(monkeypatch):
    cells = make_cells(60, 12)
    monkeypatch.setattr("wbdit.ops.cpu.has_fast_bf16", lambda: False)
    low = tiny_preset(precision="bf16")
    for given, used in (("auto", "bf16"), ("fp32", "fp32")):
        generator = wbdit.fit(cells, preset=low, precision=given, steps=1, progress=False)
        assert generator.config.training["precision"] == used


def test_settings_by_name():
    given = ["training.learning_rate=3e-4", "training.betas=0.9,0.95", "model.hidden_size=128", "model.depth = 2"]
    given += ["training.early_stopping=none", "likelihood.stop=400", "model.prediction=x0", "model.cell_token=false"]
    preset = with_settings(SMALL, [*given, "schedule=linear", "model.tie_out=true", "training.batch_size=32"])
    assert preset.training == replace(SMALL.training, learning_rate=3e-4, betas=(0.9, 0.95), batch_size=32)
    assert preset.likelihood == Likelihood(stop=400)
    changed = {"hidden_size": 128, "depth": 2, "prediction": "x0", "cell_token": False, "tie_out": True}
    assert preset.model == {**SMALL.model, **changed}
    assert preset.schedule == "linear"
    assert PRESETS["small"] == SMALL
    assert with_settings(SMALL, []) == SMALL


@pytest.mark.parametrize("name", PRESETS)
def test_every_setting_of_a_preset_can_be_named(name):
    kinds = setting_types(Preset.from_name(name))
    assert {f"model.{key}" for key in Preset.from_name(name).model} <= set(kinds)
    assert "model.input_size" not in kinds  # follows from the cells
    assert ("model.tie_out" in kinds) == (name != "dit")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("training.learning_rat=1", r"unknown setting 'training.learning_rat': choose one of training.batch_size, .*"),
        ("learning_rate=1", "model.hidden_size"),
        ("training.learning_rate", "write it as training.learning_rate=3e-4"),
        ("training.learning_rate=", "write it as"),
        ("training.learning_rate=fast", "training.learning_rate must be a number, not 'fast'"),
        ("training.learning_rate=nan", "must be a number, not 'nan'"),
        ("training.learning_rate=-1", "training.learning_rate must be above 0, not -1"),
        ("training.batch_size=1.5", "training.batch_size must be a whole number, not '1.5'"),
        ("training.batch_size=0", "training.batch_size must be at least 1, not 0"),
        ("training.betas=0.9", "training.betas must be 2 numbers with commas"),
        ("training.betas=0.9,1", "training.betas must be at least 0 and below 1, not 1"),
        ("training.ema=1", "below 1"),
        ("training.most_epochs=many", "a number or none"),
        ("training.precision=fp8", "`precision` 'fp8'"),
        ("model.hidden_size=130", r"a multiple of 4 and of model.num_heads \(4\), not 130"),
        ("model.num_heads=3", r"a multiple of 4 and of model.num_heads \(3\), not 256"),
        ("model.depth=0", "model.depth must be at least 1"),
        ("model.cell_token=perhaps", "must be true or false"),
        ("model.prediction=noise", "one of epsilon, v, x0"),
        ("likelihood.stop=1000", "at least 1 and at most 998"),
        ("schedule=wavy", "one of linear, cosine"),
        ("max_genes=0", "max_genes must be at least 1"),
        ("most_patches=0", "most_patches must be at least 1"),
    ],
)
def test_impossible_settings(setting, words):
    with pytest.raises(InputError, match=words):
        with_settings(SMALL, [setting])


def test_impossible_presets_in_python():
    with pytest.raises(InputError, match="unknown setting of the model 'width': choose one of patch_size"):
        replace(SMALL, model={**SMALL.model, "width": 3})
    with pytest.raises(InputError, match="model.depth must be a whole number, not '3'"):
        replace(SMALL, model={**SMALL.model, "depth": "3"})
    with pytest.raises(InputError, match="training.learning_rate must be a number, not None"):
        Training(learning_rate=None)
    with pytest.raises(InputError, match="`preset` must be a name or a wbdit.Preset, not dict"):
        wbdit.fit(make_cells(60, 12), preset=SMALL.model, steps=1)
    with pytest.raises(InputError, match="denoiser must be one of wbdit, dit"):
        replace(SMALL, denoiser="unet")
