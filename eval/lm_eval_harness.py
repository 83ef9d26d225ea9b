"""Score a model on tasks of the lm-eval harness; see tutorials/evaluation.md."""

import json
from pathlib import Path

from lit_gpt.cli import run

DEFAULT_TASKS = ["arc_challenge", "piqa", "hellaswag", "hendrycksTest-*"]
OWN_TASKS = Path(__file__).parent / "tasks"


def main(
    checkpoint_dir: Path,
    lora_path: Path | None = None,
    precision: str | None = None,
    quantize: str | None = None,
    eval_tasks: list[str] = DEFAULT_TASKS,
    include_path: Path | None = None,
    save_filepath: Path | None = None,
    num_fewshot: int = 0,
    limit: float | None = None,
    bootstrap_iters: int = 100000,
    batch_size: int = 16,
) -> None:
    """Score a model on tasks of the lm-eval harness.

    Args:
        checkpoint_dir: The model, or the base of the adapter.
        lora_path: A LoRA adapter, run unmerged on its base.
        precision: bf16-true, 16-true, 32-true or a mixed one; the default is the best that this machine has.
        quantize: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8, with +head for the output head too; by
            default what the adapter was trained on.
        eval_tasks: Task names or patterns, as "[arc_easy,piqa]"; the original's old names are understood.
        include_path: Folder with task files of your own.
        save_filepath: Where the results go as JSON.
        num_fewshot: Examples before each question.
        limit: Items per task at most, or below 1 their share.
        bootstrap_iters: Resamplings for the standard errors; 0 leaves them out.
        batch_size: So many of the longest questions, with all their answers, or more shorter ones are run at a time.
    """
    import logging
    import os
    import sys

    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"--include_path {include_path} is not a folder")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from lit_gpt import evaluation, files
    except ImportError as error:
        raise ValueError(f"evaluating needs lm-eval ({error}): pip install 'lit-gpt[eval]'") from error
    from lit_gpt.inference import Assistant
    from lit_gpt.report import table

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    results = evaluation.evaluate(
        Assistant(checkpoint_dir, precision, lora_path, quantize),
        eval_tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=bootstrap_iters,
        batch_size=batch_size,
        include_paths=[path for path in (OWN_TASKS, include_path) if path is not None],
    )
    rows = [("task", "metric", "value", "stderr")]
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = metrics.get(f"{name}_stderr,{kind}", "")
                rows.append((task, name, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else ""))
    print(table(rows))
    if save_filepath is not None:
        files.save_text(save_filepath, json.dumps(results, indent=2, default=str) + "\n")
        print(f"wrote {save_filepath}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
