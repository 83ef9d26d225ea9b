"""Training and decoding beside litgpt and peft + trl: same model, data, rank and batch, in turn; medians and ratios.

Usage: python benchmarks/compare.py PEERS DATA.json [ROUNDS]
PEERS is a folder that `bash benchmarks/peers/setup.sh PEERS` has made; DATA.json has Alpaca's fields. SmolLM2-135M must
have been fetched (`make quickstart`). Seven to eleven minutes a round on two cores. Nothing else should run meanwhile.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lit_gpt import checkpoint
from lit_gpt.config import Config
from lit_gpt.report import table

HERE = Path(__file__).parent
MODEL = HERE.parent / "checkpoints" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STEPS, PEER_STEPS = 12, 4  # a step of theirs takes as long as several of ours


def last_json(command: list[str]) -> dict:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_flops(dtype: torch.dtype) -> float:
    """The median speed of the model's own largest products for two seconds, in floating-point operations per second."""
    x, w = torch.randn(2048, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    seconds: list[float] = []
    while sum(seconds) < 2:
        started = time.perf_counter()
        torch.nn.functional.linear(x, w)
        seconds.append(time.perf_counter() - started)
    return 2 * 2048 * 576 * 1536 / statistics.median(seconds)


def flops_per_token(config: Config) -> int:
    """What LoRA on a frozen base needs: two operations per weight forward, two for the gradient on the way back.

    Without attention's own products, and as if every token had a label.
    """
    metas = checkpoint.parameter_metas(checkpoint.hollow(config))
    weights = sum(p.numel() for name, p in metas.items() if p.ndim == 2 and "wte" not in name)
    return 4 * (weights + config.vocab_size * config.n_embd * config.tie_embeddings)


def main() -> None:
    peers, data, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 3
    hf, litgpt = peers / "hf/bin/python", peers / "litgpt/bin/python"
    hf_model, litgpt_model = (
        peers / "SmolLM2-135M-Instruct",
        peers / "lg/checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    peak: dict[str, list[float]] = {name: [] for name in DTYPES}
    need = flops_per_token(Config.from_name("SmolLM2-135M-Instruct"))
    shares: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as prepared:
        flags = ["--destination_path", prepared, "--checkpoint_dir", str(MODEL), "--max_seq_length", "512"]
        subprocess.run(
            [sys.executable, HERE.parent / "scripts/prepare_json.py", "--json_path", data, *flags], check=True
        )
        ours = [sys.executable, HERE / "peers/train_ours.py", MODEL, prepared, STEPS]
        trl = [hf, HERE / "peers/train_hf.py", hf_model, data, PEER_STEPS]
        runs = {
            "litgpt, bf16": [litgpt, HERE / "peers/train_litgpt.py", litgpt_model, data, PEER_STEPS, "bf16-true"],
            "peft + trl, bf16": [*trl, "bf16"],
            "ours, bf16": [*ours, 4, "bf16-true"],
            "ours, bf16, micro-batch 3": [*ours, 3, "bf16-true"],
            "ours, bf16, micro-batch 2": [*ours, 2, "bf16-true"],
            "ours, bf16, micro-batch 1": [*ours, 1, "bf16-true"],
            "ours, bf16, checkpointing": [*ours, 4, "bf16-true", "--activation_checkpointing=true"],
            "peft + trl, nf4": [*trl, "bf16", 512, "4bit"],
            "ours, nf4": [*ours, 4, "bf16-true", "bnb.nf4"],
            "ours, fp32": [*ours, 4, "32-true"],
        }
        decoding = {
            "transformers, decoding": [hf, HERE / "peers/decode_hf.py", hf_model],
            "litgpt, decoding": [litgpt, HERE / "peers/decode_litgpt.py", litgpt_model],
            "ours, decoding": [sys.executable, HERE / "peers/decode_ours.py", MODEL],
            "ours, decoding, nf4": [sys.executable, HERE / "peers/decode_ours.py", MODEL, 100, "bnb.nf4"],
        }
        seen: dict[str, list[dict]] = {name: [] for name in (*runs, *decoding)}
        for number in range(rounds):
            for name, command in (runs | decoding).items():
                kind = next((kind for kind in DTYPES if kind in name), "bf16")
                # Other guests make the machine a sixth slower for seconds: a run counts beside what is next to it.
                before = peak_flops(DTYPES[kind])
                told = last_json([str(part) for part in command])
                around = (before + peak_flops(DTYPES[kind])) / 2
                seen[name].append(told)
                peak[kind].append(around)
                shares.setdefault(name, []).append(told["tokens_per_s"] * need / around)
                print(f"round {number + 1}, {name}: {told['tokens_per_s']:.0f} tokens/s", file=sys.stderr, flush=True)
    speed = {name: statistics.median(told["tokens_per_s"] for told in rows) for name, rows in seen.items()}
    memory = {name: statistics.median(told["peak_rss_mb"] for told in seen[name]) for name in runs}
    rows = [("training", "tokens/s", "of litgpt", "of peft + trl", "peak MB", "of litgpt", "of the products' speed")]
    for name in runs:
        rival = "peft + trl, nf4" if "nf4" in name else "peft + trl, bf16"
        rows.append(
            (
                name,
                f"{speed[name]:.0f}",
                f"{speed[name] / speed['litgpt, bf16']:.2f}",
                f"{speed[name] / speed[rival]:.2f}",
                f"{memory[name]:.0f}",
                f"{memory[name] / memory['litgpt, bf16']:.2f}",
                f"{statistics.median(shares[name]):.2f}",
            )
        )
    print(table(rows))
    rows = [("decoding", "tokens/s", "of transformers", "of litgpt")]
    for name in decoding:
        ratios = (speed[name] / speed[f"{rival}, decoding"] for rival in ("transformers", "litgpt"))
        rows.append((name, f"{speed[name]:.1f}", *(f"{ratio:.2f}" for ratio in ratios)))
    print("\n" + table(rows) + "\n")
    told = ", ".join(f"{statistics.median(values) / 1e9:.0f} GF/s in {kind}" for kind, values in peak.items())
    print(f"products of 2048 x 576 x 1536: {told}; {need / 1e6:.0f} MF per token")


if __name__ == "__main__":
    main()
