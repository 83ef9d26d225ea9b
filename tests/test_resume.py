"""Exact resume: what was interrupted ends as if it had not been, and what could not is refused and says why."""

import csv
import gc
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_script, run_script

from lit_gpt import checkpoint, files, resume
from lit_gpt.args import EvalArgs, TrainArgs

TRAIN = {"learning_rate": 1e-2, "global_batch_size": 4, "micro_batch_size": 2, "epochs": 6, "save_interval": 4}


@pytest.fixture(autouse=True)
def _late_signals_do_no_harm() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


def rows(out: Path) -> list[dict[str, str]]:
    """metrics.csv without what a clock has measured."""
    with open(out / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in csv.DictReader(file)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    adapter = out / files.ADAPTER
    return files.load_dict(adapter)["model"] if adapter.exists() else files.load_dict(out / files.LIT_MODEL)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train(script: str, out: Path, stories: Path, prepared: Path, *, stop: int = 0, **how: Any) -> int:
    """Run a finetune script here; with `stop`, SIGTERM arrives after so many rows of metrics. Returns the status."""
    done = threading.Event()

    def interrupt() -> None:
        while not done.is_set():
            path = out / "metrics.csv"
            if path.exists() and path.read_text().count("\n") > stop:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.001)

    watcher = threading.Thread(target=interrupt)
    arguments: dict[str, Any] = {"precision": "32-true"}
    arguments |= {"lora_dropout": 0.1, "lora_mlp": True} if script == "lora" else {}
    more = {name: how.pop(name) for name in list(how) if name in TrainArgs.__dataclass_fields__}
    arguments |= {"eval": EvalArgs(interval=5, max_new_tokens=2, initial_validation=True), **how}
    if stop:
        watcher.start()
    try:
        load_script(f"finetune/{script}").main(
            data_dir=prepared, checkpoint_dir=stories, out_dir=out, train=TrainArgs(**{**TRAIN, **more}), **arguments
        )
    except SystemExit as exit:
        return int(exit.code or 0)
    finally:
        done.set()
        gc.collect()  # a job that failed holds its folder until it is gone
    return 0


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "dropout and packing": ("lora", {}),
    "padding, sparse rows, best kept": ("lora", {"packing": False, "log_interval": 3, "keep_best": True}),
    "4-bit base in mixed precision": ("lora", {"quantize": "bnb.nf4", "precision": "bf16-mixed"}),
    "scaled losses": ("lora", {"precision": "16-mixed"}),
    "every weight": ("full", {}),
    "every weight, 8-bit moments": ("full", {"optimizer": "adamw-8bit", "learning_rate": 1e-3}),
}
SLOW_WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "double quantization, bf16": ("lora", {"quantize": "bnb.nf4-dq+head", "precision": "bf16-true"}),
    "8-bit base": ("lora", {"quantize": "bnb.int8"}),
    "every weight in bf16, 8-bit moments": ("full", {"optimizer": "adamw-8bit", "precision": "bf16-true"}),
    "paged": ("lora", {"optimizer": "adamw-paged", "lora_r": 64}),
    "paged, 8 bits": ("lora", {"optimizer": "adamw-8bit-paged", "lora_r": 64}),
    "no moments": ("lora", {"optimizer": "sgd", "learning_rate": 1.0}),
    "checkpointed activations": ("lora", {"activation_checkpointing": True}),
    "no clipping, no decay": ("lora", {"max_norm": 0.0, "weight_decay": 0.0}),
    "one row at a time": ("lora", {"micro_batch_size": 1, "global_batch_size": 3}),
    "skipping": ("lora", {"on_nan": "skip", "log_interval": 4}),
}
ALL_WAYS = {**WAYS, **SLOW_WAYS}


@pytest.mark.parametrize("way", [*WAYS, *(pytest.param(way, marks=pytest.mark.slow) for way in SLOW_WAYS)])
def test_a_run_that_was_stopped_twice_ends_as_if_it_had_not_been(
    way: str, stories: Path, prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    script, how = ALL_WAYS[way]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(script, whole, stories, prepared, **how) == 0
    assert train(script, cut, stories, prepared, **how, stop=3) == 128 + signal.SIGTERM
    said = capfd.readouterr().err
    assert "--resume true" in said.splitlines()[-1]
    step = max(files.numbered(cut, files.state_name))
    assert f"stopped after step {step} of 24" in said
    assert train(script, cut, stories, prepared, **how, resume=True, stop=len(rows(cut)) + 3) == 128 + signal.SIGTERM
    assert step < max(files.numbered(cut, files.state_name)) < 24
    assert train(script, cut, stories, prepared, **how, resume="auto") == 0
    assert same(weights(cut), weights(whole))
    assert rows(cut) == rows(whole)
    assert sorted(path.name for path in cut.iterdir()) == sorted(path.name for path in whole.iterdir())
