"""How cost grows: a step's time and memory with its rows' length, its memory with its tokens, a start with the rows.

Usage: python benchmarks/growth.py   (after `make quickstart` has fetched the model; seven minutes)
Each micro-batch holds 4,096 tokens, in rows of one length. What attention takes is found by leaving it out.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from lit_gpt import attention, checkpoint, files, lora, memory, runtime
from lit_gpt.data import Batch, PreparedSet
from lit_gpt.lora import LoRASettings
from lit_gpt.model import GPT
from lit_gpt.report import table
from lit_gpt.training import permutation, train_step

MODEL = Path(__file__).parents[1] / "checkpoints" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
N_TOKENS = 4096


def without_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> torch.Tensor:
    """Each query takes its own value, and each input gets a gradient."""
    return q + (k + v).repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def prepared() -> tuple[GPT, Callable[[Batch], float]]:
    """The model, and what takes a step with a batch and tells its seconds."""
    model = checkpoint.load_model(MODEL, torch.bfloat16)
    lora.attach(model, LoRASettings())
    fabric = runtime.launch(runtime.resolve_precision("bf16-true", training=True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    wrapped, optimizer = fabric.setup(model, optimizer)

    def step(batch: Batch) -> float:
        started = time.perf_counter()
        train_step(fabric, wrapped, optimizer, [batch], max_norm=1.0)
        return time.perf_counter() - started

    return model, step


def batch_of(n_tokens: int, length: int) -> Batch:
    tokens = torch.randint(0, 49152, (1, n_tokens))
    return Batch(tokens, tokens.roll(-1, 1), (length,) * (n_tokens // length))


def peak(n_tokens: int) -> None:
    """Of two steps with rows of 512 tokens, in GB, printed; for a process of its own."""
    runtime.keep_memory()
    _, step = prepared()
    for _ in range(2):
        step(batch_of(n_tokens, 512))
    print(runtime.peak_memory_gb())


def main() -> None:
    # First, since a process begins with the peak of the one that has started it.
    sizes, peaks = [512, 1024, 2048, 4096, 8192], []
    for n_tokens in sizes:
        command = [sys.executable, __file__, "peak", str(n_tokens)]
        peaks.append(float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    rows = [("tokens of a micro-batch", "peak, GB", "more for each 1,000 tokens, GB"), ("512", f"{peaks[0]:.2f}", "")]
    for i in range(1, len(sizes)):
        more = 1000 * (peaks[i] - peaks[i - 1]) / (sizes[i] - sizes[i - 1])
        rows.append((f"{sizes[i]:,}", f"{peaks[i]:.2f}", f"{more:.2f}"))
    print(table(rows) + "\n")

    model, step = prepared()
    rows = [("tokens per row", "tokens/s", "without attention", "planned activations, GB")]
    for length in (128, 256, 512, 1024, 2048, 4096):
        batch = batch_of(N_TOKENS, length)

        def speed(batch: Batch = batch) -> float:
            return N_TOKENS / statistics.median([step(batch) for _ in range(4)][1:])

        whole = speed()
        with mock.patch.object(attention, "attend", without_attention):
            rest = speed()
        setting = memory.Setting(runtime.PRECISIONS["bf16-true"], None, LoRASettings(), batch.lengths or ())
        plan = memory.plan_training(model.config, setting)
        rows.append((f"{length:,}", f"{whole:.0f}", f"{rest:.0f}", f"{plan.parts['activations'] / 1e9:.2f}"))
        print(rows[-1], file=sys.stderr)
    print(table(rows) + "\n")

    rows = [("rows", "opened in", "an epoch's order")]
    for n_rows in (1_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            offsets = torch.arange(n_rows + 1) * 200
            prompts = torch.full((n_rows,), 100, dtype=torch.int32)
            tokens = torch.zeros(n_rows * 200, dtype=torch.int32)
            files.save(Path(folder, "train.pt"), {"tokens": tokens, "offsets": offsets, "prompt_lengths": prompts})
            started = time.perf_counter()
            data = PreparedSet(Path(folder, "train.pt"), mask_inputs=True, max_length=512)
            data.longest(4), data.n_without_labels()
            opened = time.perf_counter()
            permutation(n_rows, seed=1, epoch=0)
            rows.append((f"{n_rows:,}", f"{opened - started:.2f} s", f"{time.perf_counter() - opened:.2f} s"))
    print(table(rows))


if __name__ == "__main__":
    peak(int(sys.argv[2])) if sys.argv[1:2] == ["peak"] else main()
