"""The loss of held-out rows with a base in 16 bits, in nf4 with the nearest codes, and with codes fitted to rows.

Usage: python benchmarks/calibrating.py CHECKPOINT DATA [OTHER_DATA]   (SmolLM2, two cores, AVX2: a quarter of an hour)
DATA and OTHER_DATA are prepared sets; the codes are fitted to the training rows of DATA, then to those of both. Nothing
is trained.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

from lit_gpt import calibration, checkpoint
from lit_gpt.data import PreparedSet, open_prepared
from lit_gpt.model import GPT
from lit_gpt.report import table
from lit_gpt.runtime import device_of_this_machine, resolve_precision
from lit_gpt.tokenizer import Tokenizer

KIND, N_TOKENS, SEED, AT_ONCE = "bnb.nf4", 32768, 1337, 8


@torch.no_grad()
def loss(model: GPT, rows: PreparedSet) -> str:
    """Mean over the answers' tokens."""
    total, n = 0.0, 0
    for begin in range(0, len(rows), AT_ONCE):
        batch = rows.batch(range(begin, min(begin + AT_ONCE, len(rows))), packing=True)
        device = model.transformer.wte.weight.device
        total += float(model(batch.tokens.to(device), labels=batch.labels.to(device), lengths=batch.lengths))
        n += int((batch.labels >= 0).sum())
    return f"{total / n:.4f}"


def main() -> None:
    source, *folders = map(Path, sys.argv[1:])
    config, tokenizer = checkpoint.load_config(source), Tokenizer(source)
    sets = [open_prepared(folder, tokenizer, config.block_size, config.vocab_size)[1] for folder in folders]
    dtype, device = resolve_precision(None, training=False).frozen, device_of_this_machine()
    with tempfile.TemporaryDirectory() as made:
        bases = [("as it is", source, None), ("nearest", source, KIND)]
        for n in range(1, len(folders) + 1):
            started, fitted = time.monotonic(), Path(made, str(n))
            rows = calibration.open_rows(source, folders[:n], N_TOKENS, SEED)
            errors = calibration.write(source, KIND, rows, fitted)
            name = "fitted to " + " and ".join(map(str, folders[:n]))
            print(f"{name}, {sum(map(len, rows)):,} tokens, in {time.monotonic() - started:.0f} s; errors are {errors}")
            bases.append((name, fitted, None))
        results = []
        for name, folder, kind in bases:
            model = checkpoint.load_model(folder, dtype, device=device, quantize=kind)
            results.append((name, *(loss(model.eval(), part) for part in sets)))
    print(table([("weights", *(f"loss on {folder}" for folder in folders)), *results]))


if __name__ == "__main__":
    main()
