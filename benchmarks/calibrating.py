"""Held-out rows by a base in nf4, with the nearest codes and with codes fitted to rows, beside the full weights.

Usage: python benchmarks/calibrating.py CHECKPOINT DATA [OTHER_DATA]   (SmolLM2, two cores: 15 to 30 minutes)
DATA and OTHER_DATA are prepared sets; the codes are fitted to the training rows of DATA, then to those of both, then so
that the MLPs' way out stays in 16 bits. Nothing is trained; all are compared in float32, so that their rounding is no
part of it.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from lit_gpt import calibration, checkpoint
from lit_gpt.data import PreparedSet, open_prepared
from lit_gpt.model import GPT
from lit_gpt.report import table
from lit_gpt.runtime import device_of_this_machine
from lit_gpt.tokenizer import Tokenizer

KIND, N_TOKENS, SEED, N_ROWS = "bnb.nf4", 32768, 1337, 48
SKIPPED = ("mlp.proj",)  # stay in 16 bits in the last


@torch.no_grad()
def compared(model: GPT, full: GPT, rows: PreparedSet) -> str:
    """Over the answers of some rows: the mean loss, and how far what is foretold is from the full model's (KL)."""
    device, sums = full.transformer.wte.weight.device, torch.zeros(3)
    for index in range(min(N_ROWS, len(rows))):
        batch = rows.batch([index], packing=True)
        labels = batch.labels[0, batch.where].to(device)
        ours, theirs = (
            m(batch.tokens.to(device), lengths=batch.lengths)[0, batch.where.to(device)].float().log_softmax(-1)
            for m in (model, full)
        )
        divergence = F.kl_div(ours, theirs, reduction="sum", log_target=True)
        sums += torch.tensor([float(F.nll_loss(ours, labels, reduction="sum")), float(divergence), len(labels)])
    loss, divergence, _ = sums / sums[2]
    return f"{loss:.4f}; {divergence:.4f}"


def main() -> None:
    source, *folders = map(Path, sys.argv[1:])
    config, tokenizer = checkpoint.load_config(source), Tokenizer(source)
    sets = [open_prepared(folder, tokenizer, config.block_size, config.vocab_size)[1] for folder in folders]
    device = device_of_this_machine()
    full = checkpoint.load_model(source, torch.float32, device=device).eval()
    with tempfile.TemporaryDirectory() as made:
        bases = [("as it is", source, None), ("nearest", source, KIND)]
        for n, skip in (*((n, ()) for n in range(1, len(folders) + 1)), (len(folders), SKIPPED)):
            started, fitted = time.monotonic(), Path(made, f"{n} {len(skip)}")
            rows = calibration.open_rows(source, folders[:n], N_TOKENS, SEED)
            errors = calibration.write(source, KIND, rows, fitted, skip=skip)
            name = " and ".join(map(str, folders[:n]))
            name = f"fitted to {name}{', without ' if skip else ''}{', '.join(skip)}"
            print(f"{name}, {sum(map(len, rows)):,} tokens, in {time.monotonic() - started:.0f} s; errors are {errors}")
            bases.append((name, fitted, None))
        results = []
        for name, folder, kind in bases:
            model = checkpoint.load_model(folder, torch.float32, device=device, quantize=kind).eval()
            results.append((name, *(compared(model, full, part) for part in sets)))
    print(table([("weights", *(f"loss; divergence on {folder}" for folder in folders)), *results]))


if __name__ == "__main__":
    main()
