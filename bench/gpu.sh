#!/bin/sh
# Checks and times everything on a GPU: `bench/gpu.sh A` in at most 330 s, then `bench/gpu.sh B` in at most 240 s.
# Appends a line per row to gpu-A.jsonl and gpu-B.jsonl in $OUT, or in bench/out. See bench/README.md.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
exec "${PYTHON:-python3}" "$here/gpu/run.py" --out "${OUT:-$here/out}" "$@"
