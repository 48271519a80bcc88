#!/bin/bash
# Makes the files beside this script anew, in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")"
venv=${VENV:-$(mktemp -d)}
[ -x "$venv/bin/python" ] && [ -n "${VENV:-}" ] || {
    python3.11 -m venv "$venv"
    "$venv/bin/pip" install --quiet torch==2.13.0 draccus datasets safetensors accelerate imageio pillow
    "$venv/bin/pip" install --quiet --no-deps lerobot==0.4.4
}
cat > "$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/torchvision.py" <<'EOF'
"""Stands in for torchvision, which is imported and not used."""
import sys, types

__path__ = []
__version__ = "0.0"


class Module(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Finder:
    def find_spec(self, name, path=None, target=None):
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, self, is_package=True) if name.startswith("torchvision.") else None

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Finder())


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Module("torchvision." + name)
EOF
rm -rf files
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore make.py files
"$venv/bin/pip" list --format=freeze | grep -iE '^(torch|lerobot|safetensors|numpy|datasets|huggingface_hub)==' > versions.txt
