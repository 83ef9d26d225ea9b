"""The training loop: schedule, one step, validation, and `fit`, which the finetune scripts share."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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


def step_rows(n_rows: int, args: TrainArgs, seed: int, longest: int, first: int = 0) -> Iterator[list[int]]:
    """The rows of each optimizer step from the one with number `first`, in order, epoch after epoch.

    The `longest` row is the first of all, so that one that is too long by itself fails at once.
    """
    first_epoch, skipped = divmod(first, steps_per_epoch(n_rows, args))
    for epoch in range(first_epoch, args.epochs):
        order = permutation(n_rows, seed, epoch)
        if epoch == 0:
            order.remove(longest)
            order.insert(0, longest)
        for start in range(skipped * args.global_batch_size, n_rows, args.global_batch_size):
            yield order[start : start + args.global_batch_size]
        skipped = 0


def micro_batches(data: PreparedSet, rows: Sequence[int], args: TrainArgs) -> Iterator[Batch]:
    """The rows, `micro_batch_size` at a time; packed, of no more tokens than the longest so many have."""
    if args.packing:
        groups = pack([int(n) for n in data.lengths(rows)], data.n_longest(args.micro_batch_size))
    else:
        groups = [list(range(i, i + args.micro_batch_size)) for i in range(0, len(rows), args.micro_batch_size)]
    for group in groups:
        yield data.batch([rows[place] for place in group if place < len(rows)], packing=args.packing)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places of rows in groups of at most `capacity` tokens, in few groups: best fit, the longest rows first.

    (Johnson et al. 1974, doi:10.1137/0203025: at most 11/9 of the fewest possible, and a constant.) Then the rows are
    dealt to so many groups anew, each to the emptiest, if that makes the largest smaller, whose memory a step takes.
    A row that is longer than the capacity has a group of its own.
    """
    longest_first = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    full: list[list[int]] = []
    filled: list[int] = []  # tokens of each group
    for place in longest_first:
        fitting = [index for index, tokens in enumerate(filled) if tokens + lengths[place] <= capacity]
        if not fitting:
            fitting = [len(full)]
            full.append([])
            filled.append(0)
        best = max(fitting, key=filled.__getitem__)
        full[best].append(place)
        filled[best] += lengths[place]
    even: list[list[int]] = [[] for _ in full]
    evenly = [0] * len(full)
    for place in longest_first:
        emptiest = min(range(len(even)), key=evenly.__getitem__)
        even[emptiest].append(place)
        evenly[emptiest] += lengths[place]
    fits = all(tokens <= capacity or len(group) == 1 for tokens, group in zip(evenly, even, strict=True))
    better = fits and max(evenly, default=0) < max(filled, default=0)
    return [sorted(group) for group in (even if better else full)]


@dataclass(frozen=True)
class StepResult:
    """Sums over one step's labelled tokens; tensors, so that nobody waits for them before they are asked for."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    n_labels: torch.Tensor


def train_step(
    fabric: "Fabric",
    model: "Module",
    optimizer: "Optimizer",
    batches: Sequence[Batch],
    max_norm: float,
    *,
    guarded: bool = False,
) -> StepResult:
    """One optimizer step on micro-batches of summed losses, whose mean over labelled tokens is taken once.

    So the gradient does not depend on how rows are spread over micro-batches and devices. A `guarded` step waits for
    the loss, and changes nothing if that or the gradient is no finite number.
    """
    n_labels = over_devices(fabric, torch.tensor(float(sum(batch.n_labels for batch in batches)), device=fabric.device))
    total = torch.zeros((), device=fabric.device)
    for index, batch in enumerate(batches):
        with fabric.no_backward_sync(model, enabled=index < len(batches) - 1):  # type: ignore[arg-type]
            loss = summed_loss(fabric, model, batch)
            # The devices' gradients will be averaged, so each loss counts world_size times.
            fabric.backward(loss * (fabric.world_size / n_labels.clamp(min=1)))
        total += loss.detach()
    norm = fabric.clip_gradients(model, optimizer, max_norm=max_norm or math.inf, error_if_nonfinite=False)
    assert norm is not None
    result = StepResult(over_devices(fabric, total), norm, n_labels)
    if not guarded or is_scaled(fabric) or math.isfinite(float(result.loss + norm)):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return result


def is_scaled(fabric: "Fabric") -> bool:
    """Whether losses are scaled up, as 16-mixed has to: gradients then overflow at times, and no step is taken."""
    return getattr(fabric.strategy.precision, "scaler", None) is not None


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


@torch.no_grad()
def rows_without_loss(fabric: "Fabric", model: "Module", data: PreparedSet, rows: Sequence[int]) -> list[int]:
    """Those of the rows whose loss, each by itself, is no finite number; all of them if each has one."""
    model.eval()
    losses = [float(summed_loss(fabric, model, data.batch([row], packing=False))) for row in rows]
    model.train()
    return [row for row, loss in zip(rows, losses, strict=True) if not math.isfinite(loss)] or list(rows)


class Diverged(ValueError):
    """The loss of a step, or its gradient, is no finite number; `rows` of the training data, from 0, are to blame."""

    def __init__(self, step: int, loss: float, grad_norm: float, rows: Sequence[int]):
        self.step, self.rows = step, rows
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {grad_norm}"
        shown = ", ".join(str(row + 1) for row in rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        super().__init__(f"step {step}: the {what}; it comes from training row{'s' * (len(rows) > 1)} {shown}")


@dataclass
class Run:
    """How far a run is, and its figures: all of the loop that a later process needs in order to go on."""

    step: int = 0
    iteration: int = 0  # micro-batches of one device
    tokens: int = 0
    learning_rate: float = 0.0  # of the last step
    loss: float = float("nan")
    val_loss: float = float("nan")
    best_val_loss: float = float("inf")
    n_validations: int = 0
    seconds: float = 0.0  # spent training, without validation and saving
    logged_tokens: int = 0  # these two as they were at the last row of metrics.csv
    logged_seconds: float = 0.0
    unlogged: dict[int, tuple[float, float, float]] = field(default_factory=dict)  # step -> loss, gradient norm, labels

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
    run: Run | None = None,
    save: Callable[[Run], None] = lambda run: None,
    validated: Callable[[Run], str] = lambda run: "",
    stopping: Callable[[], bool] = lambda: False,
) -> Run:
    """Train for `train.epochs` or `train.max_steps`, from where `run` is; returns the run's figures.

    `save` is called every `save_interval` steps, after the last one, and when `stopping` tells to end early: before the
    step is logged and validated, which a run that goes on from there does first. `validated` hears of each validation
    and gives a text to print with it. Raises Diverged unless `train.on_nan` is `skip`.
    """
    run = run or Run()
    n_rows, n_steps = len(train_data), total_steps(len(train_data), train)
    longest = int(train_data.lengths().argmax())  # of several the first, whatever the machine
    taken: list[StepResult] = []  # since anyone looked
    # Where the loss is read at every step anyway, a step that must not be taken is seen in time at no cost.
    guarded = train.on_nan == "skip" or train.log_interval == 1 or fabric.device.type == "cpu"
    model.train()
    with Progress("training", n_steps, begun=run.step, enabled=fabric.is_global_zero) as progress:

        def settle() -> None:
            """Wait for the steps taken, and look whether their losses are numbers."""
            figures = [torch.stack((result.loss, result.grad_norm, result.n_labels)) for result in taken]
            read = torch.stack(figures).tolist() if figures else []
            for step, (loss, norm, n_labels) in enumerate(read, start=run.step - len(taken) + 1):
                if math.isfinite(loss) and (math.isfinite(norm) or is_scaled(fabric)):
                    run.unlogged[step] = (loss, norm, n_labels)
                    continue
                rows = next(step_rows(n_rows, train, seed, longest, step - 1))
                problem = Diverged(step, loss, norm, rows_without_loss(fabric, model, train_data, rows))
                if train.on_nan == "stop":
                    raise problem
                progress.note(f"{problem}; skipped")
            taken.clear()

        def validate() -> None:
            run.val_loss = evaluate(fabric, model, val_data, train, eval.max_iters)
            progress.note(f"step {run.step}: validation loss {run.val_loss:.4f}")
            if text := validated(run):
                progress.note(text)
            run.n_validations += 1

        def validates() -> bool:
            return bool(eval.interval) and run.step % eval.interval == 0 and run.step < n_steps

        def logs() -> bool:
            return run.step % train.log_interval == 0 or run.step == n_steps or validates()

        def log() -> None:
            """Write the row of metrics.csv for the steps since the last; validate where that is due."""
            row: dict[str, float] = {
                "step": run.step,
                "iteration": run.iteration,
                "epoch": (run.step - 1) // steps_per_epoch(n_rows, train),
                "tokens": run.tokens,
                "learning_rate": run.learning_rate,
                "tokens_per_s": round((run.tokens - run.logged_tokens) / (run.seconds - run.logged_seconds), 1),
            }
            if run.unlogged:  # not all were skipped
                losses, norms, n_labels = zip(*run.unlogged.values(), strict=True)
                run.loss = sum(losses) / max(sum(n_labels), 1)
                row |= {"loss": run.loss, "grad_norm": norms[-1]}
            run.unlogged.clear()
            run.logged_tokens, run.logged_seconds = run.tokens, run.seconds
            progress.update(run.step, f"step {run.step}/{n_steps} loss {run.loss:.4f} {run.tokens_per_s:.0f} tokens/s")
            if validates():
                validate()
                row["val_loss"] = run.val_loss
            metrics.write(**row)

        if run.step and logs():
            log()
        if run.step == 0 and eval.initial_validation:
            validate()
            metrics.write(step=0, iteration=0, epoch=0, tokens=0, val_loss=run.val_loss)
        for rows in step_rows(n_rows, train, seed, longest, run.step):
            if run.step >= n_steps:
                break
            started = time.perf_counter()
            batches = list(micro_batches(train_data, rows[fabric.global_rank :: fabric.world_size], train))
            if not batches:  # fewer rows than devices in the last step of an epoch: take part, and ask nothing
                batches = [train_data.batch(rows[:1], packing=train.packing).unlabelled()]
            run.learning_rate = learning_rate(run.step, n_steps, train)
            for group in optimizer.param_groups:
                group["lr"] = run.learning_rate
            taken.append(train_step(fabric, model, optimizer, batches, train.max_norm, guarded=guarded))
            run.step += 1
            run.iteration += len(batches)
            run.tokens += train_data.n_tokens(rows)
            ends = run.step < n_steps and stopping()
            saves = ends or (train.save_interval and (run.step % train.save_interval == 0 or run.step == n_steps))
            if saves or logs():
                settle()
            run.seconds += time.perf_counter() - started
            if saves:
                save(run)
            if ends:
                break
            if logs():
                log()
    return run
