"""Write a model as a folder that transformers loads."""

from pathlib import Path

from lit_gpt.cli import run


def main(checkpoint_path: Path, output_path: Path, max_shard_gb: float = 2.0) -> None:
    """Write a base, merged or fully fine-tuned model as a folder that transformers loads.

    It holds safetensors (sharded, with an index), config.json, the tokenizer with its chat template, and
    generation_config.json. An adapter is merged first, with scripts/merge_lora.py.

    Args:
        checkpoint_path: The model's folder, or the lit_model.pth in it.
        output_path: The folder to write.
        max_shard_gb: Size of a file at most.
    """
    from lit_gpt import files
    from lit_gpt.interop import hf
    from lit_gpt.report import Progress

    folder = checkpoint_path if checkpoint_path.is_dir() else checkpoint_path.parent
    if checkpoint_path.is_file() and checkpoint_path.name != files.LIT_MODEL:
        raise ValueError(
            f"{checkpoint_path} is no {files.LIT_MODEL}; fold an adapter in with scripts/merge_lora.py first"
        )
    if output_path.resolve() == folder.resolve() or (output_path.exists() and not output_path.is_dir()):
        raise ValueError(f"--output_path {output_path} must be another folder")
    with Progress(f"writing {output_path}", 1) as progress:
        n_shards = hf.export(folder, output_path, max_shard_gb, lambda done, total: progress.update(done / total))
    print(f"wrote {output_path} ({n_shards} {'file' if n_shards == 1 else 'files'} of weights)")


if __name__ == "__main__":
    run(main)
