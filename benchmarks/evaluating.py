"""Scoring 200 multiple-choice items, by this project and by lm-eval's own HF model in turn: seconds and scores.

Usage: python benchmarks/evaluating.py HF_MODEL TASKS [TASK]
HF_MODEL is a folder that transformers loads (PEERS/SmolLM2-135M-Instruct of benchmarks/peers/setup.sh, or made by
scripts/convert_lit_checkpoint.py), TASKS a folder with a task's YAML file, TASK its name (default: local_arc_easy).
"""

import logging
import os
import statistics
import sys
import time
from pathlib import Path

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lit_gpt.evaluation import LitGPT
from lit_gpt.inference import Assistant
from lit_gpt.report import table

ITEMS, BATCH, ROUNDS = 200, 16, 3
METRICS = ("acc,none", "acc_norm,none")


def main() -> None:
    folder, task = str(Path(sys.argv[1]).resolve()), sys.argv[3] if len(sys.argv) > 3 else "local_arc_easy"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.chdir(sys.argv[2])  # task files name their data from where they are run
    manager = TaskManager(include_path=".")
    models = {
        "lm-eval's HF model": HFLM(pretrained=folder, dtype="bfloat16", batch_size=BATCH, device="cpu"),
        "ours": LitGPT(Assistant(Path(folder), "bf16-true"), BATCH),
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    scores = {}
    for _ in range(ROUNDS):
        for name, model in models.items():
            started = time.perf_counter()
            told = lm_eval.simple_evaluate(
                model, tasks=[task], limit=ITEMS, bootstrap_iters=0, task_manager=manager, log_samples=False
            )
            seconds[name].append(time.perf_counter() - started)
            assert told is not None
            scores[name] = {
                key: value for key, value in told["results"][task].items() if key in ("acc,none", "acc_norm,none")
            }
    slow = statistics.median(seconds["lm-eval's HF model"])
    rows = [("model", "seconds", "ratio", "scores")]
    for name, times in seconds.items():
        told = ", ".join(
            f"{key.split(',')[0]} {value:.3f}" for key, value in scores[name].items() if "stderr" not in key
        )
        rows.append((name, f"{statistics.median(times):.1f}", f"{slow / statistics.median(times):.2f}", told))
    print(table(rows))


if __name__ == "__main__":
    main()
