"""Products of many tokens with a weight, and their way back; see products.c.

In float32 they are for AMD's processors, where torch's library is Intel's and slower; in bfloat16 where pairs are what
the processor is best at, since torch's waits for weights that the last product pushed out of the cache.
(benchmarks/LOG.md has both.)
"""

from functools import cache
from pathlib import Path

import torch

from lit_gpt.kernels import PROCESSORS, Functions, empty, in_pairs

FEWEST = 16  # tokens, from which on laying the weight out pays
COLUMNS = 32  # of which a weight's sides are multiples
DEEPEST = 2**15  # numbers of a token, beyond which the caches are too small: a head's way back is left to torch
PAGE, LINES = 4096, 128  # bytes: tokens whole pages apart push each other out of the nearest cache; two lines more help
_FUNCTIONS = Functions("products", {"product": "llllplppppl"})


@cache
def _by_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def pays(dtype: torch.dtype) -> bool:
    """Whether these products are there, and are faster than torch's on this processor."""
    if dtype not in (torch.float32, torch.bfloat16) or torch.backends.cpu.get_cpu_capability() not in PROCESSORS:
        return False
    if dtype == torch.bfloat16:
        return in_pairs() and _FUNCTIONS.with_pairs
    return _by_amd() and _FUNCTIONS.library is not None


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x (..., in or out) times this weight (out, in), in the weight's dtype, is for here."""
    many = x.numel() >= FEWEST * x.shape[-1]
    whole = all(side % COLUMNS == 0 for side in weight.shape) and x.shape[-1] <= DEEPEST
    return many and whole and weight.is_contiguous() and pays(weight.dtype)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, back: bool = False
) -> torch.Tensor:
    """x (..., in) weight^T + bias, (..., out); `back` x (..., out) weight, (..., in). Only where it `fits`."""
    n, k = reversed(weight.shape) if back else weight.shape
    rows = x.reshape(-1, k).contiguous()
    assert x.shape[-1] == k
    assert len(rows) >= FEWEST
    assert x.dtype == weight.dtype
    assert bias is None or bias.shape == (n,)
    size = x.element_size()
    if k * size % PAGE == 0:
        apart = empty(rows, (len(rows), k + LINES // size))
        apart[:, :k] = rows
        rows = apart
    y = empty(x, (*x.shape[:-1], n))
    room = empty(x, (torch.get_num_threads(), k * size // 4, COLUMNS), torch.float32)
    bias = None if bias is None else bias.float().contiguous()
    line = rows.shape[1] * size // 4
    _FUNCTIONS.call("product", len(rows), n, k, back, rows, line, weight, bias, y, room, x.dtype == torch.bfloat16)
    return y
