"""Merge a random adapter into a random Llama-2-7B and copy the base with `cp`: time and peak memory of both.

Usage: python benchmarks/merge_7b.py [FOLDER]   (FOLDER as for convert_7b.py; 27 GB of disk more)
"""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from convert_7b import timed

from lit_gpt import checkpoint, lora, merging
from lit_gpt.adapter import Adapter

SETTINGS = lora.LoRASettings()


def make_adapter(folder: Path, path: Path) -> None:
    """Factors that move the weights visibly."""
    state = {}
    for name, layer in lora.targeted(checkpoint.hollow(checkpoint.load_config(folder)), SETTINGS).items():
        state[f"{name}.lora_A"] = torch.randn(SETTINGS.r, layer.in_features) * 0.02
        state[f"{name}.lora_B"] = torch.randn(layer.out_features, SETTINGS.r) * 0.02
    told = (folder.name, checkpoint.fingerprint(folder), "plain", "bf16-true", None, 1)
    Adapter(state, SETTINGS, *told).save(path)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "checkpoints/benchmark/random-7b")
    adapter, merged, copy = (folder.parent / name for name in ("adapter.pth", "merged", "copy"))
    if sys.argv[2:] == ["only"]:
        merging.merge_folder(folder, Adapter.load(adapter), merged)
        return
    if not folder.exists():
        subprocess.run([sys.executable, Path(__file__).with_name("convert_7b.py"), str(folder), "make"], check=True)
    make_adapter(folder, adapter)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
    for name, command in (
        ("cp", ["cp", "-r", str(folder), str(copy)]),
        ("merge", [sys.executable, __file__, str(folder), "only"]),
        ("cp", ["cp", "-r", str(folder), str(copy)]),
        ("merge", [sys.executable, __file__, str(folder), "only"]),
    ):
        for old in (merged, copy):
            shutil.rmtree(old, ignore_errors=True)
        wall, cpu, peak = timed(command)
        speed = f"{size / wall:.2f} GB/s, peak {peak:.2f} GB"
        print(f"{name:8} {size:.1f} GB in {wall:.1f} s wall, {cpu:.1f} s CPU: {speed}", flush=True)


if __name__ == "__main__":
    main()
