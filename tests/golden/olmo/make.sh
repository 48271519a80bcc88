#!/bin/bash
# Makes the files beside this script anew, in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")"
venv=${VENV:-$(mktemp -d)}
[ -x "$venv/bin/python" ] && [ -n "${VENV:-}" ] || {
    python3.11 -m venv "$venv"
    "$venv/bin/pip" install --quiet torch==2.13.0 "numpy<2.3" omegaconf boto3 google-cloud-storage rich cached_path safetensors torchmetrics tokenizers
    "$venv/bin/pip" install --quiet --no-deps ai2-olmo==0.6.0 ai2-olmo-core==0.1.0 importlib_resources
}
rm -rf files
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore make.py files
"$venv/bin/pip" list --format=freeze | grep -iE '^(torch|ai2-olmo|numpy|safetensors)==' > versions.txt
