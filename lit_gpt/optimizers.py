"""Optimizers by name, for finetune's `--optimizer`."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from lit_gpt.quantization import import_bitsandbytes

Constructor = Callable[..., Optimizer]  # called with the parameters, `lr` and `weight_decay`
TORCH: dict[str, Constructor] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}  # SGD without momentum
# bitsandbytes' AdamW: its moments in 8 bits (Dettmers et al., arXiv:2110.02861), in memory that a GPU moves to the
# host when it runs short (QLoRA, arXiv:2305.14314, section 3), or both.
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "adamw-8bit": {"optim_bits": 8},
    "adamw-paged": {"is_paged": True},
    "adamw-8bit-paged": {"optim_bits": 8, "is_paged": True},
}
BYTES_8BIT, BYTES_PAGED = 2.03, 8.0  # that bitsandbytes' moments take for each number, whatever its dtype


def state_bytes(name: str, parameter: torch.Tensor) -> int:
    """What the optimizer of that name keeps of a parameter. torch's moments are of the parameter's own dtype."""
    if name in TORCH:
        return 2 * parameter.nbytes if name == "adamw" else 0
    return int(parameter.numel() * (BYTES_8BIT if "optim_bits" in BITSANDBYTES[name] else BYTES_PAGED))


def resolve(name: str, *, scaled: bool = False) -> Constructor:
    """The optimizer of that name; `scaled` says that losses are scaled up, as 16-mixed has to.

    Raises ValueError that lists the names, or says how to install bitsandbytes.
    """
    if name in TORCH:
        return partial(TORCH[name], fused=not scaled)  # a fused one scales gradients back itself: too late to clip them
    if name not in BITSANDBYTES:
        raise ValueError(f"unknown --optimizer {name!r}; known are {', '.join((*TORCH, *BITSANDBYTES))}")
    library = import_bitsandbytes(f"--optimizer {name}")
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")  # they are plain ones there
    return partial(library.optim.AdamW, **BITSANDBYTES[name])
