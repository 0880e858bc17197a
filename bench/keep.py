"""Write the file that is kept in bench/results: ratios and fractions, without times and the machine's name.

python bench/keep.py bench/out/bench.json bench/results/NAME.json
"""

import json
import sys
from pathlib import Path

from results import read, refuse

OF_A_ROW = (
    "id",
    "ours",
    "ratio_to_eager",
    "ratio_of_sampler",
    "ratio_of_kernels",
    "fraction_of_floor",
    "error",
    "tolerance",
)


def kept(result):
    """Return a result without times and the machine's name; processor features stay, since ratios depend on them."""
    machine = result["machine"]
    return {
        "format": result["format"],
        "quick": result["quick"],
        "commit": result["commit"],
        "versions": result["versions"],
        "machine": {key: machine[key] for key in ("threads", "flags", "kernels")},
        "backends": result["backends"],
        "rows": [{key: rounded(row[key]) for key in OF_A_ROW if key in row} for row in result["rows"]],
        "memory": [{key: rounded(row[key]) for key in ("id", "ratio_to_eager")} for row in result["memory"]],
        "absent": result["absent"],
    }


def rounded(value):
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(source, target):
    result = read(source)
    if result["quick"]:
        refuse(f"{source}: numbers of a quick run mean nothing; give the result of a full run")
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text(json.dumps(kept(result), indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        refuse("usage: python bench/keep.py bench/out/bench.json bench/results/NAME.json")
    main(*sys.argv[1:])
