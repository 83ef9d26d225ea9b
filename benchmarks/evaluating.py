"""Scoring 200 multiple-choice items and continuing 32 prompts, by this project and by lm-eval's own HF model in turn.

Usage: python benchmarks/evaluating.py HF_MODEL TASKS [TASK]
HF_MODEL is a folder that transformers loads (PEERS/SmolLM2-135M-Instruct of benchmarks/peers/setup.sh, or made by
scripts/convert_lit_checkpoint.py), TASKS a folder with a task's YAML file, TASK its name (default: local_arc_easy).
"""

import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lit_gpt.evaluation import LitGPT
from lit_gpt.inference import Assistant
from lit_gpt.report import table

ITEMS, BATCH, ROUNDS = 200, 16, 3
MANNERS = ("a short story about", "a letter that mentions", "one sentence on", "a list of facts about")
THINGS = ("a fox", "the sea in winter", "two sisters who cannot agree", "rain")
PROMPTS = [f"{start} {manner} {thing}." for start in ("Write", "Write me") for manner in MANNERS for thing in THINGS]
LONG = {"until": [], "max_gen_toks": 64, "do_sample": False}


def in_turn(models: dict[str, Any], work: Callable[[Any], Any]) -> list[tuple[str, float, Any]]:
    """Each model's name, median of seconds, and result."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    results = {}
    for _ in range(ROUNDS):
        for name, model in models.items():
            started = time.perf_counter()
            results[name] = work(model)
            seconds[name].append(time.perf_counter() - started)
    return [(name, statistics.median(times), results[name]) for name, times in seconds.items()]


def main() -> None:
    folder, task = str(Path(sys.argv[1]).resolve()), sys.argv[3] if len(sys.argv) > 3 else "local_arc_easy"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.chdir(sys.argv[2])  # task files name their data from where they are run
    manager = TaskManager(include_path=".")

    def models(batch: int) -> dict[str, LM]:
        theirs = HFLM(pretrained=folder, dtype="bfloat16", batch_size=batch, device="cpu")
        return {"lm-eval's HF model": theirs, "ours": LitGPT(Assistant(Path(folder), "bf16-true"), batch)}

    def score(model: LM) -> str:
        how: dict[str, Any] = {"limit": ITEMS, "bootstrap_iters": 0, "task_manager": manager, "log_samples": False}
        told = lm_eval.simple_evaluate(model, tasks=[task], **how)
        assert told is not None
        metrics = told["results"][task]
        return ", ".join(f"{key.split(',')[0]} {metrics[key]:.3f}" for key in ("acc,none", "acc_norm,none"))

    def prolong(model: LM) -> list[str]:
        requests = [Instance("generate_until", {}, (prompt, dict(LONG)), 0) for prompt in PROMPTS]
        return model.generate_until(requests)

    rows = [("work", "model", "seconds", "ratio", "result")]
    (_, slow, wanted), *_ = measured = in_turn(models(len(PROMPTS)), prolong)
    for name, seconds, texts in measured:
        n_same = sum(ours == theirs for ours, theirs in zip(texts, wanted, strict=True))
        rows.append(
            ("32 prompts, 64 tokens", name, f"{seconds:.2f}", f"{slow / seconds:.2f}", f"{n_same} of 32 texts the same")
        )
    (_, slow, _), *_ = measured = in_turn(models(BATCH), score)
    for name, seconds, scores in measured:
        rows.append((f"{task}, {ITEMS} items", name, f"{seconds:.2f}", f"{slow / seconds:.2f}", scores))
    print(table(rows))


if __name__ == "__main__":
    main()
