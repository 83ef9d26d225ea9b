"""The grouped flags of the finetune scripts. Free of torch, so that a mistyped flag answers at once."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainArgs:
    """How to train.

    Args:
        learning_rate: Peak of the schedule.
        min_lr: Where the cosine ends.
        lr_warmup_steps: Optimizer steps of linear warm-up; by default 100, or a tenth of the run if that is fewer.
        weight_decay: The optimizer's.
        global_batch_size: Rows per optimizer step, over all devices.
        micro_batch_size: Rows that one device works on at a time; changes memory, not what is learned.
        epochs: Passes over the training rows.
        max_steps: Stop after so many optimizer steps, whatever `epochs` says.
        max_seq_length: Cut rows to this many tokens; the end-of-text token is kept.
        max_norm: Clip the gradient's norm to this; 0 does not clip.
        packing: Lay rows end to end instead of padding them, no more tokens at a time than the `micro_batch_size`
            longest have; changes speed, not the result.
        save_interval: Optimizer steps between periodic checkpoints; 0 keeps only the final one.
        keep_last: Of the periodic checkpoints keep so many; 0 keeps all.
        keep_best: Keep the weights with the lowest validation loss too, as best-ckpt.pth.
        log_interval: Optimizer steps between two rows of metrics.csv.
        on_nan: What a loss that is no finite number does: stop the run, or skip the step.
    """

    learning_rate: float = 3e-4
    min_lr: float = 0.0
    lr_warmup_steps: int | None = None
    weight_decay: float = 0.01
    global_batch_size: int = 128
    micro_batch_size: int = 4
    epochs: int = 4
    max_steps: int | None = None
    max_seq_length: int | None = None
    max_norm: float = 1.0
    packing: bool = True
    save_interval: int = 100
    keep_last: int = 2
    keep_best: bool = False
    log_interval: int = 1
    on_nan: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "epochs", "log_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"--train.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "min_lr", "weight_decay", "max_norm", "save_interval", "keep_last"):
            if not getattr(self, name) >= 0:  # catches NaN too
                raise ValueError(f"--train.{name} must not be negative, and is {getattr(self, name)}")
        for name, least in (("max_steps", 1), ("max_seq_length", 2), ("lr_warmup_steps", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"--train.{name} must be at least {least}, not {getattr(self, name)}")


@dataclass(frozen=True)
class EvalArgs:
    """When and how to validate.

    Args:
        interval: Optimizer steps between validations; 0 never validates within the run.
        max_iters: At most so many micro-batches of the validation rows: smaller ones look at fewer rows.
        max_new_tokens: Length of the sample answer that is printed with each validation; 0 prints none.
        initial_validation: Validate before the first step.
        final_validation: Validate after the last step.
    """

    interval: int = 100
    max_iters: int = 100
    max_new_tokens: int = 100
    initial_validation: bool = False
    final_validation: bool = True

    def __post_init__(self) -> None:
        for name, least in (("interval", 0), ("max_iters", 1), ("max_new_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--eval.{name} must be at least {least}, not {getattr(self, name)}")
