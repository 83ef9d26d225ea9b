"""What the finetune scripts share around the loop: open and check everything, train, save, report."""

import json
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_gpt import attention, checkpoint, files, memory, optimizers, quantization, resume
from lit_gpt.args import EvalArgs, TrainArgs
from lit_gpt.data import open_prepared
from lit_gpt.generation import generate
from lit_gpt.lora import LoRASettings
from lit_gpt.model import GPT
from lit_gpt.report import Metrics, duration, say, table
from lit_gpt.runtime import (
    PRECISIONS,
    device_of_this_machine,
    is_first_process,
    is_out_of_memory,
    keep_few_products,
    keep_memory,
    memory_limit_bytes,
    peak_memory_gb,
    wants_compile,
)
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.training import Diverged, Run, evaluate, fit, rehearse, total_steps

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Job:
    """One run: its folders, its data and its flags, checked before anything slow begins.

    `settings` are the script's own arguments; they are saved as `hyperparameters.yaml`, which `--config` reads.
    From here on the out folder is this process's own, and it is known where the run begins.
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
        if adapter is None and out_dir.resolve() == checkpoint_dir.resolve():
            raise ValueError("--out_dir is the base's own folder, which must stay as it is; name another")
        self.checkpoint_dir, self.out_dir, self.train, self.eval = checkpoint_dir, out_dir, train, eval
        self.settings, self.seed = plain(settings), int(settings["seed"])
        where, override = (self.settings.pop(name) for name in ("resume", "resume_override"))
        self.make_optimizer = optimizers.resolve(settings["optimizer"], scaled=settings["precision"] == "16-mixed")
        self.config = config = checkpoint.load_config(checkpoint_dir)
        if attention.few_shapes(config.attention_softcap):
            keep_few_products()
        keep_memory()
        self.tokenizer = Tokenizer(checkpoint_dir)
        self.max_length = min(train.max_seq_length or config.block_size, config.block_size)
        self.train_data, self.val_data, self.meta = open_prepared(
            data_dir, self.tokenizer, self.max_length, config.vocab_size
        )
        if self.train_data.n_without_labels() == len(self.train_data):
            raise ValueError(
                f"no training row has an answer within {self.max_length} tokens: raise --train.max_seq_length"
            )
        n_looked_at = min(len(self.val_data), eval.max_iters * train.micro_batch_size)
        validates = eval.interval or eval.initial_validation or eval.final_validation
        if validates and self.val_data.n_without_labels(n_looked_at) == n_looked_at:
            raise ValueError(
                f"none of the {n_looked_at:,} validation rows has an answer within {self.max_length} tokens: raise "
                "--train.max_seq_length or --eval.max_iters, or switch validation off (--eval.interval 0 "
                "--eval.final_validation false)"
            )
        self.n_steps = total_steps(len(self.train_data), train)
        self.is_first = is_first_process(settings["devices"], settings["num_nodes"])
        if self.is_first:
            self._lock = resume.Lock(out_dir)
            weakref.finalize(self, self._lock.release)
            resume.sweep(out_dir)
        self.found = resume.choose(where, out_dir)
        if self.found is not None:
            self._compare(self.found, override)
        self.longest_rows = self.train_data.longest(train.micro_batch_size)
        longest = self.train_data.lengths()[self.longest_rows].tolist()
        quantize, n_skipped = quantization.resolve(settings.get("quantize")), 0
        if adapter and not quantize:
            quantize, n_skipped = checkpoint.kept_kind(checkpoint_dir)
        self.memory = memory.Setting(
            PRECISIONS[settings["precision"]],
            quantize,
            adapter,
            tuple(longest if train.packing else [max(longest)] * len(longest)),
            settings["activation_checkpointing"],
            settings["optimizer"],
            device_of_this_machine().type,
            n_skipped,
        )
        self.plan = memory.plan_training(config, self.memory)

    def load_model(self, fabric: "Fabric", dtype: torch.dtype, **how: Any) -> GPT:
        """`checkpoint.load_model` of the base, on the run's device. ValueError with advice if it has no room."""
        with self._advising(fabric.device):
            return checkpoint.load_model(self.checkpoint_dir, dtype, device=fabric.device, **how)

    def compiles(self, fabric: "Fabric") -> bool:
        """Whether `--compile` means this run."""
        return wants_compile(self.settings["compile"], fabric.device.type, self.n_steps)

    @cached_property
    def base_fingerprint(self) -> str:
        return checkpoint.fingerprint(self.checkpoint_dir)

    def _compare(self, found: resume.Found, override: bool) -> None:
        """Say what was found. Raises ValueError that names what has changed, unless it may."""
        changed = resume.differences(found.state["settings"], self.settings)
        for flag, (name, value) in zip(("--data_dir", "--checkpoint_dir"), self._contents().items(), strict=True):
            if found.state[name] != value:
                changed.append(f"{flag} holds another {name} than it did")
        if changed and not override:
            raise ValueError(
                f"{found.path} was saved with other settings, with which the result would be another: "
                f"{'; '.join(changed)}. Put them back, or continue all the same with --resume_override true"
            )
        if self.is_first:
            say(*found.notes, *(f"warning: {change}" for change in changed))
            say(f"continuing after step {found.state['run']['step']} of {self.n_steps} from {found.path}")

    def _contents(self) -> dict[str, str]:
        """Tell whether the folders still hold what they did."""
        return {"training set": self.train_data.fingerprint(), "base": self.base_fingerprint}

    def run(self, fabric: "Fabric", model: GPT, save: Callable[[Path, Run], None], name: str) -> None:
        """Train what requires gradients; `save(path, run)` writes it, at last as `name` in the out folder."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._announce(fabric, trained)
        optimizer = self.make_optimizer(trained, lr=self.train.learning_rate, weight_decay=self.train.weight_decay)
        wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
        keeper = resume.Keeper(fabric, model, optimizer, self.out_dir, save, self.n_steps, self.train.keep_last)
        started = time.monotonic()
        with self._advising(fabric.device), resume.Signals(spoken=fabric.is_global_zero) as signals:
            # Seconds for nothing where there is plenty; several devices have to do the same, and may share memory.
            if fabric.world_size > 1 or self.plan.total > memory_limit_bytes(fabric.device) / 2:
                rehearse(fabric, wrapped, self.train_data.batch(self.longest_rows, packing=self.train.packing))
            run, metrics = self._begin(fabric, model, optimizer)
            told = {"settings": self.settings, "environment": resume.environment(fabric), **self._contents()}
            with self._stopping_well(keeper):
                fit(
                    fabric,
                    wrapped,
                    wrapped_optimizer,
                    self.train_data,
                    self.val_data,
                    train=self.train,
                    eval=self.eval,
                    seed=self.seed,
                    metrics=metrics,
                    run=run,
                    save=lambda run: keeper.save(run, told, metrics),
                    validated=lambda run: self._validated(fabric, model, keeper, run),
                    stopping=lambda: signals.anywhere(fabric),
                )
        if run.step < self.n_steps:
            keeper.leave(run, signals)
        keeper.write(run, name)  # first of all: nothing that follows may cost the result
        text = ""
        if self.eval.final_validation:
            run.val_loss = evaluate(fabric, wrapped, self.val_data, self.train, self.eval.max_iters)
            run.n_validations = 0  # the first row's answer once more
            text = self._validated(fabric, model, keeper, run)
        if fabric.is_global_zero:
            say(text)
            self._report(run, time.monotonic() - started, name)
            resume.clear_states(self.out_dir)
            self._lock.release()

    def _begin(self, fabric: "Fabric", model: GPT, optimizer: torch.optim.Optimizer) -> tuple[Run, Metrics]:
        """Where the run is, as it was left or at its start; the out folder is made to say the same."""
        path, first = self.out_dir / files.METRICS, fabric.is_global_zero
        if first:
            if self.found is None:
                (self.out_dir / files.REPORT).unlink(missing_ok=True)
                resume.clear_states(self.out_dir)
            files.save_text(self.out_dir / files.HYPERPARAMETERS, to_yaml(self.settings))
        if self.found is None:
            return Run(), Metrics(path, enabled=first)
        state, begun = self.found.state, self.found.metrics() if first else ""
        self.found = None  # nobody needs the file's pages any more
        resume.restore(state, fabric, model, optimizer)
        if first and state["environment"] != (now := resume.environment(fabric)):
            say(f"warning: saved with {state['environment']}, continued with {now}: losses may differ in rounding")
        return Run(**state["run"]), Metrics(path, begun=begun, enabled=first)

    def _validated(self, fabric: "Fabric", model: GPT, keeper: resume.Keeper, run: Run) -> str:
        """Keep the best weights, if they are to be kept; returns the sample answer."""
        if self.train.keep_best and run.step and run.val_loss < run.best_val_loss:
            run.best_val_loss = run.val_loss
            keeper.write(run, files.BEST)
        return self._sample(fabric, model, run.n_validations) if fabric.is_global_zero else ""

    @contextmanager
    def _stopping_well(self, keeper: resume.Keeper) -> Iterator[None]:
        """Where the loop cannot go on, say why, what is left and what to do."""
        try:
            yield
        except Diverged as error:
            _, answer = self.train_data.prompt_and_answer(error.rows[0])
            begins = self.tokenizer.decode(answer)[:60].strip()
            problem = f"{error} of {self.train_data.path} (the answer begins {begins!r})"
            keeper.stop(problem, "leave such steps out with --train.on_nan skip", " --train.on_nan skip")
        except OSError as error:
            keeper.stop(f"{self.out_dir} cannot be written to: {error}", "make room")

    def _announce(self, fabric: "Fabric", trained: list[torch.nn.Parameter]) -> None:
        if not fabric.is_global_zero:
            return
        longest = int(self.train_data.lengths().max())
        cut = sum(self.meta[part].get("truncated", 0) for part in ("train.pt", "test.pt"))
        base = checkpoint.parameter_metas(checkpoint.hollow(self.config)).values()  # its own may be in few bits
        n_trained, n_base = (sum(p.numel() for p in group) for group in (trained, base))
        n_all = n_base if self.memory.lora is None else n_base + n_trained
        lines = [
            f"training {n_trained:,} of {n_all:,} parameters on {fabric.device} in {self.settings['precision']}",
            f"{len(self.train_data):,} training rows, {len(self.val_data):,} validation rows, the longest of "
            f"{longest:,} tokens; {self.n_steps:,} steps of {self.train.global_batch_size} rows",
        ]
        if silent := self.train_data.n_without_labels():
            lines.append(f"{silent:,} training rows have no answer within {self.max_length} tokens and teach nothing")
        if cut:
            lines.append(f"{cut} rows were cut to {self.meta['max_seq_length']} tokens when they were prepared")
        if self.compiles(fabric):
            lines.append("compiling the blocks on first use: a minute or two, less when torch has kept its work")
        parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in self.plan.parts.items() if size >= 5e6)
        lines.append(f"planned memory at the peak: {self.plan.gb:.2f} GB ({parts})")
        if self.plan.total > (limit := memory_limit_bytes(fabric.device)):
            told = memory.advice(self.config, self.memory, limit)
            lines.append(f"warning: this device has {limit / 1e9:.2f} GB; {told}")
        say(*lines)

    @contextmanager
    def _advising(self, device: torch.device) -> Iterator[None]:
        """Say with which flags it would fit when memory runs out."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            limit = memory_limit_bytes(device)
            raise ValueError(
                f"out of memory: {self.plan.gb:.2f} GB were planned and this device has {limit / 1e9:.2f} GB; "
                f"{memory.advice(self.config, self.memory, 0.9 * limit)}; see tutorials/oom.md"
            ) from error

    def _sample(self, fabric: "Fabric", model: GPT, number: int) -> str:
        """The model's answer to a validation row beside the row's own; another row each time."""
        # A set may have been prepared for a longer context, and a sample must not end a run.
        fits = (self.val_data.prompt_lengths < self.config.block_size).nonzero()[:, 0]
        if self.eval.max_new_tokens == 0 or not len(fits):
            return ""
        prompt, expected = self.val_data.prompt_and_answer(int(fits[number % len(fits)]))
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


def plain(value: Any) -> Any:
    """A script's arguments as a file can hold them."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return str(value) if isinstance(value, Path) else value


def to_yaml(settings: dict[str, Any]) -> str:
    """Plain settings as YAML that `--config` reads back."""
    import yaml

    return yaml.safe_dump(settings, sort_keys=False)
