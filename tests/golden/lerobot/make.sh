#!/bin/bash
# Makes the files beside this script anew, with LeRobot 0.4.4 on torch 2.13.0, of which it wants one before 2.11.
source "$(dirname "$0")/../environment.sh"
install torch==2.13.0 draccus datasets safetensors accelerate imageio pillow
install --no-deps lerobot==0.4.4
make "torch|lerobot|safetensors|numpy|datasets|huggingface_hub"
