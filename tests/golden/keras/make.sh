#!/bin/bash
# Makes files/ and versions.txt anew, with Keras 3 on torch.
source "$(dirname "$0")/../environment.sh"
install torch==2.13.0 keras==3.15.1 h5py==3.16.0
make 'keras|h5py|torch'
