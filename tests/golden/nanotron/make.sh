#!/bin/bash
# Makes the files next to this script anew, with nanotron 0.4 on the CPU build of torch 2.13.0.
source "$(dirname "$0")/../environment.sh"
install torch==2.13.0 numpy safetensors packaging pyyaml dacite tqdm nanotron==0.4
make "torch|nanotron|numpy|safetensors|dacite"
