"""Read a result, whole (bench.json) or kept (ratios alone)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

FORMAT = 1


def read(path: str) -> dict[str, Any]:
    """Return a result; leave with one line and exit status 2 if the file is none."""
    try:
        result = json.loads(Path(path).read_text())
        known = result["format"] == FORMAT
        for row in result["rows"]:
            _ = row["id"], row["ours"], row["ratio_to_eager"]
    except OSError as error:
        refuse(f"{path}: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        refuse(f"{path}: not a result of make bench")
    if not known:
        refuse(f"{path}: format {result['format']}, this code reads {FORMAT}")
    return result


def refuse(why: str) -> NoReturn:
    """Say why on stderr and leave with exit status 2."""
    print(why, file=sys.stderr)
    raise SystemExit(2)
