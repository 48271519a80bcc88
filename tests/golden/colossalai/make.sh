#!/bin/bash
# Makes the files next to this script anew, with ColossalAI 0.5.0 on the CPU build of torch 2.13.0: without the older
# torch, transformers and PEFT that it asks for, which what is used here does without.
source "$(dirname "$0")/../environment.sh"
install torch==2.13.0 numpy transformers==5.23.0 peft==0.21.2 einops galore_torch bitsandbytes psutil rich click contexttimer
install --no-deps --no-build-isolation colossalai==0.5.0
make "torch|colossalai|transformers|peft|numpy"
