"""Which of its tensors a compiled Triton kernel reads and writes, and whether it multiplies matrices.

The answer is in the kernel's intermediate code (MLIR text), after Triton has inlined its functions and dropped the
branches that its constants exclude. Addresses are followed from the arguments to the loads and stores. What a kernel
declares about itself could be wrong; this cannot.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

ARGUMENT = re.compile(r"(%\w+): !tt\.(?:ptr|tensordesc)<")
RESULTS = re.compile(r"^(%\w+)(?::(\d+))? = ")
VALUE = re.compile(r"%\w+(?:#\d+)?")
CARRIED = re.compile(r"(%\w+) = (%\w+(?:#\d+)?)")
PRODUCTS = re.compile(r"\btt\.dot|\bwarp_group_dot|\bttng\.\w*mma")


@dataclass(frozen=True)
class Access:
    """Whether a kernel reads and writes each pointer or tensor descriptor among its arguments."""

    reads: tuple[bool, ...]
    writes: tuple[bool, ...]
    multiplies: bool


def access_of(kernel: Any) -> Access:
    """Return what a compiled kernel does with its tensors, in the order of its arguments that are not None."""
    return read_access(kernel.asm.get("ttir") or kernel.asm["ttgir"])  # Gluon begins with the second


def read_access(code: str) -> Access:
    """Return the access of the first function in the intermediate code of a kernel."""
    _, _, code = code.partition("tt.func public ")
    head, _, body = code.partition("\n")
    arguments = ARGUMENT.findall(head)
    sources, uses = _flow(body.splitlines())
    origins = {value: _origins(value, sources, frozenset(arguments)) for value, _ in uses}

    def used(kind: str) -> tuple[bool, ...]:
        found = {origin for value, kinds in uses for origin in origins[value] if kind in kinds}
        return tuple(argument in found for argument in arguments)

    return Access(used("read"), used("write"), PRODUCTS.search(body) is not None)


def _flow(lines: Sequence[str]) -> tuple[dict[str, set[str]], list[tuple[str, str]]]:
    """Return the values that each value's address may come from, and each address in use with how it is used."""
    sources: dict[str, set[str]] = defaultdict(set)
    uses: list[tuple[str, str]] = []
    regions: list[tuple[list[str], list[str]]] = []  # results and loop-carried values of the enclosing operations
    for line in map(str.strip, lines):
        found = RESULTS.match(line)
        results = list(_results(found)) if found else []
        operation = line[found.end() :] if found else line
        name = operation.split(" ", 1)[0].strip('"')
        operation = operation.split(" loc(", 1)[0]
        if line.startswith("}"):
            regions = regions if line.endswith("{") else regions[:-1]  # "} else {" stays in the operation
        elif name in ("scf.yield", "scf.condition") and regions:
            values = VALUE.findall(operation)[name == "scf.condition" :]
            for targets in regions[-1]:
                for target, value in zip(targets, values, strict=False):
                    sources[target].add(value)
        elif operation.endswith("{"):
            carried = CARRIED.findall(operation.split("iter_args", 1)[-1]) if name != "scf.if" else []
            for (inner, value), result in zip(carried, results or [""] * len(carried), strict=False):
                sources[inner].add(value)
                sources[result].add(value)
            regions.append((results, [inner for inner, _ in carried]))
        else:
            kinds = _kinds(name)
            operands = VALUE.findall(operation)
            uses += [(operand, kinds) for operand in operands if kinds]
            for result in [] if kinds else results:
                sources[result] |= set(operands)
    return sources, uses


def _results(found: re.Match[str]) -> Iterator[str]:
    name, count = found.groups()
    yield from [f"{name}#{i}" for i in range(int(count))] if count else [name]


def _kinds(name: str) -> str:
    """Return how an operation uses the memory at its addresses: "read", "write", both, or not at all."""
    if "atomic" in name or "tma_reduce" in name or name == "tt.descriptor_reduce" or name == "tt.call":
        return "read write"
    if name == "tt.store" or "local_to_global" in name or name in ("tt.descriptor_store", "tt.descriptor_scatter"):
        return "write"
    if name == "tt.load" or "global_to_local" in name or name in ("tt.descriptor_load", "tt.descriptor_gather"):
        return "read"
    return "read write" if "tma_scatter" in name else "read" if "tma_gather" in name else ""


def _origins(value: str, sources: dict[str, set[str]], arguments: frozenset[str]) -> set[str]:
    """Return the arguments that a value's address may come from."""
    seen, left = set[str](), [value]
    while left:
        value = left.pop()
        if value not in seen:
            seen.add(value)
            left += sources.get(value, ())
    return seen & arguments
