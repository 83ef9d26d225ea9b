"""Predict the memory that a run takes, by part, from shapes alone."""

from pathlib import Path
from typing import Literal

from lit_gpt.cli import run


def main(
    checkpoint_dir: Path | None = None,
    model_name: str | None = None,
    precision: str | None = None,
    quantize: str | None = None,
    micro_batch_size: int = 4,
    max_seq_length: int = 1024,
    full: bool = False,
    lora_r: int = 8,
    lora_query: bool = True,
    lora_key: bool = False,
    lora_value: bool = True,
    lora_projection: bool = False,
    lora_mlp: bool = False,
    lora_head: bool = False,
    activation_checkpointing: bool = False,
    optimizer: str = "adamw",
    device: Literal["cuda", "cpu"] = "cuda",
    memory_limit: str | None = None,
) -> None:
    """Predict the memory that a run takes, by part, from shapes alone: no weights, no GPU, a few seconds.

    Args:
        checkpoint_dir: The model's folder; its config is enough.
        model_name: Instead of a folder: a known name, such as Llama-2-7b-hf (scripts/download.py lists them).
        precision: As finetune/lora.py's; bf16-mixed by default.
        quantize: As finetune/lora.py's; by default what the folder's weights are kept in.
        micro_batch_size: Rows that are worked on at a time.
        max_seq_length: Tokens of the longest row, and of the prompt for inference.
        full: Train every weight instead of LoRA's factors.
        lora_r: Rank of the update.
        lora_query: Adapt the queries.
        lora_key: Adapt the keys.
        lora_value: Adapt the values.
        lora_projection: Adapt the attention's output.
        lora_mlp: Adapt the MLP's layers.
        lora_head: Adapt the output head.
        activation_checkpointing: As finetune/lora.py's.
        optimizer: As finetune/lora.py's.
        device: Plan for a GPU or for the CPU, where the program itself counts too.
        memory_limit: Such as 24GB: say whether training fits, and if not, with which flags it does.
    """
    settings = dict(locals())

    from lit_gpt import checkpoint, lora, memory, quantization, runtime
    from lit_gpt.config import Config
    from lit_gpt.report import table

    if (checkpoint_dir is None) == (model_name is None):
        raise ValueError("give either --checkpoint_dir or --model_name")
    config = checkpoint.load_config(checkpoint_dir) if checkpoint_dir else Config.from_name(str(model_name))
    targets = {name: settings[f"lora_{name}"] for name in lora.TARGETS}
    adapter = None if full else lora.LoRASettings.from_flags(lora_r, lora_r * 2, 0.05, **targets)
    kind = runtime.resolve_precision(precision or "bf16-mixed", training=True)
    rows = (min(max_seq_length, config.block_size),) * micro_batch_size
    bits, n_skipped = quantization.resolve(quantize), 0
    if checkpoint_dir and adapter and not bits:
        bits, n_skipped = checkpoint.kept_kind(checkpoint_dir)
    limit = memory.parse_size(memory_limit) if memory_limit else None
    setting = memory.Setting(kind, bits, adapter, rows, activation_checkpointing, optimizer, device, n_skipped)
    plan = memory.plan_training(config, setting)
    print(table(plan.rows(), f"training {config.name}"), end="\n\n")
    print(table(memory.plan_inference(config, setting).rows(), "inference, a prompt of as many tokens and 100 more"))
    if limit is not None:
        fits = plan.total <= limit
        told = "training fits" if fits else f"training does not fit: {memory.advice(config, setting, limit)}"
        print(f"\n{memory_limit}: {told}")


if __name__ == "__main__":
    run(main)
