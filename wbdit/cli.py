"""The command line: arguments, messages and exit codes. Other modules do the work."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from wbdit import __version__
from wbdit._flags import Group, with_flags
from wbdit._signals import Terminated, terminating
from wbdit.errors import InputError, SharedError

FILE = click.Path(dir_okay=True, path_type=Path)  # each command checks its paths itself, with clearer messages

SEED = click.IntRange(0, 2**63 - 1)
MOST_OF_A_FACT = 200  # characters in a report
QUIET, JSON = "wbdit.quiet", "wbdit.json"  # keys of click's context

logger = logging.getLogger("wbdit")


def _reading_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that choose the matrix and say what it holds."""
    for option in reversed(
        [
            click.option("--layer", help="Use the values of this layer; X for X.  [default: where counts are found]"),
            click.option("--use-raw", is_flag=True, help="Use raw.X and its genes."),
            click.option("--space", help="What the values are: counts, lognorm or scaled.  [default: detected]"),
            click.option("--round", "round_counts", is_flag=True, help="Round counts that are not integers."),
        ]
    ):
        command = option(command)
    return command


def _set_threads(context: click.Context, option: click.Parameter, threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _set_quiet(context: click.Context, option: click.Parameter, quiet: bool) -> None:
    context.meta[QUIET] = quiet
    if quiet:
        logger.setLevel(logging.WARNING)


def _set_json(context: click.Context, option: click.Parameter, as_json: bool) -> None:
    context.meta[JSON] = as_json


def _output_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --quiet and --json, which reach no command's arguments."""
    quiet, as_json = "No progress, and only warnings on stderr.", "Print the result as one line of JSON on stdout."
    command = click.option("--json", is_flag=True, expose_value=False, callback=_set_json, help=as_json)(command)
    return click.option("--quiet", is_flag=True, expose_value=False, callback=_set_quiet, help=quiet)(command)


_threads = click.option(
    "--threads",
    type=click.IntRange(1),
    expose_value=False,
    callback=_set_threads,
    help="CPU threads of PyTorch.  [default: one per core]",
)


_overwrite = click.option(
    "--overwrite", is_flag=True, help="Replace an existing file even if it is no such output of wbdit."
)


def _shows_progress() -> bool:
    return not click.get_current_context().meta[QUIET]


def _wants_json() -> bool:
    return click.get_current_context().meta[JSON]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="wbdit")
def cli() -> None:
    """Train a White-Box Diffusion Transformer on single cells, and generate cells with it."""


@cli.command()
@click.option("--out", type=FILE, default=Path("demo"), show_default=True, help="Folder to write.")
@click.option("--minutes", type=float, default=1.0, show_default=True, help="Training time in minutes.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed.")
@_overwrite
def demo(out: Path, minutes: float, seed: int, overwrite: bool) -> None:
    """Train, generate and evaluate on real cells.

    The demo uses 700 blood cells, works offline and takes a few minutes.
    """
    from wbdit.demo import run_demo

    evaluation = run_demo(out, minutes=minutes, seed=seed, overwrite=overwrite)
    click.echo(evaluation.table())
    _say(f"open {out / 'report.html'} for the scores and {out / 'readout' / 'explain.html'} for the model's blocks")


@cli.command()
@click.argument("data", type=FILE)
@click.option("--train", type=FILE, required=True, help="File for the training cells, .h5ad.")
@click.option("--test", type=FILE, required=True, help="File for the held-out cells, .h5ad.")
@click.option(
    "--share", type=float, help="Share of the cells, or with --donor of the donors, to train on.  [default: 0.8]"
)
@click.option("--label", multiple=True, help="Column of obs with the labels; repeatable. Each is split by --share.")
@click.option("--donor", help="Column of obs with the donors: hold out whole donors.")
@click.option(
    "--hold-out",
    multiple=True,
    metavar="LABEL",
    help='Hold out all cells with this label: "NK". With two label columns: "NK/stim" or "NK/*"; repeatable.',
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed.")
@_overwrite
def split(data: Path, train: Path, test: Path, hold_out: tuple[str, ...], overwrite: bool, **options: Any) -> None:
    """Split the cells of DATA.h5ad into cells to train on and held-out cells to evaluate with.

    By default, cells are drawn at random, with --label from each label.
    """
    from wbdit._io import write_h5ads
    from wbdit._outputs import check_writable, has_uns
    from wbdit.data.files import read_cells
    from wbdit.data.split import MARK
    from wbdit.data.split import split as split_cells

    if len({path.resolve() for path in (data, train, test)}) < 3:
        raise InputError("DATA, --train and --test must be three different files")
    for path in (train, test):
        check_writable(path, overwrite=overwrite, is_ours=has_uns(MARK))
    parts = split_cells(read_cells(data), hold_out=hold_out or None, **options)
    write_h5ads(dict(zip((train, test), parts, strict=True)))
    _say(f"{train}: {parts[0].n_obs} cells to train on; {test}: {parts[1].n_obs} held-out cells")


@cli.command()
@click.argument("data", type=FILE, nargs=-1, required=True)
@click.option("--out", type=FILE, required=True, help="RUN folder to write.")
@click.option("--label", multiple=True, help="Column of obs to condition on, such as the cell type; repeatable.")
@click.option(
    "--continuous", multiple=True, help="Numeric column of obs to condition on, such as pseudotime; repeatable."
)
@click.option("--preset", help="small, base, paper or dit.  [default: small]")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Setting of the preset, such as training.learning_rate=3e-4 or model.hidden_size=128; repeatable.",
)
@click.option("--minutes", type=float, help="Training time in minutes.")
@click.option("--epochs", type=float, help="Passes over the cells.  [default: 50 for small]")
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--max-genes", type=int, help="Keep at most this many genes, the most variable.  [default: 2000]")
@click.option("--genes", help="Genes to use: a boolean column of var, or a FILE.txt with one name per line.")
@click.option("--batch-key", help="Column of obs: the most variable genes are ranked in each of its batches.")
@_reading_options
@click.option("--seed", type=SEED, help="Random seed.  [default: 0]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--precision", default="auto", show_default=True, help="auto, fp32 or bf16.")
@click.option("--validation", type=float, help="Share of the cells to hold out, such as 0.1; logs their loss.")
@click.option(
    "--early-stopping",
    type=float,
    metavar="PASSES",
    help="End after this many passes without a lower loss of the held-out cells, and keep the best weights.",
)
@click.option("--resume", is_flag=True, help="Resume the run in --out, on the same cells.")
@click.option("--overwrite", is_flag=True, help="Replace a run in --out.")
@click.option("--tensorboard", type=FILE, help="Folder for TensorBoard logs.")
@_threads
@_output_options
def train(data: tuple[Path, ...], out: Path, preset: str | None, settings: tuple[str, ...], **options: Any) -> None:
    """Train on the cells of DATA, .h5ad or .zarr.

    The cells of several DATA are joined on the genes that all have. Large files are read in pieces, not as a whole.

    Ctrl-C stops early and saves the run. So do SIGTERM and SIGHUP, with exit status 143 and 129. --resume goes on.
    """
    from wbdit.data.genes import read_gene_list
    from wbdit.training.config import Preset
    from wbdit.training.distributed import joined
    from wbdit.training.fit import fit
    from wbdit.training.settings import with_settings

    if settings and options["resume"]:
        raise InputError("a resumed run keeps its settings: give --set only for a new run")
    chosen = with_settings(Preset.from_name(preset or "small"), settings) if settings else preset
    if (options["genes"] or "").endswith(".txt"):
        options["genes"] = read_gene_list(options["genes"])
    with joined() as ranks:
        generator = fit(list(data), out=out, preset=chosen, progress=_shows_progress(), **options)
    if not ranks.is_first:
        return
    trained = generator.config.trained
    took = f"{trained.steps} steps in {trained.seconds:.0f} s"
    logger.info(f"{out}: {took}; next: wbdit generate {out} --n 1000 --out synthetic.h5ad")
    if _wants_json():
        _print_json(
            run=str(out),
            steps=trained.steps,
            passes=trained.epochs,
            seconds=trained.seconds,
            total_seconds=trained.total_seconds,
            loss=generator.history[-1].get("loss") if generator.history else None,
            validation_loss=trained.validation_loss,
            model_hash=generator.config.model_hash,
        )


@cli.command()
@click.argument("run", type=FILE)
@click.option("--out", type=FILE, required=True, help="File to write, .h5ad or .zarr.")
@click.option("--n", type=int, help="Number of cells. With --like, in its label proportions.")
@click.option("--like", type=FILE, help="An .h5ad file whose labels and covariates to copy, one cell per cell.")
@click.option(
    "--per-label", "n_per_label", help='Cells per label: "NK=200,B=100". With two label columns: "NK/stim=200,B/*=100".'
)
@click.option("--sampler", help="ddim, ddpm, unipc, dpmpp or sde-dpmpp.  [default: unipc for counts, else ddim]")
@click.option(
    "--calls", type=int, help="Number of model calls.  [default: 3 to 15 for counts, else 50 for ddim, 999 for ddpm]"
)
@click.option(
    "--spacing", help="Spacing of the calls: uniform, logsnr or sqrt.  [default: uniform for counts, ddim, ddpm]"
)
@click.option(
    "--guidance",
    multiple=True,
    help="Weight of classifier-free guidance: 2, or condition=3 for a column; repeatable.  [default: 1]",
)
@click.option("--toward", multiple=True, help='Label to interpolate toward: "condition=stim"; repeatable.')
@click.option("--mix", type=float, help="Interpolation weight of --toward, 0 to 1.")
@click.option(
    "--at", multiple=True, help='Covariate of the cells: "pseudotime=0.5", or points: "pseudotime=0,0.5,1"; repeatable.'
)
@click.option("--library-size", help='Total counts per cell: 5000, or by label "NK=5000,B=3000".  [default: drawn]')
@click.option("--library-factor", help='Factor of the library sizes: 2, or by label "NK=2,B=1.5".')
@click.option(
    "--steer",
    multiple=True,
    help="Move cells along a head's axis, by standard deviations of the noise: block-1-head-2=1.5; repeatable.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed.")
@click.option(
    "--batch-size",
    type=int,
    help="Cells in memory at a time; does not change the cells.  [default: 256 on a GPU, 64 per thread on a CPU]",
)
@click.option("--chunk", type=int, help="Cells per chunk that is kept on disk; does not change the file.")
@click.option("--resume", is_flag=True, help="Go on from the finished chunks of a killed process.")
@click.option("--rank", type=int, help="Number of this process, from 0.  [default: RANK, which torchrun sets]")
@click.option("--ranks", type=int, help="Number of processes, each with a file.  [default: WORLD_SIZE]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@_overwrite
@_threads
@_output_options
def generate(
    run: Path,
    out: Path,
    like: Path | None,
    n_per_label: str | None,
    guidance: tuple[str, ...],
    toward: tuple[str, ...],
    at: tuple[str, ...],
    library_size: str | None,
    library_factor: str | None,
    steer: tuple[str, ...],
    device: str,
    overwrite: bool,
    rank: int | None,
    ranks: int | None,
    **options: Any,
) -> None:
    """Generate synthetic cells with a trained RUN.

    Memory holds one chunk of them. A killed process goes on with --resume. Several processes, as torchrun starts them,
    write one file each, which wbdit join makes one.
    """
    from wbdit._outputs import check_writable, has_uns
    from wbdit.cell_files import check_format, reading
    from wbdit.data.files import read_cells
    from wbdit.data.space import describe
    from wbdit.generator import load
    from wbdit.streaming import part_path

    rank, ranks = _rank(rank, ranks)
    check_writable(part_path(out, rank, ranks), overwrite=overwrite, is_ours=has_uns("wbdit"))
    check_format(out)
    began = time.monotonic()
    generator = load(run, device=_device_of_rank(device))
    cells = read_cells(like) if like is not None else None
    options |= {
        "n_per_label": _parse_per_label(n_per_label),
        "guidance": _parse_guidance(guidance),
        "toward": _parse_toward(toward),
        "at": _parse_at(at),
        "library_size": _parse_library("--library-size", library_size),
        "library_factor": _parse_library("--library-factor", library_factor),
        "steer": _numbers_by_name("--steer", steer, "block-1-head-2=1.5"),
    }
    out = generator.generate_to(out, like=cells, rank=rank, ranks=ranks, progress=_shows_progress(), **options)
    with reading(out) as root:
        n = root["obs"]["_index"].shape[0]
    genes = len(generator.preprocessor.genes)
    logger.info(f"{out}: {n} cells, {genes} genes, X holds {describe(generator.preprocessor.space)}")
    if _wants_json():
        _print_json(
            out=str(out),
            cells=n,
            genes=genes,
            seconds=round(time.monotonic() - began, 1),
            seed=options["seed"],
            model_hash=generator.config.model_hash,
        )


@cli.command()
@click.argument("parts", type=FILE, nargs=-1, required=True)
@click.option("--out", type=FILE, required=True, help="File to write, .h5ad or .zarr.")
@_overwrite
def join(parts: tuple[Path, ...], out: Path, overwrite: bool) -> None:
    """Join the files that wbdit generate wrote over several ranks."""
    from wbdit._outputs import check_writable, has_uns
    from wbdit.streaming import join as join_files

    check_writable(out, overwrite=overwrite, is_ours=has_uns("wbdit"))
    join_files(parts, out)
    _say(f"{out}: joined {len(parts)} files")


@cli.command()
@click.argument("data", type=FILE)
@click.option("--out", type=FILE, required=True, help="File to write, .h5ad.")
@click.option("--label", required=True, help="Column of obs with the labels.")
@click.option(
    "--min",
    "min_cells",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Fewest cells per label.",
)
@click.option(
    "--run", "generator", type=FILE, help="RUN folder to generate with. Without it, a generator is trained first."
)
@click.option("--minutes", type=float, help="Training time in minutes, without --run.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@_overwrite
def augment(
    data: Path,
    out: Path,
    generator: Path | None,
    minutes: float | None,
    device: str,
    overwrite: bool,
    **options: Any,
) -> None:
    """Add synthetic cells to the labels of DATA.h5ad that have few.

    The column "synthetic" of obs tells real and synthetic cells apart. The result keeps the genes of the RUN. It can
    balance a classifier. It is not for statistics such as differential expression: synthetic cells do not increase n.
    """
    from wbdit._io import write_h5ad
    from wbdit._outputs import check_writable, has_uns
    from wbdit.augmentation import augment as add_cells
    from wbdit.data.files import read_cells
    from wbdit.generator import load

    check_writable(out, overwrite=overwrite, is_ours=has_uns("wbdit"))
    cells = read_cells(data)
    if generator is not None:
        options |= {"generator": load(generator, device=device)} | ({} if minutes is None else {"minutes": minutes})
    else:
        options |= {"minutes": minutes, "device": device}
    augmented = add_cells(cells, **options)
    write_h5ad(augmented, out)
    added = int(augmented.obs["synthetic"].sum())
    _say(f"{out}: {augmented.n_obs - added} real and {added} synthetic cells, {augmented.n_vars} genes")


@cli.command()
@click.argument("run", type=FILE)
@click.argument("data", type=FILE)
@click.option("--toward", multiple=True, help='New label of a column: "condition=stim"; repeatable.')
@click.option("--out", type=FILE, required=True, help="The .h5ad file to write.")
@click.option(
    "--draws", type=int, default=1, show_default=True, help="Draws; with several, their mean and deviation too."
)
@click.option("--calls", type=int, help="Number of model calls of the sampler.  [default: 15]")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@_overwrite
@_threads
@_output_options
def recast(
    run: Path, data: Path, toward: tuple[str, ...], out: Path, device: str, overwrite: bool, **options: Any
) -> None:
    """Put the cells of DATA into another condition, batch or donor, with a trained RUN.

    Each cell keeps its library size and what its labels do not explain. The layer "original" holds the counts before.
    """
    from wbdit._io import write_h5ad
    from wbdit._outputs import check_writable, has_uns
    from wbdit.data.files import read_cells
    from wbdit.generator import load

    wanted = _parse_toward(toward)
    if wanted is None:
        raise InputError("recast to which labels? give --toward, such as condition=stim")
    check_writable(out, overwrite=overwrite, is_ours=has_uns("wbdit"))
    began, generator, cells = time.monotonic(), load(run, device=device), read_cells(data)
    made = generator.recast(cells, toward=wanted, progress=_shows_progress(), **options)
    write_h5ad(made, out)
    logger.info(
        f"{out}: {made.n_obs} cells, {made.n_vars} genes, now {', '.join(f'{k}={v}' for k, v in wanted.items())}"
    )
    if _wants_json():
        seconds = round(time.monotonic() - began, 1)
        _print_json(out=str(out), cells=made.n_obs, genes=made.n_vars, seconds=seconds, seed=options["seed"])


@cli.command()
@click.argument("data", type=FILE)
@click.option(
    "--effects", type=FILE, required=True, help="CSV with columns gene and log_fold_change, and label if wanted."
)
@click.option("--out", type=FILE, required=True, help="File to write, .h5ad or .zarr.")
@click.option("--label", help="Column of obs with the labels, such as the cell type.")
@click.option("--run", "generator", type=FILE, help="A RUN whose dispersions to take.")
@click.option("--n", type=int, help="Number of cells.  [default: one per cell of DATA]")
@click.option(
    "--pseudo-count", type=float, default=0.01, show_default=True, help="Counts per 10,000 of the log fold changes."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed.")
@_overwrite
@_output_options
def emit(data: Path, effects: Path, out: Path, generator: Path | None, overwrite: bool, **options: Any) -> None:
    """Put effects that another model predicts into the control cells of DATA.

    Log fold changes by gene become raw counts. Genes without an effect keep their counts.
    """
    from wbdit._outputs import check_writable, has_uns
    from wbdit.data.files import open_cells
    from wbdit.emission import Effects, emit_to
    from wbdit.generator import load

    check_writable(out, overwrite=overwrite, is_ours=has_uns("wbdit"))
    read = Effects.of(effects)  # before the run and the cells, which take longer
    began, run = time.monotonic(), None if generator is None else load(generator, device="cpu")
    emit_to(out, open_cells(data), read, generator=run, progress=_shows_progress(), **options)
    _say(f"{out}: written in {time.monotonic() - began:.0f} s")
    if _wants_json():
        _print_json(out=str(out), seconds=round(time.monotonic() - began, 1), seed=options["seed"])


@cli.command()
@click.argument("real", type=FILE)
@click.argument("synthetic", type=FILE)
@click.option("--train", type=FILE, help="Training cells, for the baseline. Without them, REAL is split into halves.")
@click.option("--label", help="Column of obs with the labels.")
@click.option("--condition", help="Column of obs with conditions, such as a treatment: compares genes between them.")
@click.option("--donor", help="Column of obs with donors or batches: floors and memorization are then between donors.")
@click.option("--full", is_flag=True, help="All metrics and three draws of the cells; takes minutes.")
@click.option(
    "--ignore",
    multiple=True,
    metavar="LABEL",
    help="Label to exclude from per-type metrics, such as unassigned; repeatable.",
)
@_reading_options
@click.option(
    "--bootstrap", type=int, default=200, show_default=True, help="Resamples for the 95 % intervals; 0 for none."
)
@click.option("--out", type=FILE, required=True, help="Folder for metrics.json and report.html.")
@_overwrite
@_output_options
def evaluate(
    real: Path,
    synthetic: Path,
    train: Path | None,
    label: str | None,
    out: Path,
    overwrite: bool,
    **options: Any,
) -> None:
    """Compare synthetic with held-out real cells.

    Each score of SYNTHETIC.h5ad against REAL.h5ad comes with a baseline: the score that other real cells get.
    """
    from wbdit.data.files import read_cells
    from wbdit.evaluation import evaluate as judge
    from wbdit.report.evaluation import check_report, write_report

    check_report(out, overwrite=overwrite)
    cells = read_cells(real), read_cells(synthetic)
    trained_on = read_cells(train) if train is not None else None
    result = judge.evaluate(*cells, train=trained_on, label=label, progress=_shows_progress(), **options)
    facts = {"Real": real.name, "Synthetic": synthetic.name, **_facts(cells[1].uns.get("wbdit", {}))}
    logger.info("drawing the report; on first use UMAP compiles itself, which takes half a minute")
    write_report(result, out, title=f"{synthetic.stem} compared with {real.stem}", facts=facts)
    if _wants_json():
        _print_json(out=str(out), **result.to_dict())
    else:
        click.echo(result.table())
    logger.info(f"open {out / 'report.html'}")


@cli.command()
@click.argument("run", type=FILE)
@click.argument("data", type=FILE)
@click.option("--out", type=FILE, required=True, help="Folder for explain.html, explain.json and figures/.")
@click.option("--cells", type=click.IntRange(1), default=500, show_default=True, help="Maximum number of cells to use.")
@click.option("--ablate", is_flag=True, help="Also generate cells without each head, which takes minutes.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@_overwrite
def explain(
    run: Path, data: Path, out: Path, cells: int, ablate: bool, seed: int, device: str, overwrite: bool
) -> None:
    """Explain each block of a trained RUN.

    The report shows the effect of each block on the real cells of DATA.h5ad, and the genes of its heads and atoms. With
    --ablate, it also shows what each head causes.
    """
    from wbdit.data.files import read_cells
    from wbdit.generator import load
    from wbdit.report.explain import check_explanation, write_explanation
    from wbdit.whitebox.explain import explain as look_into
    from wbdit.whitebox.findings import findings

    check_explanation(out, overwrite=overwrite)
    found = look_into(load(run, device=device), read_cells(data), cells=cells, seed=seed, ablate=ablate)
    page = write_explanation(found, out, title=f"{run.name} on {data.stem}")
    for finding in findings(found):
        click.echo(f"{finding.question} {finding.verdict.capitalize()}. {finding.answer}")
    _say(f"open {page}")


@cli.command()
def build() -> None:
    """Compile the CPU kernels ahead of time, unless the installed wheel brings them.

    This is for images and clusters: otherwise the first use compiles them. Both write to WBDIT_CACHE, or else to wbdit
    in the user's cache folder. Prints the path of the library.
    """
    from wbdit.ops import build as builder

    try:
        click.echo(builder.build())
    except builder.BuildError as error:
        raise InputError(str(error)) from error


@cli.command()
def info() -> None:
    """Print what works on this machine: versions, kernels, optional packages, and the backend of each op.

    For each part that is missing, it prints the command that installs it.
    """
    from wbdit.system import describe

    click.echo(describe())


def run(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit.

    The status is 0 on success, 2 with one line on stderr for a user error, 130 on Ctrl-C, 143 on SIGTERM and 129 on
    SIGHUP.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # from dependencies, and not for the user to fix
    _log_to_stderr()
    try:
        with terminating():
            code = cli.main(arguments, prog_name="wbdit", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = 0
    except click.ClickException as error:
        code = _fail(error.format_message())
    except SharedError as error:
        code = _fail(str(error)) if error.reports else 2
    except InputError as error:
        code = _fail(str(error))
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nwbdit: interrupted", err=True)
        code = 130
    except Terminated as error:
        click.echo(f"\nwbdit: ended by {error.name}", err=True)
        code = error.code
    sys.exit(code or 0)


def _rank(rank: int | None, ranks: int | None) -> tuple[int, int]:
    """Return the number of this process and of all, as given or as torchrun says."""
    given = {"RANK": rank, "WORLD_SIZE": ranks}
    if (rank is None) != (ranks is None):
        raise InputError("give `rank` and `ranks` together")
    if rank is None:
        try:
            given = {name: int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
        except ValueError:
            raise InputError("the environment variables RANK and WORLD_SIZE must be whole numbers") from None
    return given["RANK"] or 0, given["WORLD_SIZE"] or 1


def _device_of_rank(device: str) -> str:
    """Return the device of this process: with "auto" under torchrun, the GPU with its number on this machine."""
    local = os.environ.get("LOCAL_RANK", "")
    if device != "auto" or not local.isdigit():
        return device
    import torch

    return f"cuda:{local}" if torch.cuda.is_available() else "cpu"


def _parse_per_label(text: str | None) -> dict[str, int] | None:
    if text is None:
        return None
    counts: dict[str, int] = {}
    parts = list(re.finditer(r"\s*(\S.*?)\s*=\s*(\d+)\s*(?:,|$)", text))  # labels may contain "," and "="
    if "".join(part[0] for part in parts) != text or not parts:
        raise InputError(f'cannot read `n_per_label` {text!r}: write it as "NK=200,B=100"')
    for part in parts:
        name, number = part.groups()
        counts[name.strip()] = counts.get(name.strip(), 0) + int(number)
    return counts


def _parse_guidance(texts: tuple[str, ...]) -> float | dict[str, float]:
    weights = _numbers_by_name("--guidance", texts or ("1",), "2, or as condition=3")
    if "" not in weights:
        return weights
    if len(texts) > 1:
        raise InputError("give --guidance one number, or COLUMN=NUMBER once per column")
    return weights[""]


def _numbers_by_name(flag: str, texts: tuple[str, ...], example: str) -> dict[str, float]:
    """Return the numbers of texts such as "condition=3" by name; the name of a number alone is empty."""
    numbers: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            numbers[name.strip()] = float(number)
        except ValueError:
            raise InputError(f"cannot read {flag} {text!r}: write it as {example}") from None
    return numbers


def _parse_toward(texts: tuple[str, ...]) -> dict[str, str] | None:
    pairs = [text.partition("=") for text in texts]
    for text, (column, _, label) in zip(texts, pairs, strict=True):
        if not column.strip() or not label.strip():
            raise InputError(f"cannot read --toward {text!r}: write it as condition=stim")
    return {column.strip(): label.strip() for column, _, label in pairs} or None


def _parse_at(texts: tuple[str, ...]) -> dict[str, float | list[float]] | None:
    points: dict[str, float | list[float]] = {}
    for text in texts:
        column, _, numbers = text.rpartition("=")
        try:
            values = [float(number) for number in numbers.split(",")]
        except ValueError:
            values = []
        if not column.strip() or not values:
            raise InputError(f"cannot read --at {text!r}: write it as pseudotime=0.5, or as pseudotime=0,0.5,1")
        if column.strip() in points:
            raise InputError(f"--at names {column.strip()!r} twice: give its points once, separated by commas")
        points[column.strip()] = values if len(values) > 1 else values[0]
    return points or None


def _parse_library(flag: str, text: str | None) -> float | dict[str, float] | None:
    if text is None:
        return None
    sizes: dict[str, float] = {}
    try:
        if "=" not in text:
            return float(text)
        for part in text.split(","):
            name, _, number = part.rpartition("=")
            if not name.strip():
                raise ValueError(part)
            sizes[name.strip()] = float(number)
    except ValueError:
        raise InputError(f'cannot read {flag} {text!r}: write one number, or "NK=2,B=3"') from None
    return sizes


def _facts(made: Any) -> dict[str, str]:
    """Return the settings in ``uns["wbdit"]`` as text: numbers, strings and values by column, but no lists.

    The file may come from anyone, so there may be anything.
    """
    if not isinstance(made, Mapping):
        return {}
    said = {
        key: ", ".join(f"{name}={one}" for name, one in value.items()) if isinstance(value, Mapping) else str(value)
        for key, value in made.items()
        if all(np.ndim(one) == 0 and not isinstance(one, Mapping) for one in _members(value))
    }
    return {str(key).replace("_", " "): line[:MOST_OF_A_FACT] for key, line in said.items()}


def _members(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else [value]


def _fail(message: str) -> int:
    click.echo(f"wbdit: {' '.join(message.split())}", err=True)
    return 2


class _StderrHandler(logging.Handler):
    """Print each log message to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        context = click.get_current_context(silent=True)
        commands = [] if context is None else [context.command, *cli.commands.values()]
        _say(with_flags(record.getMessage(), commands))


def _log_to_stderr() -> None:
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())
    logger.setLevel(logging.INFO)


def _print_json(**content: Any) -> None:
    click.echo(json.dumps(content))


def _say(line: str) -> None:
    click.echo(line, err=True)
