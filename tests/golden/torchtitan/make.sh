#!/bin/bash
# Makes the files next to this script anew, with torchtitan 0.3.0 on the CPU build of torch 2.13.0.
source "$(dirname "$0")/../environment.sh"
install torch==2.13.0 numpy triton torchao==0.18.0 torchtitan==0.3.0
make "torch|torchtitan|torch_checkpointing|torchdata|torchao|spmd_types|triton|numpy"
