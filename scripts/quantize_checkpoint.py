"""Keep a checkpoint's quantized weights beside it, for an instant start."""

from pathlib import Path

from lit_gpt.cli import run


def main(checkpoint_dir: Path, quantize: str = "bnb.nf4") -> None:
    """Keep a checkpoint's quantized weights beside it, for an instant start of every script with that --quantize.

    The file may be deleted at any time; it is not used once the weights that it was made from have changed.

    Args:
        checkpoint_dir: The model.
        quantize: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8, with +head for the output head too.
    """
    from lit_gpt import checkpoint, quantization
    from lit_gpt.report import Progress

    kind = quantization.resolve(quantize)
    assert kind is not None
    with Progress("quantizing", 1) as progress:
        path = checkpoint.save_quantized(checkpoint_dir, kind, lambda done, total: progress.update(done / total))
    print(f"wrote {path} ({path.stat().st_size / 1e9:.2f} GB)")


if __name__ == "__main__":
    run(main)
