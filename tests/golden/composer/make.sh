#!/bin/bash
# Makes the files beside this script anew, with Composer 0.32.1 on torch 2.13.0, of which it wants one before 2.7.1.
source "$(dirname "$0")/../environment.sh"
install torch==2.13.0 "numpy<2.3" omegaconf boto3 torchmetrics coolname psutil importlib_metadata py-cpuinfo requests \
    tqdm pillow
install --no-deps mosaicml==0.32.1 mcli lazy_importer
make "torch|mosaicml|numpy|torchmetrics"
