#!/usr/bin/env bash
# Make the virtual environment DIR with manta and what its tests need: setup_venv.sh [DIR]
# A machine with an NVIDIA GPU gets a CUDA build of torch; any other gets a CPU build, which is a
# tenth of the size.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
python=${PYTHON:-python3}
torch=2.13.0

"$python" - <<'PY' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"manta needs Python 3.11 or later, this is {sys.version.split()[0]}; set PYTHON=")
PY
if ! "$python" -m venv "$venv"; then
  echo "python's venv module is missing; on Debian: apt-get install python3-venv" >&2
  exit 1
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  :
elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
  pip install -q "torch==$torch" # the default build for Linux is CUDA's
elif [ "$(uname -s)" = Linux ]; then
  # Where the machine offers a CPU wheel itself, take that; else PyTorch's own CPU index.
  pip install -q "torch==$torch+cpu" 2>/dev/null ||
    pip install -q --index-url https://download.pytorch.org/whl/cpu "torch==$torch"
else
  pip install -q "torch==$torch"
fi
pip install -q -e ".[dev]"
