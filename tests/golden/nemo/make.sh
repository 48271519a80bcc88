#!/bin/bash
# Makes the files next to this script anew, with NeMo 2.4.0 and the megatron-core of its time on the CPU build of torch
# 2.13.0. NeMo asks for hundreds of packages: here are those that its strategy and its writer import.
source "$(dirname "$0")/../environment.sh"
install torch==2.13.0 "numpy<2" safetensors packaging setuptools lightning omegaconf hydra-core wrapt fiddle libcst \
    cloudpickle onnx defusedxml braceexpand webdataset ruamel.yaml wget transformers datasets multi-storage-client \
    tensorboard einops psutil pynvml
install --no-deps megatron-core==0.13.1 nemo_toolkit==2.4.0 nemo_run nvidia_resiliency_ext catalogue toml graphviz leptonai
make "torch|megatron-core|nemo[-_]toolkit|numpy|lightning"
