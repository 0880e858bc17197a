"""Messages name Python's arguments in backquotes; the command line names flags in their place."""

import ast
import inspect

import pytest
from helpers import ROOT, exit_code, make_cells

import wbdit
from wbdit import InputError
from wbdit._flags import ARGUMENT, with_flags
from wbdit.cli import cli
from wbdit.ops import build

FUNCTIONS = {
    "train": wbdit.fit,
    "generate": wbdit.CellGenerator.generate,
    "evaluate": wbdit.evaluate,
    "split": wbdit.split,
    "augment": wbdit.augment,
    "emit": wbdit.emit,
    "recast": wbdit.CellGenerator.recast,
}
TRAIN = [cli.commands["train"], *cli.commands.values()]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("give one of `minutes`, `epochs`", "give one of --minutes, --epochs"),
        ("give `n_per_label`", "give --per-label"),
        ('choose `device="cpu"` or "auto"', 'choose --device cpu or "auto"'),
        ("choose `label='cell type'`", "choose --label 'cell type'"),
        ("resume it (`resume=True`)", "resume it (--resume)"),
        ("`n_cells` of 20, `adata`", "`n_cells` of 20, `adata`"),
        ("a type called `B` or 'NK'", "a type called `B` or 'NK'"),
    ],
)
def test_flags_replace_arguments(message, said):
    assert with_flags(message, TRAIN) == said


def test_a_commands_own_flag_comes_first():
    """Several commands have `label`; any order of the commands finds one."""
    assert with_flags("`label`, `calls`", TRAIN) == "--label, --calls"


def messages(path):
    """Yield the literal text of the InputErrors and log messages in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("InputError", "logger.info", "logger.warning"):
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            yield "".join(text for text in texts if isinstance(text, str))


def test_messages_name_arguments_that_exist():
    """A name in backquotes in a message is an argument of a public function."""
    plots = wbdit.pl.umap, wbdit.pl.genes, wbdit.pl.history
    functions = (*FUNCTIONS.values(), *plots, wbdit.CellGenerator.generate_to, wbdit.explain, wbdit.load)
    arguments = {name for function in functions for name in inspect.signature(function).parameters}
    files = list((ROOT / "wbdit").rglob("*.py"))
    named = {(path.name, found[1]) for path in files for text in messages(path) for found in ARGUMENT.finditer(text)}
    assert len(named) > 15
    assert {(path, name) for path, name in named if name not in arguments} == set()


@pytest.mark.parametrize("command", FUNCTIONS)
def test_options_carry_the_arguments_names(command):
    """A flag is found by its argument, so the parameter of a click option has the argument's name."""
    arguments = set(inspect.signature(FUNCTIONS[command]).parameters)
    if "training" in arguments:  # passed on to fit
        arguments |= set(inspect.signature(wbdit.fit).parameters)
    if command == "generate":  # which writes a file of any length
        arguments |= set(inspect.signature(wbdit.CellGenerator.generate_to).parameters)
    options = {parameter.name for parameter in cli.commands[command].params}
    files = {"data", "run", "out", "train", "test"}
    assert options - arguments <= files | {"device", "settings", "threads", "quiet", "json", "overwrite"}


def test_python_keeps_the_arguments(cells):
    with pytest.raises(InputError, match="one of `minutes`, `epochs` and `steps`"):
        wbdit.fit(cells, minutes=1, steps=1)


def test_the_shell_names_flags(tmp_path, capfd):
    make_cells(12, 5).write_h5ad(tmp_path / "cells.h5ad")
    assert exit_code("train", tmp_path / "cells.h5ad", "--steps", 1, "--epochs", 1, "--out", tmp_path / "run") == 2
    assert capfd.readouterr().err == "wbdit: give exactly one of --minutes, --epochs and --steps\n"


def test_a_mistake_is_said_before_kernels_are_compiled(cells, monkeypatch):
    """Compiling takes 15 s, which nobody should wait for to learn of a typo."""

    def build_now(*arguments, **options):
        raise AssertionError("compiled before the cells were checked")

    monkeypatch.setattr(build, "available", build_now)
    with pytest.raises(InputError, match="no column 'typ'"):
        wbdit.fit(cells, label="typ", steps=1)
    with pytest.raises(InputError, match="`max_genes` of 1 or more"):
        wbdit.fit(cells, max_genes=0, steps=1)
