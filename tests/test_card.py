"""The model card, and what a notebook and a console show of a generator: complete, and safe with any label name."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers import make_cells

import wbdit
from wbdit import card
from wbdit.data.preprocessor import Preprocessor
from wbdit.run_config import RunConfig, Trained

NASTY = ("<script>alert(1)</script>", "a|b\n## head", "`code` *bold* [link](x) & 'quote\"")


def described(cells, label, continuous=None):
    """Return the configuration and the preprocessor of a run that was never trained."""
    preprocessor = Preprocessor.fit(cells, label=label, continuous=continuous)
    config = RunConfig(
        preset="small",
        seed=3,
        denoiser="wbdit",
        model={"hidden_size": 256},
        schedule={},
        training={"batch_size": 64},
        budget={"minutes": 3.0, "epochs": None, "steps": None},
        model_hash="0123456789abcdef" * 4,
        trained=Trained(steps=1500, seconds=61.2, cells=cells.n_obs, epochs=12.5),
    )
    return config, preprocessor


@pytest.fixture(scope="module")
def plain():
    return described(make_cells(61, 30), "type")


@pytest.fixture(scope="module")
def nasty():
    cells = make_cells(61, 30, types=NASTY)
    cells.obs["<b>|column"] = "one"
    return described(cells, ["type", "<b>|column"])


class Text(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_the_card_says_what_the_run_is(plain):
    text = card.markdown(*plain)
    for line in (
        "| Training cells | 61 |",
        "| B | 21 |",
        "| NK | 20 |",
        "| steps | 1500 |",
        "| training time, s | 61.2 |",
        "| budget in minutes | 3.0 |",
        "| hidden size | 256 |",
        "| batch size | 64 |",
        f"| hash | {'0123456789abcdef' * 4} |",
        "    generator.generate(n_per_label={'B': 100}, seed=0)",
        "## Intended use",
        "## Limits",
    ):
        assert line in text, line
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1]
    assert "library_name: wbdit" in front


def test_its_snippet_runs(plain):
    _, preprocessor = plain
    asked = re.search(r"n_per_label=(\{.*\})", card.markdown(*plain))[1]
    assert len(preprocessor.labels.codes_from_counts(eval(asked))) == 100


def test_odd_names_change_nothing_in_markdown(nasty):
    text = card.markdown(*nasty)
    assert "<script>" not in text.replace("\\<script\\>", "").replace(repr(NASTY[0]), "")
    assert "\n## head" not in text
    assert r"| a\|b \#\# head | 20 |" in text
    assert r"\`code\` \*bold\* \[link\](x) \& 'quote" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


def test_odd_names_change_nothing_in_html(nasty):
    page = Text(card.html(*nasty))
    assert set(page.tags) == {"div", "strong", "table", "tr", "th", "td", "details", "summary"}
    for name in (*NASTY, "<b>|column"):
        assert name in page.text


def test_many_labels_are_cut_in_a_notebook_only():
    cells = make_cells(80, 30, types=tuple(f"type-{i}" for i in range(40)))
    config, preprocessor = described(cells, "type")
    assert "and 10 more" in card.html(config, preprocessor)
    assert "type-39" not in Text(card.html(config, preprocessor)).text
    assert r"| type-39 | 2 |" in card.markdown(config, preprocessor)


def test_a_run_without_labels():
    config, preprocessor = described(make_cells(20, 30), None)
    assert "    labels: none\n" in card.plain_text(config, preprocessor)
    assert "n_per_label" not in card.markdown(config, preprocessor)
    assert "details" not in Text(card.html(config, preprocessor)).tags


def test_covariates_are_listed_with_their_ranges():
    cells = make_cells(20, 30)
    cells.obs["log_dose"] = np.linspace(-1, 2.5, 20)
    config, preprocessor = described(cells, None, "log_dose")
    assert "    covariates: log_dose (-1 to 2.5)\n" in card.plain_text(config, preprocessor)
    text = card.markdown(config, preprocessor)
    assert r"conditioned on log\_dose (-1 to 2.5)" in text
    assert r"| Covariates | log\_dose (-1 to 2.5) |" in text


def test_a_generator_shows_itself_and_saves_its_card(tmp_path):
    generator = wbdit.fit(make_cells(40, 30), label="type", steps=1, progress=False, out=tmp_path / "run")
    assert repr(generator).startswith("CellGenerator\n    genes: 30\n    labels: type (3 labels)\n")
    assert generator.config.model_hash[:16] in repr(generator)
    assert generator.config.model_hash[:16] in generator._repr_html_()
    text = (tmp_path / "run" / "README.md").read_text()
    assert text == card.markdown(generator.config, generator.preprocessor)
    assert generator.config.model_hash in text


def test_the_card_holds_no_values_of_genes(plain):
    config, preprocessor = plain
    assert not any(gene in card.markdown(config, preprocessor) for gene in preprocessor.genes)
