"""LoRA's update of a layer and its way back; see lora.c.

For float32 and bfloat16 on a CPU, where it `fits`. What they compute is said by their plain twin in `lit_gpt/lora.py`.
"""

import torch

from lit_gpt.kernels import Functions, empty, in_pairs
from lit_gpt.kernels.rows import DTYPES, threshold

# Ranks, from the next multiple of 8 on torch's products are as fast (benchmarks/LOG.md); those of bfloat16 sooner where
# it is no pairs that are multiplied here.
HIGHEST, HIGHEST_WIDENED = 16, 8
COLUMNS = 32  # of which a layer's sides are multiples
RANKS = 8  # which are computed together
_FUNCTIONS = Functions("lora", {"update": "lllllpppffplppplll", "update_backward": "lllllpplpppppffplpppplll"})


def fits(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether these factors (r, in) and (out, r) are for here, for x of such a dtype."""
    whole = a.shape[1] % COLUMNS == 0 and b.shape[0] % COLUMNS == 0 and a.dtype == b.dtype == torch.float32
    highest = HIGHEST if x.dtype == torch.float32 or _as_pairs(x) else HIGHEST_WIDENED
    return whole and len(a) <= highest and _FUNCTIONS.library is not None


def _sizes(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[int, int, int, int, int]:
    """Tokens, in, out, the rank, and it with what fills it up."""
    assert x.shape[-1] == a.shape[1]
    return x.numel() // x.shape[-1], a.shape[1], len(b), len(a), -(-len(a) // RANKS) * RANKS


def _as_pairs(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16 and in_pairs() and _FUNCTIONS.with_pairs


def update(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    drawn: torch.Tensor | None,
    scaling: float,
    p: float,
) -> torch.Tensor:
    """Add the update of x (..., in) to y (..., out), in y; returns what the way back needs.

    Each number of x drops with probability p, as `drawn` tells, or none does.
    """
    x, a, b = x.contiguous(), a.contiguous(), b.contiguous()
    n, n_in, n_out, _, ranks = sizes = _sizes(x, a, b)
    assert y.shape == (*x.shape[:-1], n_out)
    assert y.dtype == x.dtype
    low = empty(x, (n, ranks), torch.bfloat16 if _as_pairs(x) else torch.float32)
    room = empty(x, (ranks * (n_in + 2 * n_out) + torch.get_num_threads() * 3 * n_in,), torch.float32)
    _FUNCTIONS.call(
        *("update", *sizes, x, a, b, 1 - p, scaling, drawn, threshold(p), y, low),
        *(room, 3 * n_in, x.dtype == torch.bfloat16, _as_pairs(x)),
    )
    return low


def update_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    scale: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    drawn: torch.Tensor | None,
    low: torch.Tensor,
    scaling: float,
    p: float,
    *,
    d_x: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of a and b from y's; `drawn` as in `update`, whose result is `low`. That of x is added to `d_x`.

    With a `weight` and a `scale` x is what they norm to the layer's input, see `ops.Normed`.
    """
    grad, x, a, b = grad.contiguous(), x.contiguous(), a.contiguous(), b.contiguous()
    n, n_in, n_out, _, ranks = sizes = _sizes(x, a, b)
    assert grad.shape == (*x.shape[:-1], n_out)
    assert low.shape == (n, ranks)
    assert low.dtype == (torch.bfloat16 if _as_pairs(grad) else torch.float32)
    if weight is None or scale is None:
        assert grad.dtype == x.dtype
    else:
        assert x.dtype in DTYPES
        assert (weight.numel(), scale.numel(), scale.dtype) == (n_in, n, torch.float32)
        weight, scale = weight.float().contiguous(), scale.contiguous()
    assert d_x is None or (d_x.shape, d_x.dtype) == (x.shape, grad.dtype)
    d_a, d_b = torch.empty_like(a), torch.empty_like(b)
    each = ranks * (n_in + n_out) + 2 * n_out
    room = empty(x, (ranks * (2 * n_in + n_out) + torch.get_num_threads() * each,), torch.float32)
    _FUNCTIONS.call(
        *("update_backward", *sizes, grad, x, x.dtype == torch.bfloat16, weight, scale, a, b, low),
        *(1 - p, scaling, drawn, threshold(p), d_x, d_a, d_b),
        *(room, each, grad.dtype == torch.bfloat16, _as_pairs(grad)),
    )
    return d_a, d_b
