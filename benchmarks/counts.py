"""What a LoRA step asks of a GPU, counted on tensors without numbers: kernels, operations, bytes. Counts, not times.

Usage: python benchmarks/counts.py [NAME] [ROWS]   (a known model, default SmolLM2-135M-Instruct; tokens of each row)
A kernel is an operator that is no view; its bytes are those of its inputs and outputs; operations are those of matrix
products, without attention's own.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lit_gpt import checkpoint, lora, ops
from lit_gpt.config import Config
from lit_gpt.report import table


class Kernels(TorchDispatchMode):
    """Counts operators that do work, and the bytes that they touch."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.bytes, self.flops = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        if (flops := flop_registry.get(func.overloadpacket)) is not None and "att" not in name:
            self.flops += flops(*args, **(kwargs or {}), out_val=out)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if made and not func.is_view and not name.startswith(("empty", "new_empty", "detach")):
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.count += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in (*read, *made))
        return out


def count(config: Config, rows: Sequence[int], packed: bool, share: float) -> Kernels:
    """One micro-batch there and back; a `share` of the tokens has labels."""
    model, kernels = checkpoint.hollow(config), Kernels()
    metas = checkpoint.parameter_metas(model)
    with ops.as_on("cuda"), FakeTensorMode():
        for name, meta in metas.items():
            checkpoint.place(model, name, torch.empty(meta.shape), torch.bfloat16, torch.bfloat16, "cpu")
        model.tie()
        lora.attach(model, lora.LoRASettings())
        shape = (1, sum(rows)) if packed else (len(rows), max(rows))
        tokens, where = torch.zeros(shape, dtype=torch.long), torch.arange(int(share * sum(rows)))
        with kernels:
            model(tokens, labels=tokens, where=where, lengths=rows if packed else None).backward()
    return kernels


def main() -> None:
    config = Config.from_name(sys.argv[1] if len(sys.argv) > 1 else "SmolLM2-135M-Instruct")
    rows = [int(n) for n in sys.argv[2].split(",")] if len(sys.argv) > 2 else [500, 412, 310, 240, 190, 121, 80, 50]
    shown = [("a step of rows of " + ", ".join(map(str, rows)), "kernels", "10^9 operations", "GB", "per real token")]
    for name, packed, share in (
        ("packed, labels on 0.7 of the tokens", True, 0.7),
        ("padded, labels on 0.7 of the tokens", False, 0.7),
        ("packed, labels on all", True, 1.0),
    ):
        kernels = count(config, rows, packed, share)
        per_token = f"{kernels.flops / sum(rows) / 1e6:.0f} MF, {kernels.bytes / sum(rows) / 1e6:.1f} MB"
        shown.append(
            (name, f"{kernels.count:,}", f"{kernels.flops / 1e9:,.0f}", f"{kernels.bytes / 1e9:.1f}", per_token)
        )
    print(table(shown))


if __name__ == "__main__":
    main()
