# Sourced by each make.sh: an environment in $VENV, which is kept to be used again, or else one for this run alone.
# Without CUDA, point pip at torch's CPU build; then each script takes some two minutes on two cores, most of it pip's.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
VENV=${VENV:-$work/venv}
"${PYTHON:-python3.11}" -m venv "$VENV"

install() { "$VENV/bin/pip" install --quiet "$@"; }

# make PATTERN: the files anew, once all could be made, and the versions of the packages that the pattern names.
make() {
    local here=$PWD
    (cd "$work" && PYTHONPATH=$here/.. OMP_NUM_THREADS=1 "$VENV/bin/python" -W ignore "$here/make.py" files)
    rm -rf files
    mv "$work/files" files
    "$VENV/bin/pip" list --format=freeze | grep -iE "^($1)==" > versions.txt
}
