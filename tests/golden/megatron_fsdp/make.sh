#!/bin/bash
# Makes the files next to this script anew, with megatron-core 0.16.1 on the CPU build of torch 2.13.0.
source "$(dirname "$0")/../environment.sh"
install torch==2.13.0 "numpy<3" safetensors packaging einops megatron-core==0.16.1
make "torch|megatron-core|numpy|einops"
