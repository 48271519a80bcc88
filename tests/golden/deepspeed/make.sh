#!/bin/bash
# Makes the files beside this script anew, with DeepSpeed 0.19.8 on the CPU build of torch 2.13.0.
source "$(dirname "$0")/../environment.sh"
install torch==2.13.0 "numpy<3" deepspeed==0.19.8 transformers==5.23.0
make "torch|deepspeed|numpy|transformers"
