"""Read a result: complete (bench.json) or reduced to ratios (bench/results)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

FORMAT = 1


def read(path: str) -> dict[str, Any]:
    """Return a result; if the file is not one, exit with a one-line message and status 2."""
    try:
        result = json.loads(Path(path).read_text())
        known = result["format"] == FORMAT
        for row in result["rows"]:
            _ = row["id"], row["ours"], row["ratio_to_eager"]
    except OSError as error:
        refuse(f"{path}: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        refuse(f"{path}: not a result file of make bench")
    if not known:
        refuse(f"{path}: has format {result['format']}, but this code reads format {FORMAT}")
    return result


def refuse(why: str) -> NoReturn:
    """Print the reason to stderr and exit with status 2."""
    print(why, file=sys.stderr)
    raise SystemExit(2)
