"""The commands: arguments, progress and exit codes; the work is done elsewhere."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from wbdit import __version__
from wbdit.errors import InputError

FILE = click.Path(dir_okay=True, path_type=Path)  # whether it is there and fit to use is checked with a better message

SEED = click.IntRange(0, 2**63 - 1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="wbdit")
def cli() -> None:
    """Train a White-Box Diffusion Transformer on single cells, and generate cells with it."""


@cli.command()
@click.option("--out", type=FILE, default=Path("demo"), show_default=True, help="Folder to write.")
@click.option("--minutes", type=float, default=1.0, show_default=True, help="Training time.")
@click.option("--seed", type=SEED, default=0, show_default=True)
def demo(out: Path, minutes: float, seed: int) -> None:
    """Do the main job on 700 real blood cells, offline, in a few minutes."""
    from wbdit.demo import run_demo

    evaluation = run_demo(out, minutes=minutes, seed=seed)
    click.echo(evaluation.table())
    _say(f"look at {out / 'report.html'}, and at what the blocks do in {out / 'readout' / 'explain.html'}")


@cli.command()
@click.argument("data", type=FILE)
@click.option("--out", type=FILE, required=True, help="RUN folder to write.")
@click.option("--label", multiple=True, help="Column of obs to condition on, such as the cell type; may be repeated.")
@click.option("--preset", default="small", show_default=True, help="small, base, paper or dit.")
@click.option("--minutes", type=float, help="Training time.")
@click.option("--epochs", type=float, help="Passes over the cells.")
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--max-genes", type=int, help="Where there are more, keep this many variable genes.  [default: 2000]")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--precision", default="auto", show_default=True, help="auto, fp32 or bf16.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, on the same cells.")
@click.option("--tensorboard", type=FILE, help="Folder to write the training log to for TensorBoard.")
def train(data: Path, out: Path, **options: Any) -> None:
    """Train on the cells of DATA.h5ad; Ctrl-C ends early, with the run saved."""
    from wbdit.data.expression import read_h5ad
    from wbdit.training.fit import fit

    generator = fit(read_h5ad(data), out=out, **options)
    trained = generator.config.trained
    took = f"{trained.steps} steps in {trained.seconds:.0f} s"
    _say(f"{out}: {took}; next: wbdit generate {out} --n 1000 --out synthetic.h5ad")


@cli.command()
@click.argument("run", type=FILE)
@click.option("--out", type=FILE, required=True, help="File to write, .h5ad.")
@click.option("--n", type=int, help="Number of cells; with --like, in its proportions of labels.")
@click.option("--like", type=FILE, help="An .h5ad whose labels to imitate, cell by cell.")
@click.option("--per-label", help='Number of cells of each label: "NK=200,B=100"; "NK/stim=200,B/*=100".')
@click.option("--sampler", help="ddim, ddpm, unipc, dpmpp or sde-dpmpp.  [default: unipc for counts, else ddim]")
@click.option("--calls", type=int, help="Calls of the model.  [default: 15 for counts, else 50 for ddim, 999 for ddpm]")
@click.option("--spacing", help="Their spacing: uniform, logsnr or sqrt.  [default: uniform for counts, ddim and ddpm]")
@click.option(
    "--guidance", multiple=True, help="Classifier-free guidance: 2, or condition=3 for a column.  [default: 1]"
)
@click.option("--toward", multiple=True, help='Label that the cells lie toward: "condition=stim".')
@click.option("--mix", type=float, help="How far they lie toward it, 0 to 1.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--batch-size", type=int, default=256, show_default=True, help="Cells at a time; does not change them.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
def generate(
    run: Path,
    out: Path,
    like: Path | None,
    per_label: str | None,
    guidance: tuple[str, ...],
    toward: tuple[str, ...],
    device: str,
    **options: Any,
) -> None:
    """Generate synthetic cells with a trained RUN."""
    from wbdit._io import check_writable, write_h5ad
    from wbdit.data.expression import describe, read_h5ad
    from wbdit.generator import load

    check_writable(out)
    generator = load(run, device=device)
    cells = read_h5ad(like) if like is not None else None
    options |= {
        "n_per_label": _parse_per_label(per_label),
        "guidance": _parse_guidance(guidance),
        "toward": _parse_toward(toward),
    }
    synthetic = generator.generate(like=cells, progress=True, **options)
    write_h5ad(synthetic, out)
    space = describe(generator.preprocessor.space)
    _say(f"{out}: {synthetic.n_obs} cells, {synthetic.n_vars} genes, X holds {space}")


@cli.command()
@click.argument("real", type=FILE)
@click.argument("synthetic", type=FILE)
@click.option("--train", type=FILE, help="The cells trained on: they make the floor. Without, REAL is halved.")
@click.option("--label", help="Column of obs with the labels.")
@click.option(
    "--ignore", multiple=True, metavar="LABEL", help="A label that is no type, such as unassigned; repeatable."
)
@click.option("--bootstrap", type=int, default=200, show_default=True, help="Resamples for the intervals; 0 for none.")
@click.option("--out", type=FILE, required=True, help="Folder for metrics.json and report.html.")
def evaluate(real: Path, synthetic: Path, train: Path | None, label: str | None, out: Path, **options: Any) -> None:
    """Compare SYNTHETIC.h5ad with held-out REAL.h5ad, every figure beside its real-against-real floor."""
    from wbdit._io import check_writable
    from wbdit.data.expression import read_h5ad
    from wbdit.evaluation import evaluate as judge
    from wbdit.report.evaluation import write_report

    check_writable(out / "report.html")
    cells = read_h5ad(real), read_h5ad(synthetic)
    trained_on = read_h5ad(train) if train is not None else None
    result = judge.evaluate(*cells, train=trained_on, label=label, **options)
    facts = {"Real": real.name, "Synthetic": synthetic.name, **_facts(cells[1].uns.get("wbdit", {}))}
    _say("drawing the report; UMAP compiles itself the first time, which takes half a minute")
    write_report(result, out, title=f"{synthetic.stem} beside {real.stem}", facts=facts)
    click.echo(result.table())
    _say(f"look at {out / 'report.html'}")


@cli.command()
@click.argument("run", type=FILE)
@click.argument("data", type=FILE)
@click.option("--out", type=FILE, required=True, help="Folder for explain.html, explain.json and figures/.")
@click.option("--cells", type=click.IntRange(1), default=500, show_default=True, help="Most cells to look at.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
def explain(run: Path, data: Path, out: Path, cells: int, seed: int, device: str) -> None:
    """Show what each block of a RUN does to the real cells of DATA.h5ad, and which genes it speaks for."""
    from wbdit._io import check_writable
    from wbdit.data.expression import read_h5ad
    from wbdit.generator import load
    from wbdit.report.explain import write_explanation
    from wbdit.whitebox.explain import explain as look_into
    from wbdit.whitebox.findings import findings

    check_writable(out / "explain.html")
    found = look_into(load(run, device=device), read_h5ad(data), cells=cells, seed=seed)
    page = write_explanation(found, out, title=f"{run.name} on {data.stem}")
    for finding in findings(found):
        click.echo(f"{finding.question} {finding.verdict.capitalize()}. {finding.answer}")
    _say(f"look at {page}")


@cli.command()
def build() -> None:
    """Compile the CPU kernels ahead of time, for images and clusters.

    Without it the first use compiles them, into the same folder: WBDIT_CACHE, or else wbdit in the user's cache. Prints
    the library's path.
    """
    from wbdit.ops import build as builder

    try:
        click.echo(builder.build())
    except builder.BuildError as error:
        raise InputError(str(error)) from error


@cli.command()
def info() -> None:
    """Print versions, devices, and which backend each op runs on here."""
    import torch

    from wbdit import ops
    from wbdit.ops import build as builder
    from wbdit.ops import cpu

    cpu.cpu_level()  # builds the kernels, so that what follows is what a user of the ops will have
    click.echo(f"wbdit {__version__}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    devices = ["cpu"]
    if torch.cuda.is_available():
        click.echo(f"cuda: {torch.cuda.get_device_name()}")
        devices.append("cuda")
    else:
        click.echo("cuda: no device")
    click.echo(f"cpu kernels: {builder.status()}")
    for device in devices:
        for op, backend in ops.serving(device).items():
            click.echo(f"  {device:4}  {op:22}  {backend}{_why(device, backend)}")


def _why(device: str, backend: str) -> str:
    """Say why this backend serves an op on this device."""
    from wbdit import ops
    from wbdit.ops import build as builder
    from wbdit.ops import cpu, triton

    if backend == "csrc":
        return f" ({cpu.cpu_level()})"
    if backend == "triton":
        return f" ({triton.version()})"
    if ops.active_backend() == "reference":
        return " (forced by WBDIT_BACKEND)"
    if device == "cpu" and not builder.available():
        return " (the kernels cannot be built, see above)"
    if device == "cuda" and not triton.available():
        return ' (no triton here: pip install "wbdit[gpu]")'
    return " (no kernel for this device)" if backend == "reference" else ""


def run(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0, or 2 with one line on stderr for a mistake the user can mend."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, about libraries
    _log_to_stderr()
    try:
        code = cli.main(arguments, prog_name="wbdit", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = 0
    except click.ClickException as error:
        code = _fail(error.format_message())
    except InputError as error:
        code = _fail(str(error))
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nwbdit: interrupted", err=True)
        code = 130
    sys.exit(code or 0)


def _parse_per_label(text: str | None) -> dict[str, int] | None:
    if text is None:
        return None
    counts: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        if not name.strip() or not number.strip().isdigit():
            raise InputError(f'cannot read --per-label {text!r}: write it as "NK=200,B=100"')
        counts[name.strip()] = counts.get(name.strip(), 0) + int(number)
    return counts


def _parse_guidance(texts: tuple[str, ...]) -> float | dict[str, float]:
    weights: dict[str, float] = {}
    for text in texts or ("1",):
        column, _, number = text.rpartition("=")
        try:
            weights[column.strip()] = float(number)
        except ValueError:
            raise InputError(f"cannot read --guidance {text!r}: write it as 2, or as condition=3") from None
    if "" not in weights:
        return weights
    if len(texts) > 1:
        raise InputError("give --guidance one number, or COLUMN=NUMBER for each column it is for")
    return weights[""]


def _parse_toward(texts: tuple[str, ...]) -> dict[str, str] | None:
    pairs = [text.partition("=") for text in texts]
    for text, (column, _, label) in zip(texts, pairs, strict=True):
        if not column.strip() or not label.strip():
            raise InputError(f"cannot read --toward {text!r}: write it as condition=stim")
    return {column.strip(): label.strip() for column, _, label in pairs} or None


def _facts(made: dict[str, Any]) -> dict[str, str]:
    """Return what a line says of how cells were made: no gene lists, but weights and ends by column."""
    said = {
        key: ", ".join(f"{name}={one}" for name, one in value.items()) if isinstance(value, dict) else str(value)
        for key, value in made.items()
        if all(np.ndim(one) == 0 for one in (value.values() if isinstance(value, dict) else [value]))
    }
    return {key.replace("_", " "): line for key, line in said.items()}


def _fail(message: str) -> int:
    click.echo(f"wbdit: {' '.join(message.split())}", err=True)
    return 2


class _StderrHandler(logging.Handler):
    """Print each line of the log to stderr, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(record.getMessage())


def _log_to_stderr() -> None:
    logger = logging.getLogger("wbdit")
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())
        logger.setLevel(logging.INFO)


def _say(line: str) -> None:
    click.echo(line, err=True)
