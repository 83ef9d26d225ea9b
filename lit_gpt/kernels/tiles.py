"""Products of some tokens with a weight on processors with matrix tiles; see tiles.c."""

import ctypes
from functools import cache

import torch

from lit_gpt.kernels import compiled

MOST_TOKENS = 64  # with more, laying the weight out pays


@cache
def _library() -> ctypes.CDLL | None:
    # The second asks the system for the tiles' registers.
    library = compiled("tiles") if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx() else None
    if library is not None:
        number, pointer = ctypes.c_long, ctypes.c_void_p
        library.tiles_bf16.argtypes = [number] * 3 + [pointer] * 3 + [number]
    return library


def available() -> bool:
    return _library() is not None


def fits(n_tokens: int, shape: tuple[int, ...]) -> bool:
    """Whether the kernel is there, and made for so many tokens and a weight of this shape (out, in)."""
    n, k = shape
    return 0 < n_tokens <= MOST_TOKENS and n % 16 == 0 and k % 32 == 0 and available()


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (m, in) weight^T, (m, out); only where it `fits`. Both are bfloat16 and on the CPU, the weight contiguous."""
    library, x, (n, k) = _library(), x.contiguous(), weight.shape
    assert library is not None, "ask fits() first"
    assert x.shape[1] == k
    assert weight.is_contiguous()
    y = torch.empty(len(x), n, dtype=torch.bfloat16)
    failed = library.tiles_bf16(len(x), n, k, x.data_ptr(), weight.data_ptr(), y.data_ptr(), torch.get_num_threads())
    assert not failed, "there is no memory"
    return y
