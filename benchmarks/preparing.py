"""Rows per minute of preparing 52,000 Alpaca-like rows, and of a loop that tokenises one text after the other.

Usage: python benchmarks/preparing.py DATA.json [CHECKPOINT]   (DATA.json has Alpaca's fields; its rows are repeated)
The loop does what the original's script did: each prompt, and each prompt with its answer, in a call of its own.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from lit_gpt import data
from lit_gpt.prompts import get_style
from lit_gpt.report import table
from lit_gpt.tokenizer import Tokenizer

MODEL = Path(__file__).parents[1] / "checkpoints" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
N_ROWS = 52_000


def one_by_one(rows: list[data.Record], tokenizer: Tokenizer, path: Path) -> None:
    render, prepared = get_style("alpaca"), []
    for row in rows:
        prompt = render(row["instruction"], row["input"])
        encoded_prompt = torch.tensor(tokenizer.encode(prompt))
        encoded = torch.tensor(tokenizer.encode(prompt + row["output"], eos=True))
        labels = encoded.clone()
        labels[: len(encoded_prompt)] = -1
        prepared.append({**row, "input_ids": encoded, "labels": labels})
    torch.save(prepared, path)


def main() -> None:
    checkpoint = Path(sys.argv[2]) if len(sys.argv) > 2 else MODEL
    some = data.read_records(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        numbered = ({**some[i % len(some)], "input": f"({i})"} for i in range(N_ROWS))  # no two rows alike
        path.write_text(json.dumps(list(numbered)))
        started = time.perf_counter()
        train, test = data.split(data.read_records(path), 0.03865, 42)
        how = {"mask_inputs": True, "max_seq_length": None, "style": "alpaca"}
        data.prepare(train, test, Path(folder, "prepared"), checkpoint, **how)  # type: ignore[arg-type]
        ours = time.perf_counter() - started
        tokenizer, few = Tokenizer(checkpoint), train[: N_ROWS // 10]
        started = time.perf_counter()
        one_by_one(few, tokenizer, Path(folder, "one.pt"))
        theirs = (time.perf_counter() - started) * N_ROWS / len(few)
    rows = [("way", "seconds for 52,000 rows", "rows per minute", "ratio")]
    for name, seconds in (("one by one (a tenth of the rows, times 10)", theirs), ("ours", ours)):
        rows.append((name, f"{seconds:.1f}", f"{N_ROWS / seconds * 60:,.0f}", f"{theirs / seconds:.1f}"))
    print(table(rows))


if __name__ == "__main__":
    main()
