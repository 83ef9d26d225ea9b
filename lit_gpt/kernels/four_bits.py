"""Weights to codes of 4 bits; see four_bits.c."""

import torch

from lit_gpt.kernels import Functions

BLOCK, LEVELS = 64, 16
DTYPES = (torch.float32, torch.bfloat16)
_FUNCTIONS = Functions("four_bits", {"four_bits": "lplpppp"})


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
