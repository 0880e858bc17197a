"""Compare all generators in one table.

    python -m bench.quality.peers DATA.h5ad OTHER.h5ad:cell_type,condition --minutes 5 --out bench/out/peers

See bench/README.md.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import click

from bench.quality.peers.baselines import IndependentGenes, PcaGaussian
from bench.quality.peers.cells import Choice, DataSet
from bench.quality.peers.copula import ScDesigner
from bench.quality.peers.diffusion import Diffusion
from bench.quality.peers.gene_order import Reordered
from bench.quality.peers.peer import Peer
from bench.quality.peers.runs import Plan, Result, Run
from bench.quality.peers.table import markdown
from bench.quality.peers.variational import Scvi
from bench.results import refuse
from wbdit._io import write_atomically
from wbdit.errors import InputError, need_extra
from wbdit.ops import cpu

WBDIT = Diffusion("wbdit", "wbdit", "small")
DEFAULT: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        WBDIT,
        Diffusion("dit", "DiT in its place", "dit"),
        Diffusion("paper", "WBDiT as published", "paper"),
        Scvi("posterior"),
        Scvi("prior"),
        ScDesigner(),
        PcaGaussian(),
        IndependentGenes(),
    )
}
ORDERS = {peer.name: peer for peer in (Reordered(WBDIT, number) for number in (1, 2, 3))}
PEERS = DEFAULT | ORDERS


@click.command()
@click.argument("data", nargs=-1, required=True)
@click.option(
    "--label", "labels", multiple=True, default=["cell_type"], show_default=True, help="Columns if DATA names none."
)
@click.option("--leave-out", multiple=True, default=["unassigned"], show_default=True, help="Labels to drop.")
@click.option("--peer", "names", multiple=True, type=click.Choice(list(PEERS)), help="By default all but *-order-*.")
@click.option("--minutes", default=5.0, show_default=True, help="Training time of each peer.")
@click.option("--seeds", default=3, show_default=True, help="Number of splits and trainings.")
@click.option("--share", default=2 / 3, show_default="2/3", help="Share of each label to train on.")
@click.option("--genes", default=2000, show_default=True, help="Maximum number of genes.")
@click.option("--cells", default=1000, show_default=True, help="Maximum number of held-out cells to score.")
@click.option(
    "--out", type=Path, default=Path("bench/out/peers"), show_default=True, help="Folder for results and table.md."
)
@click.option("--again", is_flag=True, help="Train and score again, even if results are kept.")
@click.option("--kept", "kept_only", is_flag=True, help="Only write the table of kept results.")
@click.option("--no-score", is_flag=True, help="Only train and generate; call again without it to score.")
def main(data, labels, leave_out, names, minutes, seeds, share, genes, cells, out, again, kept_only, no_score):
    """Train, generate and score every peer on DATA (FILE.h5ad or FILE.h5ad:column,column), and write the table."""
    try:
        peers = [PEERS[name] for name in names or DEFAULT]
        for module, package in dict.fromkeys(peer.requires for peer in peers if peer.requires):
            if find_spec(module) is None:
                raise need_extra(package, "peers")
        plan = Plan(Choice(share, genes, cells, leave_out), minutes, out)
        sets = [DataSet.parse(text, labels) for text in data]
        cpu.cpu_level()  # compiles the kernels now, outside any peer's training time
        # seed by seed, so that an interrupted run has all peers for fewer seeds
        runs = [Run(one, peer, seed, plan) for seed, one, peer in product(range(seeds), sets, peers)]
        failed = compare(runs, out, again, kept_only, not no_score)
    except InputError as error:
        refuse(f"peers: {error}")
    if failed:
        refuse(f"peers: {len(failed)} runs failed: {', '.join(failed)}")


def compare(runs: Sequence[Run], out: Path, again: bool, kept_only: bool, score: bool = True) -> list[str]:
    """Execute the runs, write the table after each and print it at the end; return the names of failed runs."""
    results: list[Result] = []
    failed = []
    for run in runs:
        try:
            result = run.result(lambda line: click.echo(line, err=True), again, kept_only, score)
        except InputError:
            raise
        except Exception:  # one peer's crash must not stop the others
            traceback.print_exc()
            failed.append(f"{run.peer.name} on {run.data.name}, seed {run.seed}")
            continue
        if result is not None:
            results.append(result)
            write_atomically(out / "table.md", markdown(results))
    if results:
        click.echo(markdown(results))
    return failed


if __name__ == "__main__":
    sys.exit(main())
