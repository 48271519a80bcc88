#!/bin/bash
# Makes the files beside this script anew: GPT-NeoX, BLOOM's Megatron-DeepSpeed and TinyLlama from their repositories, on
# the CPU, with DeepSpeed 0.19.8; OLMo 0.6.0 and Lit-GPT 0.5.13 as packages, with newer neighbours than they ask for.
source "$(dirname "$0")/../environment.sh"
checkout() {
    git init --quiet "$work/$1"
    git -C "$work/$1" fetch --quiet --depth 1 "https://github.com/$2" "$3"
    git -C "$work/$1" checkout --quiet FETCH_HEAD
}
checkout neox EleutherAI/gpt-neox ea7aefd8f8e183256992d9fede4d7c71a46d67a5
checkout bloom bigscience-workshop/Megatron-DeepSpeed 8387ae17c4704f6579f88a84500b535d19d7fbbf
checkout tinyllama jzhang38/TinyLlama bf122247c486b6b897050e98cbb7bedae8eeba73
export SOURCES=$work
install torch==2.13.0 "numpy<3" omegaconf boto3 google-cloud-storage rich cached_path datasets safetensors lightning \
    torchmetrics tokenizers importlib_resources psutil pyyaml "jsonargparse[signatures]<4.42" deepspeed==0.19.8 requests
install --no-deps ai2-olmo==0.6.0 ai2-olmo-core==0.1.0 litgpt==0.5.13
make "torch|ai2-olmo|litgpt|deepspeed|numpy|lightning"
