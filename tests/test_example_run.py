"""The example run: small, reproducible cells, and a card with its scores."""

import re

import numpy as np

import wbdit
from wbdit.checkpoint import state_hash
from wbdit.datasets import LABEL, blood_cells
from wbdit.example_run import FOLDER, example_generator


def test_cells_depend_on_the_seed_only():
    cells, again, other = wbdit.example(20), wbdit.example(20), wbdit.example(20, seed=1)
    assert cells.shape == (20, 765)
    assert (cells.X != again.X).nnz == 0
    assert (cells.X != other.X).nnz > 0
    assert (cells.X.data == np.rint(cells.X.data)).all()


def test_genes_and_types_are_those_of_the_blood_cells():
    labels = example_generator().preprocessor.labels
    assert labels.columns == (LABEL,)
    assert set(labels.categories[0]) == set(blood_cells().obs[LABEL])
    assert list(wbdit.example(1).var_names) == list(blood_cells().var_names)


def test_the_run_is_small_and_whole():
    files = [path for path in FOLDER.iterdir() if path.suffix != ".py" and path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5e6
    generator = example_generator()
    assert state_hash(generator.model.state_dict()) == generator.config.model_hash


def test_the_card_has_the_scores_of_this_run():
    card = (FOLDER / "README.md").read_text()
    assert example_generator().config.model_hash in card
    assert "wbdit evaluate heldout.h5ad synthetic.h5ad" in card
    assert len(re.findall(r"^\| .*\(`\w+`\) \|", card, re.MULTILINE)) == 23
