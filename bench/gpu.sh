#!/bin/sh
# Checks and times everything on a GPU, in under nine minutes; gpu.json and gpu.md go to $OUT, or to bench/out.
# Needs torch, triton and numpy: no installing, the package is used where it lies.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
staged=$(mktemp -d)
trap 'rm -rf "$staged"' EXIT
# installed, kernels/ and csrc/ are wbdit.kernels and wbdit.csrc; uninstalled, links put them there
mkdir "$staged/wbdit"
for part in "$here"/../wbdit/*; do ln -s "$part" "$staged/wbdit/"; done
ln -s "$here/../kernels" "$staged/wbdit/kernels"
ln -s "$here/../csrc" "$staged/wbdit/csrc"
python=${PYTHON:-python3}
PYTHONPATH="$staged${PYTHONPATH:+:$PYTHONPATH}" "$python" "$here/gpu.py" --out "${OUT:-$here/out}" "$@"
