"""The training loop: schedule, one step, validation, and `fit`, which the finetune scripts share."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lit_gpt.args import EvalArgs, TrainArgs
from lit_gpt.data import Batch, PreparedSet
from lit_gpt.report import Metrics, Progress

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch.nn import Module
    from torch.optim import Optimizer


def steps_per_epoch(n_rows: int, args: TrainArgs) -> int:
    return math.ceil(n_rows / args.global_batch_size)


def total_steps(n_rows: int, args: TrainArgs) -> int:
    """Optimizer steps of the whole run."""
    steps = args.epochs * steps_per_epoch(n_rows, args)
    return min(steps, args.max_steps) if args.max_steps is not None else steps


def learning_rate(step: int, n_steps: int, args: TrainArgs) -> float:
    """The rate of the step with this number, from 0: linear warm-up to the peak, then a cosine to `min_lr`.

    The first step's rate is not 0, and the peak is reached (Loshchilov & Hutter 2017, arXiv:1608.03983).
    """
    warmup = args.lr_warmup_steps if args.lr_warmup_steps is not None else min(100, n_steps // 10)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, n_steps - warmup)
    return args.min_lr + (args.learning_rate - args.min_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def permutation(n_rows: int, seed: int, epoch: int) -> list[int]:
    """The order of the rows in an epoch: a function of seed and epoch alone, so that it needs no saving."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return torch.randperm(n_rows, generator=generator).tolist()


def step_rows(n_rows: int, args: TrainArgs, seed: int) -> Iterator[tuple[int, list[int]]]:
    """The epoch and the rows of each optimizer step, in order, epoch after epoch."""
    for epoch in range(args.epochs):
        order = permutation(n_rows, seed, epoch)
        for start in range(0, n_rows, args.global_batch_size):
            yield epoch, order[start : start + args.global_batch_size]


def micro_batches(data: PreparedSet, rows: Sequence[int], args: TrainArgs) -> Iterator[Batch]:
    """The rows, `micro_batch_size` at a time; with packing, as many at a time as the longest so many would fill."""
    if args.packing:
        groups = pack([int(n) for n in data.lengths(rows)], data.n_longest(args.micro_batch_size))
    else:
        groups = [list(range(i, i + args.micro_batch_size)) for i in range(0, len(rows), args.micro_batch_size)]
    for group in groups:
        yield data.batch([rows[place] for place in group if place < len(rows)], packing=args.packing)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places of rows in groups of at most `capacity` tokens, in few groups: best fit, the longest rows first.

    (Johnson et al. 1974, doi:10.1137/0203025: at most 11/9 of the fewest possible, and a constant.)
    A row that is longer than the capacity has a group of its own.
    """
    groups: list[tuple[int, list[int]]] = []  # room left, places
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        length = lengths[place]
        fitting = [index for index, (room, _) in enumerate(groups) if room >= length]
        if fitting:
            best = min(fitting, key=lambda index: groups[index][0])
            room, places = groups[best]
            groups[best] = (room - length, [*places, place])
        else:
            groups.append((capacity - length, [place]))
    return [sorted(places) for _, places in groups]


@dataclass(frozen=True)
class StepResult:
    """Sums over one step's labelled tokens; tensors, so that nobody waits for them before they are asked for."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    n_labels: torch.Tensor


def train_step(
    fabric: "Fabric", model: "Module", optimizer: "Optimizer", batches: Sequence[Batch], max_norm: float
) -> StepResult:
    """One optimizer step on micro-batches of summed losses, whose mean over labelled tokens is taken once.

    So the gradient does not depend on how rows are spread over micro-batches and devices.
    """
    n_labels = over_devices(fabric, torch.tensor(float(sum(batch.n_labels for batch in batches)), device=fabric.device))
    total = torch.zeros((), device=fabric.device)
    for index, batch in enumerate(batches):
        with fabric.no_backward_sync(model, enabled=index < len(batches) - 1):  # type: ignore[arg-type]
            loss = summed_loss(fabric, model, batch)
            # The devices' gradients will be averaged, so each loss counts world_size times.
            fabric.backward(loss * (fabric.world_size / n_labels.clamp(min=1)))
        total += loss.detach()
    norm = torch.zeros(())
    if max_norm:
        clipped = fabric.clip_gradients(model, optimizer, max_norm=max_norm)
        norm = clipped if clipped is not None else norm
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(over_devices(fabric, total), norm, n_labels)


def rehearse(fabric: "Fabric", model: "Module", batch: Batch) -> None:
    """Run one micro-batch there and back and forget it: what does not fit fails now, not in an hour.

    Random states and gradients are as before.
    """
    devices = [fabric.device] if fabric.device.type == "cuda" else []
    with torch.random.fork_rng(devices), fabric.no_backward_sync(model):  # type: ignore[arg-type]
        fabric.backward(summed_loss(fabric, model, batch))
    for parameter in model.parameters():
        parameter.grad = None


def over_devices(fabric: "Fabric", value: torch.Tensor) -> torch.Tensor:
    """The sum of every device's value."""
    total = fabric.all_reduce(value, reduce_op="sum")
    assert isinstance(total, torch.Tensor)
    return total


def summed_loss(fabric: "Fabric", model: "Module", batch: Batch) -> torch.Tensor:
    """The summed cross entropy of a batch's labelled tokens."""
    tokens, labels, where = (t.to(fabric.device) for t in (batch.tokens, batch.labels, batch.where))
    return model(tokens, labels=labels, where=where, lengths=batch.lengths)


@torch.no_grad()
def evaluate(fabric: "Fabric", model: "Module", data: PreparedSet, train: TrainArgs, max_iters: int) -> float:
    """Mean loss per labelled token over the first `max_iters` micro-batches, which are always the same ones."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    n_rows = min(len(data), max_iters * train.micro_batch_size)
    for batch in micro_batches(data, range(fabric.global_rank, n_rows, fabric.world_size), train):
        sums += torch.tensor([float(summed_loss(fabric, model, batch)), batch.n_labels], dtype=torch.float64)
    model.train()
    loss, n_labels = over_devices(fabric, sums.to(fabric.device)).tolist()
    return loss / max(n_labels, 1)


@dataclass
class Run:
    """How far a run is, and its closing figures."""

    step: int = 0
    iteration: int = 0  # micro-batches of one device
    tokens: int = 0
    loss: float = float("nan")
    val_loss: float = float("nan")
    seconds: float = 0.0  # spent training, without validation and saving

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def fit(
    fabric: "Fabric",
    model: "Module",
    optimizer: "Optimizer",
    train_data: PreparedSet,
    val_data: PreparedSet,
    *,
    train: TrainArgs,
    eval: EvalArgs,
    seed: int,
    metrics: Metrics,
    save: Callable[[Run], None] = lambda run: None,
    sample: Callable[[int], str] = lambda number: "",
) -> Run:
    """Train for `train.epochs` or `train.max_steps`; returns the run's figures.

    `save` is called every `save_interval` steps; `sample` gives the text that is printed with the n-th validation.
    """
    run, n_steps = Run(), total_steps(len(train_data), train)
    n_validations = 0
    model.train()
    with Progress("training", n_steps, enabled=fabric.is_global_zero) as progress:

        def validate() -> None:
            nonlocal n_validations
            run.val_loss = evaluate(fabric, model, val_data, train, eval.max_iters)
            progress.note(f"step {run.step}: validation loss {run.val_loss:.4f}")
            if text := sample(n_validations):
                progress.note(text)
            n_validations += 1

        if eval.initial_validation:
            validate()
            metrics.write(step=0, iteration=0, epoch=0, tokens=0, val_loss=run.val_loss)
        started = time.perf_counter()
        since = (started, 0)  # time and tokens at the last log
        sums: list[StepResult] = []
        for epoch, rows in step_rows(len(train_data), train, seed):
            if run.step == n_steps:
                break
            batches = list(micro_batches(train_data, rows[fabric.global_rank :: fabric.world_size], train))
            if not batches:  # fewer rows than devices in the last step of an epoch: take part, and ask nothing
                batches = [train_data.batch(rows[:1], packing=train.packing).unlabelled()]
            rate = learning_rate(run.step, n_steps, train)
            for group in optimizer.param_groups:
                group["lr"] = rate
            sums.append(train_step(fabric, model, optimizer, batches, train.max_norm))
            run.step += 1
            run.iteration += len(batches)
            run.tokens += train_data.n_tokens(rows)
            validates = bool(eval.interval) and run.step % eval.interval == 0 and run.step < n_steps
            if run.step % train.log_interval == 0 or run.step == n_steps or validates:
                loss, n_labels = (float(sum(getattr(s, name) for s in sums)) for name in ("loss", "n_labels"))
                run.loss = loss / max(n_labels, 1)
                now = time.perf_counter()
                speed = (run.tokens - since[1]) / (now - since[0])
                run.seconds += now - since[0]
                row: dict[str, float] = {
                    "step": run.step,
                    "iteration": run.iteration,
                    "epoch": epoch,
                    "tokens": run.tokens,
                }
                row |= {"loss": run.loss, "learning_rate": rate, "grad_norm": float(sums[-1].grad_norm)}
                row["tokens_per_s"] = round(speed, 1)
                sums.clear()
                progress.update(
                    run.step, f"step {run.step}/{n_steps} loss {run.loss:.4f} {run.tokens_per_s:.0f} tokens/s"
                )
                if validates:
                    validate()
                    row["val_loss"] = run.val_loss
                metrics.write(**row)
                since = (time.perf_counter(), run.tokens)
            if train.save_interval and run.step % train.save_interval == 0 and run.step < n_steps:
                save(run)
    return run
