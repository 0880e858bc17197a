#!/bin/sh
# Checks and times everything on a GPU: `bench/gpu.sh A` takes at most 330 s, `bench/gpu.sh B` at most 240 s.
# Appends one line per row to gpu-A.jsonl or gpu-B.jsonl in $OUT (default: bench/out). See bench/README.md.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
exec "${PYTHON:-python3}" "$here/gpu/run.py" --out "${OUT:-$here/out}" "$@"
