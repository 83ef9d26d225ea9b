"""Products of a few tokens with a weight that is read once; see few_tokens.c."""

import ctypes
from functools import cache

import torch

from lit_gpt.kernels import compiled

MOST_TOKENS = 4  # for bfloat16: with more, matrix tiles are faster and torch's products as fast
MOST_TOKENS_4BIT = 16
WHOLE = 32  # an update's rank is filled up to a multiple of this
LONGEST = 2**18  # tokens before a block's one, whose weights a thread's stack holds


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
    library = compiled("few_tokens") if torch.cpu._is_avx512_bf16_supported() else None
    if library is not None:
        number, pointer = ctypes.c_long, ctypes.c_void_p
        library.few_tokens_4bit.argtypes = [number] * 4 + [pointer] * 5 + [number]
        library.few_tokens_bf16.argtypes = [number] * 3 + [pointer] * 3 + [number]
        library.one_token_bf16.argtypes = [number] * 2 + [pointer] * 3 + [number]
        library.one_token_block.argtypes = [pointer] * 4 + [number] + [pointer] * 2 + [number] * 2 + [pointer, number]
        library.one_token_bf16.restype = library.one_token_block.restype = None
    return library


def available() -> bool:
    return _library() is not None


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (m, in) weight^T, (m, out), for m up to `MOST_TOKENS`; only where `available`.

    Both are bfloat16 and on the CPU, and weight (out, in) is contiguous.
    """
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


def block(
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
