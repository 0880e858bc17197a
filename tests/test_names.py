"""Old names that were replaced by the field's standard terms do not come back.

Each row holds a regular expression, the paths to which it applies, and the replacement. Kept on purpose:

- `learn_sigma`, an argument of the authors' `WBDiT`, although its second output need not be a sigma;
- "levels" of a gene in the count ops, which have no bins, and `NoiseSchedule.levels` of signal and noise;
- "objective" in the white-box readout, where it is that of the lasso;
- "spread" in prose, as the plain word for a standard deviation.
"""

import re

import pytest
from helpers import ROOT

CODE = ("wbdit/**/*.py", "kernels/*.py", "bench/**/*.py", "tests/**/*.py")
PACKAGE = ("wbdit/**/*.py", "kernels/*.py")
TRAINING = ("wbdit/training/*.py",)
CSRC = ("csrc/*.cpp", "csrc/*.h")
OLD_MODULES = (
    "walk|halfsteps|trunk|grids|recipe|cells|conditions|fitting|objectives|presets|board|spread|families|scoring|"
    "scorecard|metric_table|picture|unit_genes|alignment|batches|graphs|layers|memorisation|page|trace|files|version"
)
GONE = [
    (rf"\bwbdit\.(?:{OLD_MODULES})\b", CODE, "module was renamed"),
    (r"(?<!ast\.)\bwalk\b|_choose_walk", CODE, "sampling_loop, _resolve_sampler, iterate_blocks"),
    (r"\btrunk\b", CODE, "run_blocks"),
    (r"\bGrid\b|\bGRIDS\b", CODE, "Spacing"),
    (r"\b[Rr]ecipe\b", CODE, "Preprocessor"),
    (r"\bConditions\b", CODE, "GenerationRequest"),
    (r"\b(?:match_spread|matching_seconds|widen)\(", CODE, "calibrate_noise, calibration_seconds, start"),
    (r"\bLevels[.(]|import .*\bLevels\b", CODE, "CountBins"),
    (r"\blog_depth\b|depth_embedder|\bAtDepth\b|DEPTH_", CODE, "log_library, FixedLibrary"),
    (r"(?<!log_)\bbase[01]\b", CODE, "log_base0, log_base1"),
    (r"\bsizes_ptr\b|\bweight_ptr\b", ("kernels/counts.py",), "n_levels_ptr, mixture_ptr"),
    (r"learned_spread|label_shapes|\.mixing\b", CODE, "learned_dispersion, label_dispersion, dispersion_knots"),
    (r"look_along|\bglance\b|\bweigh\(|\bStates\b|def begin\(", CODE, "init_from_data, diagnostics, ..."),
    (r"\bGuided\b|\bGraphed\b", CODE, "GuidedModel, CUDAGraphModel"),
    (
        r"(?<!shutil)\.(?:counted|moved|which|composition)\(",
        PACKAGE,
        "codes_from_counts, replace, combination_index, ...",
    ),
    (r"\bObjective\b|\bself\.objective\b", TRAINING, "LossFunction, loss_fn"),
    (r"\bsay=|\bsay\(|\bsay: Callable", PACKAGE, 'logging.getLogger("wbdit")'),
    (r"\bROOMS?\b|\brooms?\b|\bdoor\b|\bhouse\b", CODE, "plain words"),
    (r"--counts\b|generate\(counts=", CODE, "--per-label, n_per_label"),
    (r"def _forward\(|def _backward\(", ("kernels/*.py",), "_mssa_forward: profilers show only the name"),
    (r"def (?:_where|_there|_emit|_of_sample|_through_step)\(", ("kernels/*.py",), "_tile_origin, _clamp_index, ..."),
    (r"\bwritten\(|\bflaw\b|struct Product\b|\babreast\b", CSRC, "store_row, nan_guard, MicroKernel, ..."),
    (r"\bprocessor_level\b|\"rows\.h\"", (*CODE, *CSRC), "cpu_level, sweep.h"),
    (r"num_classes", ("wbdit/samplers/*.py", "wbdit/data/*.py", "wbdit/counts/*.py"), "label_sizes"),
    (r"\bembed_labels\b|learned_step|timed_threshold|[Oo]vercomplete", CODE, "removed, or embed"),
]


@pytest.mark.parametrize(("pattern", "paths", "instead"), GONE, ids=[pattern for pattern, *_ in GONE])
def test_no_old_name(pattern, paths, instead):
    files = {path for glob in paths for path in ROOT.glob(glob)} - {ROOT / "tests" / "test_names.py"}
    assert files
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted(files)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, f"{instead}: {found}"
