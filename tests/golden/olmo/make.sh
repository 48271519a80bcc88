#!/bin/bash
# Makes the files beside this script anew, with OLMo 0.6.0 on torch 2.13.0 and NumPy 2, of which it wants one before 2.
source "$(dirname "$0")/../environment.sh"
install torch==2.13.0 "numpy<2.3" omegaconf boto3 google-cloud-storage rich cached_path datasets safetensors \
    torchmetrics tokenizers
install --no-deps ai2-olmo==0.6.0 ai2-olmo-core==0.1.0 importlib_resources
make "torch|ai2-olmo|numpy|safetensors"
