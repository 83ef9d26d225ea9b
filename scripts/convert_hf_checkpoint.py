"""Make lit_model.pth and lit_config.json of a folder of HF files."""

from pathlib import Path
from typing import Literal

from lit_gpt.cli import run


def main(
    checkpoint_dir: Path = Path("checkpoints/stabilityai/stablelm-base-alpha-3b"),
    model_name: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
) -> None:
    """Make lit_model.pth and lit_config.json of a folder of HF files, one tensor in memory at a time.

    Weights in bitsandbytes' 4 bits are written in full; the other scripts read such a folder unconverted, and smaller.

    Args:
        checkpoint_dir: Folder with config.json and *.safetensors or *.bin, sharded or not.
        model_name: Name to note in lit_config.json; the folder's by default. The architecture is read from config.json.
        dtype: Precision of the weights; by default the files' own, or the one that 4-bit weights came from.
    """
    import torch

    from lit_gpt import checkpoint, files
    from lit_gpt.interop.bnb import FourBitSource
    from lit_gpt.report import Progress

    config = checkpoint.load_config(checkpoint_dir, original=True)
    source = checkpoint.open_folder(checkpoint_dir, original=True)
    config.name = model_name or checkpoint_dir.resolve().name
    with Progress(f"converting {config.name}", 1) as progress:
        share = lambda done, total: progress.update(done / total)  # noqa: E731
        checkpoint.convert(source, config, checkpoint_dir, getattr(torch, dtype) if dtype else None, share)
    path = checkpoint_dir / files.LIT_MODEL
    print(f"wrote {path}")
    if isinstance(source, FourBitSource):
        print(
            f"4-bit weights are in full now ({path.stat().st_size / 1e9:.2f} GB); delete the file to use them as before"
        )


if __name__ == "__main__":
    run(main)
