"""One QLoRA optimizer step of 512 tokens, and generation, on a random Llama-2-7B: peak resident memory and time.

Usage: python benchmarks/qlora_7b.py [FOLDER]   (FOLDER as made by benchmarks/convert_7b.py)
A second argument is train (the default), train-checkpointing or generate.
"""

import resource
import sys
import time
from pathlib import Path

import torch

from lit_gpt import checkpoint, decoding, lora, quantization, runtime
from lit_gpt.data import Batch
from lit_gpt.generation import generate
from lit_gpt.lora import LoRASettings
from lit_gpt.training import train_step


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "checkpoints/benchmark/random-7b")
    what = sys.argv[2] if len(sys.argv) > 2 else "train"
    quantization.resolve("bnb.nf4")
    started = time.monotonic()
    model = checkpoint.load_model(folder, torch.bfloat16, quantize="bnb.nf4")
    print(f"loaded and quantized in {time.monotonic() - started:.1f} s, peak {peak_gb():.2f} GB", flush=True)
    if what == "generate":
        model.eval()
        decoding.lay_out(model)
        started = time.monotonic()
        n_tokens = len(list(generate(model, list(range(1, 33)), 32)))
        seconds = time.monotonic() - started
        print(f"{n_tokens} tokens in {seconds:.1f} s, peak {peak_gb():.2f} GB")
        return
    lora.attach(model, LoRASettings())
    if what == "train-checkpointing":
        runtime.checkpoint_activations(model)
    fabric = runtime.launch(runtime.resolve_precision("bf16-true", training=True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    wrapped, optimizer = fabric.setup(model, optimizer)
    tokens = torch.randint(0, 32000, (1, 512))
    started = time.monotonic()
    result = train_step(fabric, wrapped, optimizer, [Batch(tokens, tokens.roll(-1, 1), (512,))], max_norm=1.0)
    seconds = time.monotonic() - started
    print(f"one step of 512 tokens in {seconds:.1f} s, loss {result.loss / 512:.3f}, peak {peak_gb():.2f} GB")


if __name__ == "__main__":
    main()
