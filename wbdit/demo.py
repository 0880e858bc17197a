"""The demo: train on real blood cells, generate cells, and compare them with held-out cells, all offline."""

from __future__ import annotations

import logging
import time
from importlib.util import find_spec
from pathlib import Path

from wbdit._io import write_h5ad
from wbdit._outputs import beside_page, check_writable, has_uns
from wbdit.data.split import MARK, split
from wbdit.datasets import LABEL, blood_cells
from wbdit.errors import need_extra
from wbdit.evaluation.evaluate import Evaluation, evaluate
from wbdit.report.evaluation import PAGE, check_report, write_picture, write_report
from wbdit.report.explain import check_explanation, write_explanation
from wbdit.run_folder import check_run_folder
from wbdit.training.fit import fit
from wbdit.whitebox.explain import explain

MINUTES = 1.0
NEEDED = {  # package by module
    **{name: name for name in ("scanpy", "matplotlib", "jinja2")},
    **{"sklearn": "scikit-learn", "ot": "POT", "umap": "umap-learn"},
}

logger = logging.getLogger("wbdit")


def run_demo(out: str | Path, *, minutes: float = MINUTES, seed: int = 0, overwrite: bool = False) -> Evaluation:
    """Train on half of the cells, generate with the labels of the other half, and compare; logs each stage.

    Parameters
    ----------
    out
        Folder for ``run/``, ``train.h5ad``, ``test.h5ad``, ``synthetic.h5ad``, ``metrics.json``, ``report.html``,
        ``demo.png`` and ``readout/``, the explanation of the model's blocks. The run of an earlier demo is replaced.
    minutes
        Training time in minutes.
    seed
        Random seed for the split, the training and the generated cells.
    overwrite
        Replace files in the folder even if they are not those of a demo.

    Raises
    ------
    InputError
        If the extra ``report`` is not installed, or the folder cannot be written or holds other files with these names.
    """
    for module, package in NEEDED.items():  # now, not after a minute of training
        if find_spec(module) is None:
            raise need_extra(package)
    out = Path(out)
    _check_outputs(out, overwrite)
    began = time.monotonic()
    cells = blood_cells()
    train, test = split(cells, label=LABEL, share=0.5, seed=seed)
    logger.info(f"{cells.n_obs} real blood cells: {train.n_obs} for training, {test.n_obs} held out for comparison")
    write_h5ad(train, out / "train.h5ad")
    write_h5ad(test, out / "test.h5ad")
    generator = fit(train, label=LABEL, minutes=minutes, seed=seed, out=out / "run", overwrite=True)
    trained = time.monotonic()
    synthetic = generator.generate(like=test, seed=seed, progress=True)
    write_h5ad(synthetic, out / "synthetic.h5ad")
    generated = time.monotonic()
    evaluation = evaluate(test, synthetic, train=train, label=LABEL)
    evaluated = time.monotonic()
    logger.info("drawing the report; on first use UMAP compiles itself, which takes half a minute")
    facts = {
        "Cells": f"{cells.n_obs} blood cells (Zheng et al. 2017), {cells.n_vars} genes",
        "Training": f"{generator.config.trained.steps} steps, preset small",
        "Seed": str(seed),
        "Sampler": f"{synthetic.uns['wbdit']['sampler']}, {synthetic.uns['wbdit']['calls']} calls",
        "Model hash": str(synthetic.uns["wbdit"]["model_hash"])[:16],
    }
    write_report(evaluation, out, title="Synthetic and held-out real blood cells", facts=facts)
    write_picture(evaluation, out / "demo.png")
    reported = time.monotonic()
    write_explanation(explain(generator, test, seed=seed), out / "readout", title="Demo run on held-out cells")
    read = time.monotonic()
    logger.info(
        f"training {trained - began:.0f} s, generating {generated - trained:.0f} s, evaluating "
        f"{evaluated - generated:.0f} s, report {reported - evaluated:.0f} s, readout {read - reported:.0f} s"
    )
    return evaluation


def _check_outputs(out: Path, overwrite: bool) -> None:
    """Check that the demo replaces nothing but an earlier demo."""
    for name, mark in (("train", MARK), ("test", MARK), ("synthetic", "wbdit")):
        check_writable(out / f"{name}.h5ad", overwrite=overwrite, is_ours=has_uns(mark))
    check_writable(out / "demo.png", overwrite=overwrite, is_ours=beside_page(PAGE))
    check_run_folder(out / "run", overwrite=overwrite)
    check_report(out, overwrite=overwrite)
    check_explanation(out / "readout", overwrite=overwrite)
