"""Keep a checkpoint's quantized weights: beside it for an instant start, or fitted to rows in a folder of its own."""

from pathlib import Path

from lit_gpt.cli import run


def main(
    checkpoint_dir: Path,
    quantize: str = "bnb.nf4",
    data_dir: list[Path] | Path | None = None,
    out_dir: Path | None = None,
    calibration_tokens: int = 32768,
    skip_modules: list[str] | str | None = None,
    seed: int = 1337,
) -> None:
    """Keep a checkpoint's quantized weights beside it, for an instant start of every script with that --quantize.

    The file may be deleted at any time; it is not used once the weights that it was made from have changed.

    With --data_dir, write a checkpoint of its own to --out_dir, whose 4-bit weights are chosen such that the layers
    compute on these rows what the full ones do (GPTQ): nearer to the full model, at the same size and speed, unless
    --skip_modules leaves some in full. Name it as --checkpoint_dir from then on, without --quantize.

    Args:
        checkpoint_dir: The model.
        quantize: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8, with +head for the output head too.
        data_dir: Prepared rows like those that the model will see; its training rows are taken. Of several sets, as in
            "[data/mine,data/alpaca]", each gives its share of the tokens; general text keeps what the model can do.
        out_dir: The folder to write.
        calibration_tokens: Tokens of DATA_DIR to look at; more take longer, more memory, and fit better.
        skip_modules: Layers to leave in full, by parts of their names, which take back what those before them lost: as
            in "[mlp.proj,h.0]", the MLPs' way out, which suffers most from 4 bits, and all of the first block.
        seed: Of the choice among the rows of DATA_DIR.
    """
    from lit_gpt import checkpoint, quantization
    from lit_gpt.report import Progress

    kind = quantization.resolve(quantize)
    assert kind is not None
    if bool(data_dir) != bool(out_dir):
        raise ValueError("--data_dir and --out_dir go together: rows to fit the weights to, and the folder to write")
    if skip_modules and not data_dir:
        raise ValueError("--skip_modules is for weights fitted to rows: name them with --data_dir and --out_dir")
    if not data_dir or out_dir is None:
        with Progress("quantizing", 1) as progress:
            path = checkpoint.save_quantized(checkpoint_dir, kind, lambda done, total: progress.update(done / total))
        print(f"wrote {path} ({path.stat().st_size / 1e9:.2f} GB)")
        return

    from lit_gpt import calibration

    folders = data_dir if isinstance(data_dir, list) else [data_dir]
    skip = [skip_modules] if isinstance(skip_modules, str) else skip_modules or []
    rows = calibration.open_rows(checkpoint_dir, folders, calibration_tokens, seed)
    with Progress(f"fitting weights to {sum(map(len, rows)):,} tokens", 1) as progress:
        errors = calibration.write(
            checkpoint_dir, kind, rows, out_dir, skip=skip, progress=lambda done, n: progress.update(done / n)
        )
    print(f"wrote {out_dir}; its errors are {errors}")


if __name__ == "__main__":
    run(main)
