"""Products of a few tokens with a weight that is read once; see few_tokens.c."""

import ctypes
from functools import cache

import torch

from lit_gpt.kernels import PROCESSORS, compiled

AT_ONCE = 4  # tokens times a bfloat16 weight
MOST_TOKENS = AT_ONCE  # for bfloat16: with more, matrix tiles are faster and torch's products as fast
MOST_TOKENS_WIDE = 4 * AT_ONCE  # where torch's go through float32
MOST_TOKENS_4BIT = 16


def for_this_processor(name: str) -> ctypes.CDLL | None:
    """The library of a C file that includes few_tokens.c, or None."""
    return compiled(name) if torch.backends.cpu.get_cpu_capability() in PROCESSORS else None


@cache
def _library() -> ctypes.CDLL | None:
    library = for_this_processor("few_tokens")
    if library is not None:
        number, pointer = ctypes.c_long, ctypes.c_void_p
        library.few_tokens_4bit.argtypes = [number] * 4 + [pointer] * 5 + [number]
        library.few_tokens_bf16.argtypes = [number] * 3 + [pointer] * 3 + [number]
        library.one_token_bf16.argtypes = [number] * 2 + [pointer] * 3 + [number]
        library.one_token_bf16.restype = None
    return library


def available() -> bool:
    return _library() is not None


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (m, in) weight^T, (m, out), read once for each `AT_ONCE` tokens; only where `available`.

    Both are bfloat16 and on the CPU, and weight (out, in) is contiguous.
    """
    if len(x) > AT_ONCE:
        return torch.cat([product(part, weight) for part in x.split(AT_ONCE)])
    library, x, (n, k) = _library(), x.contiguous(), weight.shape
    assert library is not None, "ask available() first"
    assert x.shape[1] == k
    assert weight.is_contiguous()
    y = torch.empty(len(x), n, dtype=torch.bfloat16)
    pointers = (x.data_ptr(), weight.data_ptr(), y.data_ptr(), torch.get_num_threads())
    if len(x) == 1:
        library.one_token_bf16(n, k, *pointers)
    else:
        failed = library.few_tokens_bf16(len(x), n, k, *pointers)
        assert not failed, f"{len(x)} tokens are too many, or there is no memory"
    return y


def product_4bit(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, block: int
) -> torch.Tensor:
    """x (m, in) W^T, (m, out) in bfloat16, for m up to `MOST_TOKENS_4BIT`; only where `available`.

    W is codes (out * in / 2) uint8 into levels (16,) bfloat16, times float32 scales (out * in / block); all contiguous,
    on the CPU, and `block` a multiple of 64 that divides `in`.
    """
    library = _library()
    assert library is not None, "ask available() first"
    x, (m, k) = x.contiguous(), x.shape  # a copy has to live until the call is over
    n = codes.numel() * 2 // k
    y = torch.empty(m, n, dtype=torch.bfloat16)
    pointers = [t.data_ptr() for t in (x, codes, scales, levels, y)]
    failed = library.few_tokens_4bit(m, n, k, block, *pointers, torch.get_num_threads())
    assert not failed, f"{m} tokens are too many, or there is no memory"
    return y
