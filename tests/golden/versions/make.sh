#!/bin/bash
# Makes the folders next to this script anew that Trainers on both sides of each change of its grouping wrote: with torch
# 2.13, and transformers 4.20 to 4.53 with the accelerate and PEFT of their time. 4.20 asks for tokenizers of which there
# are none for Python 3.11: it gets the next ones, and is told that these will do. The folders of torch 1.13 and 2.1 came
# from environments of those versions (their names.json says which), which this script does not build.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
while read -r transformers accelerate peft folders; do
    python3.11 -m venv "$work/venv"
    if [ "$accelerate" = - ]; then
        "$work/venv/bin/pip" install --quiet "torch==2.13.0" "numpy<2" "huggingface_hub<0.14" tokenizers==0.13.3 regex
        "$work/venv/bin/pip" install --quiet --no-deps "transformers==$transformers"
        sed -i '/"tokenizers":/s/<0.13"/<0.14"/' "$work"/venv/lib/*/site-packages/transformers/dependency_versions_table.py
    else
        "$work/venv/bin/pip" install --quiet "torch==2.13.0" "numpy<2" psutil "safetensors" \
            "transformers==$transformers" "accelerate==$accelerate" "peft==$peft"
    fi
    for folder in $folders; do
        (cd "$work" && OMP_NUM_THREADS=1 venv/bin/python -W ignore "$OLDPWD/make.py" "$folder" "${folder%-*}" "${folder##*-}")
        rm -rf "transformers$transformers-$folder"
        mv "$work/$folder" "transformers$transformers-$folder"
    done
    rm -rf "$work/venv"
done << END
4.20.1 - - bert-full t5-full
4.25.1 0.15.0 0.2.0 bert-full
4.26.1 0.15.0 0.2.0 t5-full
4.33.3 0.21.0 0.5.0 llama-full bert-full
4.34.1 0.23.0 0.5.0 llama-full roberta-lora
4.47.1 1.2.1 0.14.0 gemma-full
4.48.3 1.2.1 0.14.0 qwen2-full
4.52.4 1.7.0 0.15.2 qwen2-full bert-lora
4.53.3 1.8.1 0.16.0 qwen2-full bert-lora
END
