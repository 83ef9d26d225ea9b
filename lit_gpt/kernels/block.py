"""Cached tokens through a whole block in one call; see block.c."""

import ctypes
from functools import cache

import torch

from lit_gpt.kernels import few_tokens

WHOLE = 32  # an update's rank is filled up to a multiple of this
LONGEST = 2**18  # tokens before a block's one, whose weights a thread's stack holds
MOST_TOKENS = 24  # where not all products are done in tiles; with more, operators are as fast


class Weight(ctypes.Structure):
    """A weight as C sees it: (n, k) in bfloat16, or codes in blocks with scales and levels; and an update's factors.

    Those are a (rank, k) and b (n, rank), bfloat16, filled up with zeros to a multiple of `WHOLE`.
    """

    _fields_ = (
        *((name, ctypes.c_long) for name in ("n", "k", "block")),
        *((name, ctypes.c_void_p) for name in ("numbers", "scales", "levels")),
        ("rank", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("a", "b")),
    )


class Block(ctypes.Structure):
    """A block as C sees it; the tensors that it points to have to live as long."""

    _fields_ = (
        *((name, Weight) for name in ("q", "k", "v", "proj", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm_1", "norm_2")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
        *((name, ctypes.c_long) for name in ("heads", "groups", "size")),
    )


@cache
def _library() -> ctypes.CDLL | None:
    library = few_tokens.for_this_processor("block") if few_tokens.available() else None
    if library is not None:
        number, pointer = ctypes.c_long, ctypes.c_void_p
        library.one_token_block.argtypes = [pointer] * 4 + [number] + [pointer] * 2 + [number] * 2 + [pointer, number]
        library.one_token_block.restype = None
        library.tokens_block.argtypes = [
            *(pointer, number, pointer, pointer, pointer, number, pointer, pointer, number),
            *(pointer, pointer, ctypes.c_int, number),
        ]
    return library


def available() -> bool:
    return _library() is not None


def one_token(
    as_c: Block,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: int,
) -> torch.Tensor:
    """x (1, 1, C) after the block; only where `available`.

    cos and sin (1, 1, 1, n) are those of the token's position; keys and values (1, G, capacity, D) hold the tokens
    before it, and get its own. All bfloat16, contiguous and on the CPU.
    """
    library, capacity = _library(), keys.shape[2]
    assert library is not None, "ask available() first"
    assert position < capacity
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)
    library.one_token_block(
        *(ctypes.addressof(as_c), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[-1]),
        *(keys.data_ptr(), values.data_ptr(), capacity, position, y.data_ptr(), torch.get_num_threads()),
    )
    return y


def tokens(
    as_c: Block,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    tiled: bool,
) -> torch.Tensor:
    """x (m, 1, C) after the block, a token of each of m sequences; only where `available`.

    cos and sin (m, 1, 1, n) are those of the tokens' places (m, 1), int64; keys and values (m, G, capacity, D) hold the
    tokens before them, and get their own. All others are bfloat16, contiguous and on the CPU. `tiled`: the products are
    done in matrix tiles, which have to fit all weights.
    """
    library, capacity = _library(), keys.shape[2]
    assert library is not None, "ask available() first"
    assert places.shape == x.shape[:2] == (len(keys), 1)
    assert len(cos) == len(sin) == len(x)
    assert int(places.max()) < capacity
    x, cos, sin, places = x.contiguous(), cos.contiguous(), sin.contiguous(), places.contiguous()
    y = torch.empty_like(x)
    pointers = [tensor.data_ptr() for tensor in (x, cos, sin, keys, values, places, y)]
    x_at, cos_at, sin_at, keys_at, values_at, places_at, y_at = pointers
    failed = library.tokens_block(
        *(ctypes.addressof(as_c), len(x), x_at, cos_at, sin_at, cos.shape[-1]),
        *(keys_at, values_at, capacity, places_at, y_at, tiled, torch.get_num_threads()),
    )
    assert not failed, "there is no memory"
    return y
