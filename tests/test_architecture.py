"""Import rules: parts import only lower parts, and `evaluation` imports only `data` (see docs/architecture.md)."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from helpers import ROOT

HELPERS = {
    "_io",
    "_cache",
    "_draws",
    "_flags",
    "_lock",
    "_log",
    "_outputs",
    "_progress",
    "_signals",
    "_version",
    "errors",
    "profiling",
}  # lowest layer; they may import one another
GENERATOR = {"counts", "request", "nn", "samplers", "schedule", "ops", "card", "checkpoint", "data", "run_config"}
GENERATOR |= {"request_check", "run_check", "run_folder", "cell_blocks", "cell_files", "streaming", "recast"}
GENERATOR |= {"network_inputs", "sampling", "steering"}
MAY_IMPORT = {
    "kernels": set(),
    "ops": {"kernels"},
    "system": {"ops"},
    "schedule": {"ops"},
    "nn": {"schedule", "ops"},
    "samplers": {"schedule", "ops"},
    "data": set(),
    "datasets": set(),
    "compat": {"samplers", "schedule"},
    "crate": {"nn", "ops"},
    "run_config": set(),
    "cell_blocks": set(),
    "cell_files": set(),
    "streaming": {"cell_blocks", "cell_files"},
    "card": {"data", "run_config"},
    "run_check": {"data", "run_config"},
    "checkpoint": {"data", "run_config", "run_check"},
    "run_folder": {"checkpoint", "run_check"},
    "counts": {"nn", "schedule", "ops", "data", "run_config"},
    "request_check": set(),
    "request": {"request_check", "samplers", "data"},
    "sampling": {"counts", "nn", "request_check", "samplers", "schedule"},
    "recast": {"cell_blocks", "counts", "data", "ops", "request", "samplers", "schedule"},
    "network_inputs": {"counts", "data", "nn", "samplers", "schedule"},
    "steering": {"counts", "data", "network_inputs", "nn", "request_check", "schedule"},
    "generator": GENERATOR,
    "example_run": {"generator"},
    "whitebox": GENERATOR | {"generator"},
    "training": GENERATOR | {"generator", "whitebox"},
    "augmentation": GENERATOR | {"generator", "training"},
    "emission": GENERATOR | {"generator"},
    "evaluation": {"data"},
    "report": {"evaluation", "whitebox", "data"},
    "pl": {"report", "evaluation", "data", "generator"},
}
EVERYTHING = set(MAY_IMPORT)
MAY_IMPORT |= {"demo": EVERYTHING, "cli": EVERYTHING | {"demo"}, "__main__": {"cli"}, "__init__": EVERYTHING}
LOWEST = {"_cache", "_version", "errors"}  # the only helpers that kernels and ops import


def sources():
    """Yield the part and the path of each file of the package."""
    for path in (ROOT / "wbdit").rglob("*.py"):
        yield path.relative_to(ROOT / "wbdit").parts[0].removesuffix(".py"), path
    for path in (ROOT / "kernels").glob("*.py"):
        yield "kernels", path


def imported(path: Path):
    """Yield the parts that a file imports anywhere, including lazily or only for types."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *rest = name.split(".")
            if package == "wbdit" and rest:
                yield rest[0]


def edges():
    known = set(MAY_IMPORT) | HELPERS
    for part, path in sources():
        for other in imported(path):
            # other names of the package come from its __init__
            yield part, other if other in known else "__init__", path


def test_imports_run_downwards():
    wrong = []
    for part, other, path in edges():
        if part == other or part in HELPERS:
            continue
        allowed = MAY_IMPORT[part] | (LOWEST if part in ("kernels", "ops") else HELPERS)
        if part in ("cli", "demo"):
            allowed = allowed | {"__init__"}
        if other not in allowed:
            wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong, wrong


def test_helpers_know_no_part():
    assert not [(part, other) for part, other, _ in edges() if part in HELPERS and other not in HELPERS]


def test_there_is_no_circle():
    graph = {part: set() for part in MAY_IMPORT}
    for part, other, _ in edges():
        if part != other and part in graph and other in graph and other != "__init__":
            graph[part].add(other)
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError if there is a cycle


def test_every_part_is_drawn():
    """Every part is listed in `MAY_IMPORT`."""
    assert {part for part, _ in sources()} == set(MAY_IMPORT) | HELPERS
