"""What is done with each damaged input, and what must come out: an InputError, or cells that are cells."""

import io
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import scipy.sparse as sp

import wbdit
from bench.reliability.fuzz import bases, damage
from wbdit import InputError, cli
from wbdit.cli import _facts, _parse_at, _parse_guidance, _parse_library, _parse_per_label, _parse_toward
from wbdit.data import expression
from wbdit.data.genes import read_gene_list
from wbdit.data.h5ad_check import check_h5ad
from wbdit.data.matrix import Source
from wbdit.data.preprocessor import Preprocessor
from wbdit.evaluation.align import align
from wbdit.training.settings import with_settings

SHARES = {"h5ad": 0.27, "run": 0.27, "request": 0.18, "object": 0.13, "text": 0.14, "command": 0.01}
MEMORY = ("memory", "unable to allocate", "bad_alloc")


class WrongCells(AssertionError):
    """Cells came out that are none."""


class Targets:
    """The targets, with the whole files and runs that inputs are made from."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.files, self.runs = bases.files(folder), bases.runs(folder)
        self.generators = {kind: wbdit.load(self.folder / f"run-{kind}", device="cpu") for kind in self.runs}
        self.cells = {kind: bases.cells(kind) for kind in self.files}

    def kind_of(self, dice):
        return str(dice.rng.choice(list(SHARES), p=list(SHARES.values())))

    def run(self, dice):
        """Try one input; an InputError is a good answer."""
        kind = self.kind_of(dice)
        quiet = io.StringIO()
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"), redirect_stderr(quiet), redirect_stdout(quiet):
                warnings.simplefilter("ignore")
                getattr(self, f"try_{kind}")(dice)
        except InputError as error:
            if (
                any(word in str(error).lower() for word in MEMORY)
                and "free" not in str(error)
                and "fill" not in str(error)
            ):
                raise MemoryError(str(error)) from error
            return "refused"
        return "used"

    def try_h5ad(self, dice):
        path = self.folder / "input.h5ad"
        flipped = damage.damage_h5ad(dice, self.files[dice.of(self.files)], path)
        # a child process is only for what HDF5 itself cannot bear: without it, nothing else is hidden
        with patch.object(expression, "try_h5ad", expression.try_h5ad if flipped else check_h5ad):
            adata = expression.read_h5ad(path)
        _facts(adata.uns.get("wbdit", {}))
        self._use(dice, adata)

    def try_object(self, dice):
        adata = self.cells[dice.of(self.cells)].copy()
        for _ in range(1 + dice.below(2)):
            with suppress(ValueError):  # AnnData's own, of an object that is damaged already
                _damage_object(dice, adata)
        self._use(dice, adata)

    def _use(self, dice, adata):
        """Do what a command would do with cells."""
        way, label = dice.below(6), dice.of(["type", "condition", None])
        source = (
            Source()
            if dice.chance(0.8)
            else dice.of(
                [Source(layer="counts"), Source(use_raw=True), Source(space="scaled"), Source(round_counts=True)]
            )
        )
        if way < 2:
            Preprocessor.fit(
                adata, label=label, continuous=dice.of([None, "age"]), max_genes=dice.of([5, None]), source=source
            )
        elif way == 2:
            parts = wbdit.split(adata, label=label)
            assert sum(part.n_obs for part in parts) == adata.n_obs
        elif way == 3:
            sets = (
                {"real": self.cells["csr"], "synthetic": adata}
                if dice.chance(0.5)
                else {"real": adata, "synthetic": self.cells["csr"]}
            )
            align(sets, label=label, n_genes=dice.of([5, 100]), source=source)
        elif way == 4:
            self.generators[dice.of(self.generators)].preprocessor.encode(adata)
        else:
            check(self.generators[dice.of(["one", "two"])].generate(like=adata, calls=2))

    def try_run(self, dice):
        """Load a damaged run, and generate with it."""
        kind, folder = dice.of(self.runs), self.folder / "input"
        damage.damage_run(dice, self.runs, kind, folder)
        generator = wbdit.load(folder, device="cpu")
        repr(generator)
        check(generator.generate(3, calls=dice.of([1, 2]), seed=0))
        if dice.chance(0.1):
            generator.save(self.folder / "again")
        if dice.chance(0.05):
            cells = self.cells["log" if kind == "log" else "csr"]
            wbdit.fit(cells, out=folder, resume=True, steps=3, device="cpu", progress=False)

    def try_request(self, dice):
        kind = dice.of(self.generators)
        given = {"calls": 2}
        for _ in range(1 + dice.below(3)):
            given |= _argument(dice, self.cells)
        if not {"n", "n_per_label", "like"} & set(given):
            given["n"] = 2
        cells = _few(given)
        if cells:
            check(self.generators[kind].generate(**given))

    def try_text(self, dice):
        way = dice.below(8)
        if way < 2:
            path = self.folder / "genes.txt"
            content = "\n".join(dice.of([dice.text(), f"gene-{dice.below(12)}"]) for _ in range(dice.below(6)))
            content = content.encode("utf-8", dice.of(["replace", "surrogatepass"]))
            path.write_bytes(dice.bytes(content) if dice.chance(0.5) else content)
            Preprocessor.fit(self.cells["csr"], genes=read_gene_list(path))
        elif way < 5:
            name = dice.of(
                [
                    "training.batch_size",
                    "model.depth",
                    "model.hidden_size",
                    "likelihood.stop",
                    "schedule",
                    "training.betas",
                    "max_genes",
                    dice.text(),
                ]
            )
            with_settings(
                bases.preset(), [f"{name}={dice.of([dice.text(), str(dice.number()), '1,2', 'true', '1' * 5000])}"]
            )
        else:
            text = dice.of(
                [
                    f"{dice.text()}={dice.number()}",
                    dice.text(),
                    f"B={dice.number()},NK={dice.text()}",
                    "=".join(dice.text() for _ in range(3)),
                ]
            )
            dice.of([_parse_per_label, _parse_library_size])(text)
            dice.of([_parse_at, _parse_guidance, _parse_toward])((text,))

    def try_command(self, dice):
        """Run a whole command in this process."""
        data, run, out = self.folder / "input.h5ad", self.folder / "input", self.folder / "out.h5ad"
        data.write_bytes(self.files["csr"])
        which = dice.below(3)
        if which == 0:
            damage.damage_run(dice, self.runs, dice.of(self.runs), run)
            arguments = [
                "generate",
                run,
                "--out",
                out,
                *_flags(
                    dice,
                    [
                        "--n",
                        "--per-label",
                        "--at",
                        "--guidance",
                        "--seed",
                        "--calls",
                        "--library-size",
                        "--mix",
                        "--toward",
                    ],
                ),
            ]
        elif which == 1:
            damage.damage_h5ad(dice, self.files["csr"], data)
            arguments = [
                "split",
                data,
                "--train",
                self.folder / "a.h5ad",
                "--test",
                self.folder / "b.h5ad",
                *_flags(dice, ["--label", "--share", "--donor", "--hold-out"]),
            ]
        else:
            arguments = [
                "train",
                data,
                "--out",
                self.folder / "new" / str(dice.below(10**9)),
                "--steps",
                "1",
                "--device",
                "cpu",
                *_flags(
                    dice,
                    [
                        "--label",
                        "--continuous",
                        "--max-genes",
                        "--genes",
                        "--layer",
                        "--space",
                        "--validation",
                        "--set",
                    ],
                ),
            ]
            arguments += [
                "--set",
                "model.hidden_size=8",
                "--set",
                "model.num_heads=2",
                "--set",
                "model.depth=1",
                "--set",
                "model.patch_size=4",
            ]
        try:
            cli.run([str(argument) for argument in arguments])
        except SystemExit as end:
            if end.code not in (0, 2):
                raise WrongCells(f"exit code {end.code}") from end


def _parse_library_size(text):
    return _parse_library("--library-size", text)


def check(cells):
    """Check that generated cells are cells: finite, counts whole and zero or more."""
    X = cells.X.data if sp.issparse(cells.X) else cells.X
    if not np.isfinite(X).all():
        raise WrongCells("values are not finite")
    if cells.uns["wbdit"]["trained_on"] == "counts" and not ((X >= 0).all() and (np.rint(X) == X).all()):
        raise WrongCells("counts are not whole, or negative")


def _few(given):
    """Whether a request is small: a large one is honest work, not a fault."""
    n = given.get("n")
    asked = given.get("n_per_label")
    numbers = [n] if n is not None else list(asked.values()) if isinstance(asked, dict) else []
    return all(not isinstance(x, (int, float)) or not x > 1000 for x in numbers)


def _argument(dice, cells):
    name = dice.of(
        [
            "n",
            "n_per_label",
            "sampler",
            "calls",
            "spacing",
            "guidance",
            "toward",
            "at",
            "library_size",
            "library_factor",
            "seed",
            "batch_size",
            "like",
        ]
    )
    key = dice.of(["B", "NK", "B/stim", "NK/*", "*", "type", "condition", "age", ("B", "stim"), dice.text()])
    if name == "like":
        return {"like": cells[dice.of(cells)]}
    if name == "toward":
        return {
            "toward": {dice.of(["type", "condition", dice.text()]): dice.of(["B", "stim", dice.text()])},
            "mix": dice.of([0.5, dice.number()]),
        }
    if name in ("n_per_label", "guidance", "at", "library_size", "library_factor") and dice.chance(0.7):
        return {name: {key: dice.of([2, 0.5, dice.number(), [0.1, dice.number()]])}}
    if name in ("calls", "batch_size"):
        return {name: dice.of([1, 2, 0, -1, 10**6])}
    if name == "seed":
        return {name: dice.of([0, -1, 2**63, 2**64, 10**30, 1.5, "x", None])}
    return {name: dice.of([dice.value(), dice.number(), 3])}


def _flags(dice, names):
    found = []
    for _ in range(dice.below(4)):
        text = dice.of(
            [dice.text(), str(dice.of([1, 2, 3, 0, -1, 0.5])), "type", "B=2", "condition", "age=30", "gene-1"]
        )
        found += [dice.of(names), text.replace("\0", "").replace("\ud800", "?") if dice.chance(0.9) else text]
    return found


def _damage_object(dice, adata):
    """Damage an AnnData in memory as Python code can."""
    way = dice.below(8)
    X = adata.X if dice.chance(0.7) or not len(adata.layers) else adata.layers[dice.of(adata.layers)]
    if way < 5 and sp.issparse(X):
        name = dice.of(["indices", "indptr", "data"])
        array = getattr(X, name)
        kind = dice.below(5)
        if kind == 0:
            array = array[: dice.below(len(array))]
        elif kind == 1:
            array = array.astype(dice.of(["f4", "i8", "u4", "f8", "f2", "i4"]))
        elif kind == 2:
            array = array[::-1].copy()
        else:
            array = array.copy()
            with np.errstate(all="ignore"), suppress(OverflowError):
                array[dice.below(len(array))] = dice.of([-1, 9, 12, 1000, 2**30, np.iinfo(np.int32).min])
        setattr(X, name, array)
        if dice.chance(0.1):
            X._shape = dice.of([(12, 10**12), (10**12, 9), (5, 9), (12, 3)])
    elif way < 5:
        where = tuple(dice.below(n) for n in X.shape)
        X[where] = np.float32(dice.of([np.nan, np.inf, -1, 1e30, 0.5, 2**25]))
    elif way == 5:
        names = list(adata.var_names)
        names[dice.below(len(names))] = dice.of([dice.text(), "gene-0"])
        adata.var_names = names
    elif way == 6:
        adata.obs[dice.of(["type", "condition", "age"])] = dice.of(
            [
                np.nan,
                1,
                "B",
                None,
                pd.Timestamp("2020-01-01"),
                [dice.text() for _ in range(adata.n_obs)],
                [dice.value() for _ in range(adata.n_obs)],
            ]
        )
    else:
        adata.uns["wbdit"] = dice.of([dice.value(), {"trained_on": dice.value()}, {dice.text(): dice.value()}])
