"""What the finetune scripts share around the loop: open and check everything, train, save, report."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_gpt import checkpoint, files, memory, optimizers, quantization
from lit_gpt.args import EvalArgs, TrainArgs
from lit_gpt.data import open_prepared
from lit_gpt.generation import generate
from lit_gpt.lora import LoRASettings
from lit_gpt.model import GPT
from lit_gpt.report import Metrics, duration, table
from lit_gpt.runtime import PRECISIONS, device_of_this_machine, memory_limit_bytes, peak_memory_gb
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.training import Run, evaluate, fit, rehearse, total_steps

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Job:
    """One run: its folders, its data and its flags, checked before anything slow begins.

    `settings` are the script's own arguments; they are saved as `hyperparameters.yaml`, which `--config` reads.
    """

    def __init__(
        self,
        data_dir: Path,
        checkpoint_dir: Path,
        out_dir: Path,
        train: TrainArgs,
        eval: EvalArgs,
        adapter: LoRASettings | None,
        settings: dict[str, Any],
    ):
        """`adapter` None trains every weight. Raises ValueError for whatever the run could not be finished with."""
        if out_dir.exists() and not out_dir.is_dir():
            raise ValueError(f"--out_dir {out_dir} is a file; name a folder")
        self.checkpoint_dir, self.out_dir, self.train, self.eval = checkpoint_dir, out_dir, train, eval
        self.settings, self.seed = settings, int(settings["seed"])
        self.make_optimizer = optimizers.resolve(settings["optimizer"], scaled=settings["precision"] == "16-mixed")
        self.config = config = checkpoint.load_config(checkpoint_dir)
        self.tokenizer = Tokenizer(checkpoint_dir)
        self.max_length = min(train.max_seq_length or config.block_size, config.block_size)
        self.train_data, self.val_data, self.meta = open_prepared(
            data_dir, self.tokenizer, self.max_length, config.vocab_size
        )
        if self.train_data.n_without_labels() == len(self.train_data):
            raise ValueError(
                f"no training row has an answer within {self.max_length} tokens: raise --train.max_seq_length"
            )
        self.longest_rows = self.train_data.longest(train.micro_batch_size)
        self.memory = memory.Setting(
            PRECISIONS[settings["precision"]],
            quantization.resolve(settings.get("quantize")),
            adapter,
            tuple(self.train_data.lengths()[self.longest_rows].tolist()),
            settings["activation_checkpointing"],
            settings["optimizer"],
            device_of_this_machine().type,
        )
        self.plan = memory.plan_training(config, self.memory)

    def run(self, fabric: "Fabric", model: GPT, save: Callable[[Path, Run], None], name: str) -> None:
        """Train what requires gradients; `save(path, run)` writes it, at last as `name` in the out folder."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._announce(fabric, model, trained)
        optimizer = self.make_optimizer(trained, lr=self.train.learning_rate, weight_decay=self.train.weight_decay)
        wrapped, optimizer = fabric.setup(model, optimizer)
        if fabric.is_global_zero:
            files.save_text(self.out_dir / files.HYPERPARAMETERS, to_yaml(self.settings))
        started = time.monotonic()
        with self._advising(fabric.device):
            rehearse(fabric, wrapped, self.train_data.batch(self.longest_rows, packing=self.train.packing))
            run = fit(
                fabric,
                wrapped,
                optimizer,
                self.train_data,
                self.val_data,
                train=self.train,
                eval=self.eval,
                seed=self.seed,
                metrics=Metrics(self.out_dir / files.METRICS, enabled=fabric.is_global_zero),
                save=lambda run: self._save(fabric, save, files.periodic_name(run.iteration), run),
                sample=lambda number: self._sample(fabric, model, number) if fabric.is_global_zero else "",
            )
        self._save(fabric, save, name, run)  # first of all: nothing that follows may cost the result
        if self.eval.final_validation:
            run.val_loss = evaluate(fabric, wrapped, self.val_data, self.train, self.eval.max_iters)
        if fabric.is_global_zero:
            if self.eval.final_validation and (text := self._sample(fabric, model, 0)):
                print(text, file=sys.stderr)
            self._report(run, time.monotonic() - started, name)

    def _announce(self, fabric: "Fabric", model: GPT, trained: list[torch.nn.Parameter]) -> None:
        if not fabric.is_global_zero:
            return
        n_steps = total_steps(len(self.train_data), self.train)
        longest = int(self.train_data.lengths().max())
        cut = sum(self.meta[part].get("truncated", 0) for part in ("train.pt", "test.pt"))
        n_trained, n_all = (sum(p.numel() for p in group) for group in (trained, model.parameters()))
        say = [
            f"training {n_trained:,} of {n_all:,} parameters on {fabric.device} in {self.settings['precision']}",
            f"{len(self.train_data):,} training rows, {len(self.val_data):,} validation rows, the longest of "
            f"{longest:,} tokens; {n_steps:,} steps of {self.train.global_batch_size} rows",
        ]
        if silent := self.train_data.n_without_labels():
            say.append(f"{silent:,} training rows have no answer within {self.max_length} tokens and teach nothing")
        if cut:
            say.append(f"{cut} rows were cut to {self.meta['max_seq_length']} tokens when they were prepared")
        parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in self.plan.parts.items() if size >= 5e6)
        say.append(f"planned memory at the peak: {self.plan.gb:.2f} GB ({parts})")
        if self.plan.total > (limit := memory_limit_bytes(fabric.device)):
            told = memory.advice(self.config, self.memory, limit)
            say.append(f"warning: this device has {limit / 1e9:.2f} GB; {told}")
        print("\n".join(say), file=sys.stderr, flush=True)

    @contextmanager
    def _advising(self, device: torch.device) -> Iterator[None]:
        """Say with which flags it would fit when memory runs out."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            limit = memory_limit_bytes(device)
            raise ValueError(
                f"out of memory: {self.plan.gb:.2f} GB were planned and this device has {limit / 1e9:.2f} GB; "
                f"{memory.advice(self.config, self.memory, 0.9 * limit)}; see tutorials/oom.md"
            ) from error

    def _save(self, fabric: "Fabric", save: Callable[[Path, Run], None], name: str, run: Run) -> None:
        if fabric.is_global_zero:
            save(self.out_dir / name, run)
        fabric.barrier()

    def _sample(self, fabric: "Fabric", model: GPT, number: int) -> str:
        """The model's answer to a validation row beside the row's own; another row each time."""
        if self.eval.max_new_tokens == 0:
            return ""
        prompt, expected = self.val_data.prompt_and_answer(number % len(self.val_data))
        model.eval()
        with fabric.autocast():
            answer = generate(model, prompt, self.eval.max_new_tokens, stop_ids=self.tokenizer.stop_ids)
            text = self.tokenizer.decode(answer)
        model.train()
        return f"  answered: {text.strip()}\n  expected: {self.tokenizer.decode(expected).strip()}"

    def _report(self, run: Run, seconds: float, name: str) -> None:
        figures = {
            "steps": run.step,
            "tokens": run.tokens,
            "tokens_per_s": round(run.tokens_per_s, 1),
            "train_loss": round(run.loss, 4),
            "val_loss": round(run.val_loss, 4) if self.eval.final_validation else None,
            "seconds": round(seconds, 1),
            "peak_memory_gb": round(peak_memory_gb(), 2),
            "planned_memory_gb": round(self.plan.gb, 2),
        }
        files.save_text(self.out_dir / files.REPORT, json.dumps(figures, indent=2) + "\n")
        rows = [("figure", "value"), *((key, f"{value:,}") for key, value in figures.items() if value is not None)]
        print(f"\n{table(rows)}\n\ntrained in {duration(seconds)}; saved {self.out_dir / name}", file=sys.stderr)


def to_yaml(settings: dict[str, Any]) -> str:
    """A script's arguments as YAML that `--config` reads back."""
    import yaml

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return asdict(value)
        return str(value) if isinstance(value, Path) else value

    return yaml.safe_dump({key: plain(value) for key, value in settings.items()}, sort_keys=False)
