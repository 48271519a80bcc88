#!/bin/bash
# Makes the files beside this script anew, with the AdamW of transformers 4.46.3, which was its own until 5.0.
source "$(dirname "$0")/../environment.sh"
install torch==2.13.0 transformers==4.46.3 "numpy<2.3"
make "torch|transformers|numpy"
