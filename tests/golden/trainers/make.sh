#!/bin/bash
# Makes files/ and versions.txt anew: fvcore's checkpointer, which detectron2 saves with.
source "$(dirname "$0")/../environment.sh"
install torch==2.13.0 numpy fvcore==0.1.5.post20221221 iopath
make 'fvcore|iopath|torch'
