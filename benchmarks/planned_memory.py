"""The planner against what five short runs of finetune/lora.py on this machine's CPU held at most.

Usage: python benchmarks/planned_memory.py DATA.json   (after `make quickstart` has fetched the model; five minutes)
DATA.json holds rows with instruction, input and output, such as Alpaca's; they are cut to 512 tokens.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from lit_gpt.report import table

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "checkpoints" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
ALL = "--lora_key true --lora_projection true --lora_mlp true"
SETTINGS = (
    "--precision bf16-mixed",
    "--precision bf16-true --quantize bnb.nf4",
    "--precision 32-true --train.micro_batch_size 2",
    "--precision bf16-mixed --activation_checkpointing true",
    f"--precision bf16-true --train.micro_batch_size 1 {ALL}",
)


def script(name: str, flags: str) -> None:
    subprocess.run([sys.executable, str(ROOT / name), *flags.split()], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    rows = [("setting", "planned GB", "measured GB", "ratio")]
    with tempfile.TemporaryDirectory() as folder:
        data = f"--json_path {sys.argv[1]} --max_seq_length 512"
        script("scripts/prepare_json.py", f"{data} --destination_path {folder}/data --checkpoint_dir {MODEL}")
        run = f"--checkpoint_dir {MODEL} --data_dir {folder}/data --train.global_batch_size 8 --train.max_steps 3"
        for number, setting in enumerate(SETTINGS):
            out = f"{folder}/{number}"
            script("finetune/lora.py", f"{run} --out_dir {out} --eval.max_iters 2 --eval.max_new_tokens 0 {setting}")
            report = json.loads(Path(out, "report.json").read_text())
            planned, measured = report["planned_memory_gb"], report["peak_memory_gb"]
            rows.append((setting, f"{planned:.2f}", f"{measured:.2f}", f"{planned / measured:.2f}"))
    print(table(rows))


if __name__ == "__main__":
    main()
