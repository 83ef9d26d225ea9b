"""Convert a random Llama-2-7B (13.5 GB, sharded) and copy the same files with `cp`: time and peak memory of both.

Usage: python benchmarks/convert_7b.py [FOLDER]   (needs 41 GB of disk; FOLDER is made, and kept for the next run)
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from lit_gpt import checkpoint
from lit_gpt.config import Config
from lit_gpt.families import FAMILIES


def make(folder: Path) -> None:
    """Random weights in bfloat16, seven shards: one block of noise, repeated, since only its bytes matter."""
    folder.mkdir(parents=True)
    config = Config.from_name("Llama-2-7b-hf")
    metas = checkpoint.parameter_metas(checkpoint.hollow(config))
    noise = (torch.randn(1 << 24) * 0.02).to(torch.bfloat16)
    shard: dict[str, torch.Tensor] = {}
    weight_map, number = {}, 1
    steps = FAMILIES["llama"].steps(config, metas)
    for step in steps:
        shape = metas[step.ours[0]].shape
        shard[step.theirs] = noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].view(shape).clone()
        weight_map[step.theirs] = f"model-{number:05d}-of-00007.safetensors"
        if sum(t.nbytes for t in shard.values()) > 2e9 or step is steps[-1]:
            save_file(shard, folder / weight_map[step.theirs], metadata={"format": "pt"})
            shard, number = {}, number + 1
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(FAMILIES["llama"].write(config)))


def timed(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak resident GB of a command that ends with its bytes on the disk."""
    started = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    subprocess.run(["sync"], check=True)
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "checkpoints/benchmark/random-7b")
    if sys.argv[2:] == ["make"]:
        make(folder)
        return
    if not folder.exists():  # in a process of its own: a child's peak begins at its parent's
        subprocess.run([sys.executable, __file__, str(folder), "make"], check=True)
    script = Path(__file__).parents[1] / "scripts" / "convert_hf_checkpoint.py"
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
    copy = folder.parent / "copy"
    for name, command in (
        ("cp", ["cp", "-r", str(folder), str(copy)]),
        ("convert", [sys.executable, str(script), "--checkpoint_dir", str(folder)]),
        ("cp", ["cp", "-r", str(folder), str(copy)]),
        ("convert", [sys.executable, str(script), "--checkpoint_dir", str(folder)]),
    ):
        for old in (folder / "lit_model.pth", *copy.glob("*")):
            old.unlink(missing_ok=True)
        if copy.exists():
            copy.rmdir()
        wall, cpu, peak = timed(command)
        speed = f"{size / wall:.2f} GB/s, peak {peak:.2f} GB"
        print(f"{name:8} {size:.1f} GB in {wall:.1f} s wall, {cpu:.1f} s CPU: {speed}", flush=True)


if __name__ == "__main__":
    main()
