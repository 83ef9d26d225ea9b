"""A complete Hugging Face folder of one of ours: what `AutoModelForCausalLM.from_pretrained` loads."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lit_gpt import checkpoint, files, sources
from lit_gpt.checkpoint import Weights
from lit_gpt.config import Config
from lit_gpt.families import FAMILIES
from lit_gpt.tokenizer import Tokenizer

INDEX = "model.safetensors.index.json"


def export(
    folder: Path,
    out_dir: Path,
    max_shard_gb: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the converted, merged or fine-tuned model of `folder` as HF files; returns the number of weight files.

    Names and layouts go back through the rows that brought them in. No more than one shard is in memory. Raises
    ValueError for an `out_dir` that holds weights already: readers might take those.
    """
    from safetensors.torch import save_file

    source = checkpoint.open_folder(folder)
    if not source.is_lit:
        raise ValueError(f"{folder} holds no {files.LIT_MODEL}: it is an HF folder already")
    sources.refuse_if_weights(out_dir, "--output_path")
    weights = Weights(source, checkpoint.load_config(folder))
    dtype = str(next(iter(weights.metas.values())).dtype).removeprefix("torch.")
    hf_config = hf_config_of(weights.config, folder) | {"torch_dtype": dtype}  # fails now, not after minutes
    total, done = sum(meta.nbytes for meta in weights.metas.values()), 0

    def read(name: str) -> torch.Tensor:  # 4-bit weights come in float32
        return source.read(name).to(weights.metas[name].dtype)

    written: list[Path] = []
    names: dict[str, int] = {}

    def shards() -> Iterator[dict[str, torch.Tensor]]:
        shard: dict[str, torch.Tensor] = {}
        size = 0
        for step in FAMILIES[weights.config.family].steps(weights.config, weights.metas):
            tensor = step.via.join(weights.config, tuple(read(name) for name in step.ours)).contiguous()
            if shard and size + tensor.nbytes > max_shard_gb * 1e9:
                yield shard
                shard, size = {}, 0
            shard[step.theirs] = tensor
            size += tensor.nbytes
        yield shard

    out_dir.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards(), start=1):
        path = out_dir / f"model-{number:05d}.safetensors"
        with files.atomically(path) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
            temporary.chmod(0o644)  # the library keeps it to its owner
        written.append(path)
        names |= dict.fromkeys(shard, number)
        done += sum(tensor.nbytes for tensor in shard.values())
        progress(done, total)
    if len(written) == 1:
        written[0].rename(out_dir / "model.safetensors")
    else:
        final = {n: f"model-{n:05d}-of-{len(written):05d}.safetensors" for n in range(1, len(written) + 1)}
        for number, path in enumerate(written, start=1):
            path.rename(out_dir / final[number])
        index = {"metadata": {"total_size": done}, "weight_map": {name: final[n] for name, n in names.items()}}
        files.save_text(out_dir / INDEX, json.dumps(index, indent=2) + "\n")
    files.copy_companions(folder, out_dir)
    files.save_text(out_dir / files.HF_CONFIG, json.dumps(hf_config, indent=2) + "\n")
    return len(written)


def hf_config_of(config: Config, folder: Path) -> dict[str, Any]:
    """`config.json` for the config, with what the folder's own one and its tokenizer say beyond the architecture."""
    written = FAMILIES[config.family].write(config)
    original = files.read_json(folder / files.HF_CONFIG) if (folder / files.HF_CONFIG).is_file() else {}
    if original.get("model_type") not in (None, written["model_type"]):
        original = {}
    for stale in ("quantization_config", "rope_parameters", "dtype", "torch_dtype"):
        original.pop(stale, None)
    told = {**original, **written}
    tokenizer = Tokenizer(folder)
    for key, value in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id)):
        told.setdefault(f"{key}_token_id", value)
    return told
