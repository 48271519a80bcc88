#!/bin/bash
# Makes the files beside this script anew, in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")"
venv=${VENV:-$(mktemp -d)}
[ -x "$venv/bin/python" ] && [ -n "${VENV:-}" ] || {
    python3.11 -m venv "$venv"
    "$venv/bin/pip" install --quiet torch==2.13.0 torchao==0.10.0 torchtune==0.6.1
}
rm -rf files
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore make.py files
"$venv/bin/pip" list --format=freeze | grep -iE '^(torch|torchtune|torchao|numpy)==' > versions.txt
