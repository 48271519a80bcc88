#!/bin/bash
# Makes files/ and versions.txt anew, with MindSpore on a CPU; its package has 800 MB.
source "$(dirname "$0")/../environment.sh"
install mindspore==2.10.0
make 'mindspore|numpy'
