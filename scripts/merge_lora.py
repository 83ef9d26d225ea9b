"""Fold a LoRA adapter into its base, and check the result."""

import sys
import tempfile
from pathlib import Path
from typing import Literal

from lit_gpt.cli import run


def main(
    lora_path: Path = Path("out/lora/alpaca/lit_model_lora_finetuned.pth"),
    checkpoint_dir: Path = Path("checkpoints/stabilityai/stablelm-base-alpha-3b"),
    out_dir: Path = Path("out/lora/checkpoint"),
    precision: str | None = None,
    base: Literal["original", "dequantized"] | None = None,
    data_dir: Path | None = None,
) -> int:
    """Fold a LoRA adapter into its base, and check the result.

    The merged folder is complete: generate/base.py and every other script read it. The merged file is then compared
    with base + adapter on a few prompts, the base being the one that was merged into; a merge that changes nothing or
    loses the update ends with exit status 1.

    Args:
        lora_path: The adapter.
        checkpoint_dir: The base that it was trained on.
        out_dir: The folder to write.
        precision: Precision of the merged weights, such as 32-true; the base's own by default.
        base: For an adapter of a quantized base: merge into the original weights, or into what training saw of them
            (dequantized, the default there).
        data_dir: Prepared data; the losses of both ways of merging, and without, are compared on its validation rows.
    """
    import torch

    from lit_gpt import checkpoint, merging, runtime
    from lit_gpt.adapter import Adapter
    from lit_gpt.report import Progress, table

    if out_dir.resolve() == checkpoint_dir.resolve():
        raise ValueError("--out_dir is the base's own folder, which must stay as it is; name another")
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"--out_dir {out_dir} is a file; name a folder")
    adapter = Adapter.load(lora_path)
    adapter.check_base(checkpoint_dir, lora_path)
    base = base or ("dequantized" if adapter.quantize else "original")
    if base == "dequantized" and adapter.quantize is None:
        raise ValueError(f"{lora_path} was trained on an unquantized base: leave --base original")
    dtype = runtime.resolve_precision(precision, training=False).frozen if precision else None
    with Progress("merging", 1) as progress:
        share = lambda done, total: progress.update(done / total)  # noqa: E731
        merging.merge_folder(checkpoint_dir, adapter, out_dir, dtype, base == "dequantized", share)
    print(f"wrote {out_dir / checkpoint.files.LIT_MODEL}", file=sys.stderr)
    with Progress("comparing it with base + adapter", 1) as progress:
        result = merging.compare(checkpoint_dir, lora_path, out_dir, torch.float32, base == "dequantized", share)
    rows = [
        ("check on a few prompts", "value"),
        ("greatest logit difference, merged and unmerged", f"{result.max_difference:.4f}"),
        ("same likeliest token", f"{result.top1_agreement:.2%}"),
        ("mean effect of the adapter on a logit", f"{result.effect:.4f}"),
        ("mean change by rounding on merging", f"{result.drift:.4f}"),
    ]
    print(table(rows))
    if data_dir is not None:
        with tempfile.TemporaryDirectory(dir=out_dir.parent) as other:
            folders = {f"merged into the {base} weights": out_dir}
            if adapter.quantize:
                name = "original" if base == "dequantized" else "dequantized"
                merging.merge_folder(checkpoint_dir, adapter, Path(other), dtype, name == "dequantized")
                folders[f"merged into the {name} weights"] = Path(other)
            losses = merging.held_out_losses(checkpoint_dir, lora_path, folders, data_dir)
        print(table([("loss on held-out rows", "value"), *((name, f"{loss:.4f}") for name, loss in losses.items())]))
    if result.problem:
        print(f"error: {result.problem}", file=sys.stderr)
    return 1 if result.problem else 0


if __name__ == "__main__":
    run(main)
