"""Weights to codes of 4 bits and back; see four_bits.c."""

import torch

from lit_gpt.kernels import Functions, empty

BLOCK, LEVELS = 64, 16
DTYPES = (torch.float32, torch.bfloat16)
_FUNCTIONS = Functions("four_bits", {"four_bits": "lplpppp", "dense": "llppppl"})


def fits(weight: torch.Tensor) -> bool:
    """Whether this weight, which has to be whole blocks, is for here."""
    known = weight.device.type == "cpu" and weight.dtype in DTYPES and weight.numel() % BLOCK == 0
    return known and _FUNCTIONS.library is not None


def quantized(weight: torch.Tensor, bounds: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (n / 2,) uint8 and scales (n / BLOCK,) float32 of a weight of n numbers; only where it `fits`.

    bounds (LEVELS - 1,) float32 rise; order (LEVELS,) are the codes of the levels between them.
    """
    assert bounds.shape == (LEVELS - 1,)
    assert order.shape == (LEVELS,)
    weight, n = weight.contiguous(), weight.numel()
    scales, codes = torch.empty(n // BLOCK, dtype=torch.float32), torch.empty(n // 2, dtype=torch.uint8)
    half = weight.dtype == torch.bfloat16
    _FUNCTIONS.call("four_bits", n // BLOCK, weight, half, bounds.float(), order.to(torch.uint8), scales, codes)
    return codes, scales


def makes(codes: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `dense` is for these codes, and makes such numbers."""
    return codes.device.type == "cpu" and dtype in DTYPES and _FUNCTIONS.library is not None


def dense(
    codes: torch.Tensor,
    levels: torch.Tensor,
    scales: torch.Tensor,
    block: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The numbers of codes, each its level (LEVELS,) times the scale of its block; only where it `makes` them."""
    count = shape[0] * shape[1]
    assert block % 2 == 0
    assert codes.numel() >= (count + 1) // 2
    assert scales.numel() >= -(-count // block)
    assert (levels.shape, levels.dtype, scales.dtype) == ((LEVELS,), torch.float32, torch.float32)
    y = empty(codes, shape, dtype)
    _FUNCTIONS.call("dense", count, block, codes.contiguous(), levels, scales.contiguous(), y, dtype == torch.bfloat16)
    return y
