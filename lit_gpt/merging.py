"""Fold an adapter into a checkpoint on disk, a tensor at a time, and look whether the result is what was trained."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lit_gpt import checkpoint, files, lora
from lit_gpt.adapter import Adapter
from lit_gpt.checkpoint import Weights
from lit_gpt.data import open_prepared
from lit_gpt.model import GPT
from lit_gpt.prompts import get_style
from lit_gpt.quantization import QuantizedLinear
from lit_gpt.tokenizer import Tokenizer

PROMPTS = (
    "What food do llamas eat?",
    "Recommend a movie to watch on the weekend.",
    "Arrange the given numbers in ascending order: 2, 4, 0, 8, 3.",
    "Write a short letter to a friend who has moved to another town, and ask when a visit would suit.",
)


def merge_folder(
    checkpoint_dir: Path,
    adapter: Adapter,
    out_dir: Path,
    dtype: torch.dtype | None = None,
    dequantized: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write base + adapter as a complete checkpoint folder, in `dtype` or the base's own; one tensor in memory.

    `dequantized` merges into the weights that an adapter of a quantized base saw, instead of the original ones.
    """
    weights = Weights.from_folder(checkpoint_dir)
    lora.check_fit(checkpoint.hollow(weights.config), adapter.settings, adapter.state, "the adapter")
    config, metas, scaling = weights.config, dict(weights.metas), adapter.settings.alpha / adapter.settings.r
    adapted = {name.removesuffix(".lora_A") for name in adapter.state if name.endswith(".lora_A")}
    if config.tie_embeddings and "lm_head" in adapted:  # the head gets a weight of its own
        config.tie_embeddings = False
        metas["lm_head.weight"] = metas["transformer.wte.weight"]
    metas = {name: meta.to(dtype or meta.dtype) for name, meta in metas.items()}

    def merge(owner: str, weight: torch.Tensor) -> torch.Tensor:
        a, b = (adapter.state[f"{owner}.{factor}"] for factor in ("lora_A", "lora_B"))
        weight = weight.to(torch.promote_types(weight.dtype, metas[f"{owner}.weight"].dtype))  # rounded once, to that
        return lora.merged_weight(weight, a, b, scaling)

    def merged() -> Iterator[tuple[str, torch.Tensor]]:
        for done, (name, part) in enumerate(weights.layers(adapter.quantize if dequantized else None), start=1):
            owner = name.removesuffix(".weight")
            tensor = part.dense(torch.float32) if isinstance(part, QuantizedLinear) else part
            yield name, merge(owner, tensor) if owner in adapted else tensor
            if name == "transformer.wte.weight" and "lm_head.weight" in metas and "lm_head.weight" not in weights.metas:
                yield "lm_head.weight", merge("lm_head", tensor)
            progress(done, len(weights.metas))

    files.save_streamed(out_dir / files.LIT_MODEL, metas, merged())
    checkpoint.complete_folder(out_dir, config, checkpoint_dir, adapter.prompt_style)


@dataclass(frozen=True)
class Comparison:
    """Logits of the merged file against the base it was merged into + adapter, over all positions of a few prompts."""

    max_difference: float
    top1_agreement: float
    effect: float  # mean |base + adapter - base|: what the adapter does
    drift: float  # mean |merged - (base + adapter)|: what merging lost

    @property
    def problem(self) -> str | None:
        """Why the merged file should not be trusted, if there is a reason."""
        if not math.isfinite(self.effect + self.drift):
            return "its logits are no numbers: the base or the adapter holds NaN or infinity"
        if self.effect == 0:
            return "the adapter changes nothing: it was not trained, or its update is zero"
        if self.drift >= self.effect / 2:
            return (
                f"rounding lost the update: the merged model is {self.drift / self.effect:.0%} of the adapter's effect "
                "away from base + adapter; merge with --precision 32-true, or run the adapter unmerged"
            )
        return None


def _opened(
    checkpoint_dir: Path, dtype: torch.dtype, quantize: str | None, ran: Callable[[], None] = lambda: None
) -> GPT:
    """The base, as it is or in few bits."""
    if quantize is None:
        return checkpoint.load_by_block(checkpoint_dir, dtype, ran)
    return checkpoint.load_model(checkpoint_dir, dtype, quantize=quantize)


@torch.no_grad()
def compare(
    checkpoint_dir: Path,
    lora_path: Path,
    merged_dir: Path,
    dtype: torch.dtype,
    dequantized: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Run base, base + adapter and the merged file on a few prompts in `dtype`.

    The base is what `merge_folder` merged into, so that only what merging did is seen: with `dequantized` as the
    adapter was trained, else as it is on disk. In memory is one block of them at a time, or the quantized base.
    """
    adapter = Adapter.load(lora_path)
    tokenizer, style = Tokenizer(checkpoint_dir), get_style(adapter.prompt_style)
    prompts = [torch.tensor([tokenizer.encode(style(prompt, ""))]) for prompt in PROMPTS]

    def logits(model: GPT) -> torch.Tensor:
        rows = [prompt[:, : model.config.block_size] for prompt in prompts]
        lengths = [row.shape[1] for row in rows]
        return model.eval()(torch.cat(rows, dim=1), lengths=lengths)[0].float()

    quantize = adapter.quantize if dequantized else None
    done, passes = itertools.count(1), 3 if quantize is None else 1
    n_blocks = passes * checkpoint.load_config(checkpoint_dir).n_layer

    def ran() -> None:
        progress(next(done), n_blocks)

    model = _opened(checkpoint_dir, dtype, quantize, ran)
    base = logits(model)
    adapter.attach(model, checkpoint_dir, lora_path)
    unmerged = logits(model)
    del model
    merged = logits(checkpoint.load_by_block(merged_dir, dtype, ran))
    difference = (merged - unmerged).abs()
    agreement = (merged.argmax(-1) == unmerged.argmax(-1)).float().mean()
    return Comparison(
        float(difference.max()), float(agreement), float((unmerged - base).abs().mean()), float(difference.mean())
    )


@torch.no_grad()
def held_out_losses(
    checkpoint_dir: Path, lora_path: Path, merged_dirs: dict[str, Path], data_dir: Path, max_rows: int = 64
) -> dict[str, float]:
    """Mean loss per labelled token on validation rows: of base + adapter as trained, and of each merged folder."""
    adapter = Adapter.load(lora_path)
    tokenizer = Tokenizer(checkpoint_dir)
    config = checkpoint.load_config(checkpoint_dir)
    _, rows, _ = open_prepared(data_dir, tokenizer, config.block_size, config.vocab_size)

    def loss(model: GPT) -> float:
        batch = rows.batch(list(range(min(max_rows, len(rows)))), packing=True)
        return float(model.eval()(batch.tokens, labels=batch.labels, lengths=batch.lengths)) / batch.n_labels

    model = _opened(checkpoint_dir, torch.float32, adapter.quantize)
    adapter.attach(model, checkpoint_dir, lora_path)
    losses = {"base + adapter, unmerged": loss(model)}
    del model
    for name, folder in merged_dirs.items():
        losses[name] = loss(checkpoint.load_by_block(folder, torch.float32))
    return losses
