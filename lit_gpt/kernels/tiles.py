"""Products of some tokens with a weight on processors with matrix tiles; see tiles.c."""

import ctypes
from functools import cache

import torch

from lit_gpt.kernels import compiled
from lit_gpt.kernels.few_tokens import Block

MOST_TOKENS = 64  # with more, laying the weight out pays


@cache
def _library() -> ctypes.CDLL | None:
    # The second asks the system for the tiles' registers.
    library = compiled("tiles") if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx() else None
    if library is not None:
        number, pointer = ctypes.c_long, ctypes.c_void_p
        library.tiles_bf16.argtypes = [number] * 3 + [pointer] * 3 + [number]
        library.tiles_block.argtypes = [
            *(pointer, number, pointer, pointer, pointer, number),
            *(pointer, pointer, number, pointer, pointer, number),
        ]
    return library


def available() -> bool:
    return _library() is not None


def fits(n_tokens: int, weight: torch.Tensor) -> bool:
    """Whether the kernel is there, and made for so many tokens and a weight (out, in) of this shape."""
    n, k = weight.shape
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


def block(
    as_c: Block,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
) -> torch.Tensor:
    """x (m, 1, C) after the block, a token of each of m sequences; only where `fits` says so of all its weights.

    cos and sin (m, 1, 1, n) are those of the tokens' places (m, 1), int64; keys and values (m, G, capacity, D) hold the
    tokens before them, and get their own. All others are bfloat16, contiguous and on the CPU.
    """
    library, capacity = _library(), keys.shape[2]
    assert library is not None, "ask fits() first"
    assert places.shape == x.shape[:2] == (len(keys), 1)
    assert len(cos) == len(sin) == len(x)
    assert int(places.max()) < capacity
    x, cos, sin, places = x.contiguous(), cos.contiguous(), sin.contiguous(), places.contiguous()
    y = torch.empty_like(x)
    failed = library.tiles_block(
        *(ctypes.addressof(as_c), len(x), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[-1]),
        *(keys.data_ptr(), values.data_ptr(), capacity, places.data_ptr(), y.data_ptr(), torch.get_num_threads()),
    )
    assert not failed, "there is no memory"
    return y
