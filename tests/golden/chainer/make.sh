#!/bin/bash
# Makes files/ and versions.txt anew, with the last Chainer, which needs an old Python and an old NumPy.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
PYENV_VERSION=${PYENV_VERSION-3.8} python3.8 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "numpy<1.24" "setuptools<60" wheel
"$work/venv/bin/pip" install --quiet --no-build-isolation chainer==7.8.1
"$work/venv/bin/python" -W ignore make.py "$work/files"
rm -rf files "$work/files/log"
mv "$work/files" files
"$work/venv/bin/pip" list --format=freeze | grep -iE '^(chainer|numpy)==' > versions.txt
