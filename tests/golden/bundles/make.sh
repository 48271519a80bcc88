#!/bin/bash
# Makes files/ and versions.txt anew. The libraries come without what they only import to load pictures and models.
source "$(dirname "$0")/../environment.sh"
install torch==2.13.0 mmengine==0.10.7 omegaconf==2.4.0 polars psutil requests safetensors huggingface_hub scipy
install --no-deps timm==1.0.31 ultralytics==8.4.190 ultralytics-thop==2.2.3
make 'mmengine|omegaconf|timm|torch|ultralytics'
