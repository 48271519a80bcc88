#!/bin/bash
# Makes files/ and versions.txt anew, with RLlib on torch.
source "$(dirname "$0")/../environment.sh"
install torch==2.13.0 "ray[rllib]==2.60.0" gymnasium
make 'ray|gymnasium|torch'
