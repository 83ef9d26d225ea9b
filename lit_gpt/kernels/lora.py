"""The products of LoRA's update on tensors; see lora.c.

For float32 and bfloat16 on a CPU, where `available`. A factor is (rank, width): of float32, and filled up with zeros by
`filled`. A `seed` and a `threshold` tell what drops, as in `ops.dropped`.
"""

import torch
import torch.nn.functional as F

from lit_gpt.kernels import Functions

RANKS, WIDTH = 8, 16  # what the loops in C take at a time
PARTS = 8  # of the tokens, over which sums are taken
WIDEST = 2**15  # numbers of a token, several of which a thread's stack holds
MOST_RANKS = 32  # with more, torch's products are as fast
_FUNCTIONS = Functions("lora", {"to_low": "llllplplpp", "from_low": "llllpppllpl", "over_tokens": "lllpplplp"})


def available(width: int, rank: int) -> bool:
    """Whether the functions are there for layers of this width and rank."""
    return width <= WIDEST and rank <= MOST_RANKS and _FUNCTIONS.library is not None


def filled(factor: torch.Tensor) -> torch.Tensor:
    """A factor (r, n) in float32 with zeros beyond."""
    r, n = factor.shape
    return F.pad(factor.float(), (0, -n % WIDTH, 0, -r % RANKS)).contiguous()


def to_low(x: torch.Tensor, factor: torch.Tensor, seed: torch.Tensor | None = None, threshold: int = 0) -> torch.Tensor:
    """x (n, width) factor^T, (n, rank) in float32."""
    x, (rank, wide) = x.contiguous(), factor.shape
    assert x.shape[1] <= wide
    low = torch.empty(len(x), rank, dtype=torch.float32)
    _FUNCTIONS.call("to_low", *x.shape, rank, wide, x, _half(x), seed, threshold, factor, low)
    return low


def add_from_low(y: torch.Tensor, low: torch.Tensor, factor: torch.Tensor) -> None:
    """y (n, width) += low (n, rank) factor."""
    _from_low(y, low, factor, None, 0, True)


def from_low(
    low: torch.Tensor, factor: torch.Tensor, like: torch.Tensor, seed: torch.Tensor | None, threshold: int
) -> torch.Tensor:
    """low (n, rank) factor, of the shape and kind of `like` (n, width)."""
    y = torch.empty_like(like, memory_format=torch.contiguous_format)
    _from_low(y, low, factor, seed, threshold, False)
    return y


def _from_low(
    y: torch.Tensor, low: torch.Tensor, factor: torch.Tensor, seed: torch.Tensor | None, threshold: int, onto: bool
) -> None:
    (n, width), (rank, wide) = y.shape, factor.shape
    assert low.shape == (n, rank)
    assert width <= wide
    _FUNCTIONS.call("from_low", n, width, rank, wide, low, factor, seed, threshold, onto, y, _half(y))


def over_tokens(
    low: torch.Tensor, x: torch.Tensor, seed: torch.Tensor | None = None, threshold: int = 0
) -> torch.Tensor:
    """low (n, rank)^T x (n, width), (rank, width) in float32."""
    x, (n, width), rank = x.contiguous(), x.shape, low.shape[1]
    assert len(low) == n
    d = torch.empty(PARTS, rank, width, dtype=torch.float32)
    _FUNCTIONS.call("over_tokens", n, width, rank, low, x, _half(x), seed, threshold, d)
    return d.sum(0)


def _half(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16
