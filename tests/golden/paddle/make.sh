#!/bin/bash
# Makes files/ and versions.txt anew, with Paddle on a CPU.
source "$(dirname "$0")/../environment.sh"
install paddlepaddle==3.3.1
make 'paddlepaddle|numpy'
