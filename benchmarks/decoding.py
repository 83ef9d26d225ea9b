"""Greedy decoding in bfloat16 and in nf4, in turn: tokens per second, and the share of the memory's bandwidth.

Usage: python benchmarks/decoding.py [MODEL] [TOKENS]
MODEL is a checkpoint folder, or a known name, which gets random weights (default: TinyLlama-1.1B-Chat-v1.0).
"""

import statistics
import sys
import time
from pathlib import Path

import torch

from lit_gpt import checkpoint, decoding, quantization
from lit_gpt.config import Config
from lit_gpt.generation import generate
from lit_gpt.model import GPT
from lit_gpt.report import table

ROUNDS = 5


def load(model: str, kind: str | None) -> GPT:
    if Path(model).is_dir():
        gpt = checkpoint.load_model(Path(model), torch.bfloat16, quantize=kind)
    else:
        gpt = checkpoint.hollow(Config.from_name(model))
        for name, meta in checkpoint.parameter_metas(gpt).items():
            owner, module = name.rpartition(".")[0], gpt.get_submodule(name.rpartition(".")[0])
            weight = torch.empty(meta.shape, dtype=torch.bfloat16).normal_(std=0.02)
            if kind and name.endswith("weight") and quantization.quantizable(owner, module, kind):
                checkpoint.surgery.put(gpt, owner, quantization.quantize(weight, kind))
            else:
                checkpoint.place(gpt, name, weight, torch.bfloat16, torch.bfloat16, "cpu")
        gpt.tie()
    return gpt.eval()


def bytes_per_token(gpt: GPT) -> int:
    """What one step reads of the weights: all but the embedding, of which it reads a row."""
    tensors = {t.data_ptr(): t.nbytes for t in (*gpt.parameters(), *gpt.buffers())}
    for module in gpt.modules():
        if isinstance(module, decoding.FewTokensLinear4bit):
            tensors[module.scales.data_ptr()] = module.scales.nbytes
    if not gpt.config.tie_embeddings:
        del tensors[gpt.transformer.wte.weight.data_ptr()]
    return sum(tensors.values())


def bandwidth() -> float:
    """Bytes per second that all threads together read from memory: the best of several sums over 1 GB."""
    data = torch.ones(1 << 28)
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - started)
    return data.nbytes / min(seconds)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "TinyLlama-1.1B-Chat-v1.0"
    n_tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 64
    torch.manual_seed(0)
    models = {"bf16, plain layers": load(name, None), "bf16": load(name, None), "bnb.nf4": load(name, "bnb.nf4")}
    for kind in ("bf16", "bnb.nf4"):
        decoding.lay_out(models[kind])
    prompt = list(range(1, 33))
    speeds: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(ROUNDS):
        for kind, model in models.items():
            tokens = generate(model, prompt, n_tokens)
            next(tokens)  # the prompt is not decoding
            started = time.perf_counter()
            n = sum(1 for _ in tokens)
            speeds[kind].append(n / (time.perf_counter() - started))
    limit = bandwidth()
    rows = [("weights", "tokens/s", "of plain", "MB per token", f"share of {limit / 1e9:.1f} GB/s")]
    for kind, model in models.items():
        speed, size = statistics.median(speeds[kind]), bytes_per_token(model)
        ratio = speed / statistics.median(speeds["bf16, plain layers"])
        rows.append((kind, f"{speed:.1f}", f"{ratio:.2f}", f"{size / 1e6:.0f}", f"{speed * size / limit:.2f}"))
    print(table(rows))


if __name__ == "__main__":
    main()
