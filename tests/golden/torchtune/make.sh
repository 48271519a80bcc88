#!/bin/bash
# Makes the files beside this script anew, with torchtune 0.6.1 and torchao 0.10.0, the last one that it can import, on
# torch 2.13.0.
source "$(dirname "$0")/../environment.sh"
install torch==2.13.0 torchao==0.10.0 torchtune==0.6.1
make "torch|torchtune|torchao|numpy"
