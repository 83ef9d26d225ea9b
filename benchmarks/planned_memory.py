"""What each remedy against running out of memory saves, and the planner beside it: short runs on this machine's CPU.

Usage: python benchmarks/planned_memory.py DATA.json   (after `make quickstart` has fetched the model; 6 to 10 minutes)
DATA.json holds rows with instruction, input and output, such as Alpaca's; the longest are taken, cut to 512 tokens.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from lit_gpt.data import read_records
from lit_gpt.report import table

N_ROWS = 36  # two steps of 16, and some for validation
ROOT = Path(__file__).parents[1]
MODEL = ROOT / "checkpoints" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
BASES = {"lora": "--precision bf16-mixed", "full": "--precision bf16-mixed --train.micro_batch_size 1"}
REMEDIES = (
    ("lora", ""),
    ("lora", "--train.micro_batch_size 1"),
    ("lora", "--train.max_seq_length 256"),
    ("lora", "--precision bf16-true"),
    ("lora", "--quantize bnb.nf4"),
    ("lora", "--activation_checkpointing true"),
    ("lora", "--train.micro_batch_size 1 --activation_checkpointing true --quantize bnb.nf4"),
    ("lora", "--lora_key true --lora_projection true --lora_mlp true"),
    ("lora", "--precision 32-true"),
    ("full", ""),
    ("full", "--optimizer adamw-8bit"),
    ("full", "--optimizer sgd"),
    ("full", "--precision bf16-true"),
)


def script(name: str, flags: str) -> None:
    subprocess.run([sys.executable, str(ROOT / name), *flags.split()], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    rows = [("finetune/", "besides --precision bf16-mixed", "planned GB", "measured GB", "ratio")]
    with tempfile.TemporaryDirectory() as folder:
        # Rows of nearly one length fill every micro-batch.
        longest = sorted(read_records(Path(sys.argv[1])), key=lambda row: -sum(map(len, row.values())))
        Path(folder, "rows.json").write_text(json.dumps(longest[:N_ROWS]))
        data = f"--json_path {folder}/rows.json --max_seq_length 512"
        script("scripts/prepare_json.py", f"{data} --destination_path {folder}/data --checkpoint_dir {MODEL}")
        run = f"--checkpoint_dir {MODEL} --data_dir {folder}/data --train.global_batch_size 16 --train.max_steps 2"
        for number, (name, remedy) in enumerate(REMEDIES):
            out = f"{folder}/{number}"
            flags = f"{run} --out_dir {out} --eval.final_validation false {BASES[name]} {remedy}"
            script(f"finetune/{name}.py", flags)
            report = json.loads(Path(out, "report.json").read_text())
            planned, measured = report["planned_memory_gb"], report["peak_memory_gb"]
            shown = f"{BASES[name]} {remedy}".removeprefix("--precision bf16-mixed").strip()
            rows.append((f"{name}.py", shown, f"{planned:.2f}", f"{measured:.2f}", f"{planned / measured:.2f}"))
    print(table(rows))


if __name__ == "__main__":
    main()
