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

    Args:
        checkpoint_dir: Folder with config.json and *.safetensors or *.bin, sharded or not.
        model_name: Name to note in lit_config.json; the folder's by default. The architecture is read from config.json.
        dtype: Precision of the weights; the files' own by default.
    """
    import torch

    from lit_gpt import checkpoint, files
    from lit_gpt.report import Progress

    source = files.FolderSource(checkpoint_dir, original=True)
    config = checkpoint.load_config(checkpoint_dir, original=True)
    config.name = model_name or checkpoint_dir.resolve().name
    with Progress(f"converting {config.name}", 1) as progress:
        share = lambda done, total: progress.update(done / total)  # noqa: E731
        checkpoint.convert(source, config, checkpoint_dir, getattr(torch, dtype) if dtype else None, share)
    print(f"wrote {checkpoint_dir / files.LIT_MODEL}")


if __name__ == "__main__":
    run(main)
