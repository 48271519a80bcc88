#!/bin/bash
# Makes the files next to this script anew, with EleutherAI's DeepSpeed 0.3.15 (its tag v1.0), from its repository, and
# torch 1.8.1 on Python 3.8: the versions of the time. That torch comes with CUDA's libraries, 0.8 GB to download, and
# does without a device.
PYTHON=${PYTHON:-python3.8}
source "$(dirname "$0")/../environment.sh"
git init --quiet "$work/deeperspeed"
git -C "$work/deeperspeed" fetch --quiet --depth 1 https://github.com/EleutherAI/DeeperSpeed 7069d10d2c9abac50576c84cb7e45910fafa218c
git -C "$work/deeperspeed" checkout --quiet FETCH_HEAD
install torch==1.8.1 typing_extensions "numpy<1.25" "protobuf<4" tensorboardX==1.8 tqdm psutil ninja
echo "$work/deeperspeed" > "$("$VENV/bin/python" -c 'import site; print(site.getsitepackages()[0])')/deeperspeed.pth"
make "torch|numpy"
