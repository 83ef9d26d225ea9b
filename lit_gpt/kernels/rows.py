"""The functions of rows.c on tensors: element-wise work of a training step, each in one pass over memory.

For float32 and bfloat16 on a CPU, where `available`. What they compute is said by their plain twins in `ops`.
"""

import torch
from torch._subclasses import FakeTensor

from lit_gpt.kernels import Functions, empty

DTYPES = (torch.float32, torch.bfloat16)
WIDEST = 2**17  # numbers of a row of a norm or a softmax, which a thread's stack holds
_FUNCTIONS = Functions(
    "rows",
    {
        "rms_norm": "llplplfplp",
        "rms_norm_backward": "llplplplpp",
        "add_scaled": "lplplfp",
        "gated_silu": "lpppl",
        "gated_silu_backward": "lpppppl",
        "rotate": "lllllpppfpl",
        "dropout": "lpplpl",
        "causal_softmax": "llllfpl",
        "causal_softmax_backward": "llllfppl",
        "attend_one": "llllllfpppppl",
        "cross_entropy": "llplppp",
    },
)
_call = _FUNCTIONS.call


def available() -> bool:
    return _FUNCTIONS.library is not None


def _alike(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors, each end to end: C trusts that they are of one size and kind."""
    first = tensors[0]
    assert all(t.shape == first.shape and t.dtype == first.dtype for t in tensors), [t.shape for t in tensors]
    return tuple(t.contiguous() for t in tensors)


def _half(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., n) normed and times weight (n,), in `dtype`; and 1 / rms(x) (..., 1), float32."""
    x, weight, n = x.contiguous(), weight.contiguous(), x.shape[-1]
    assert weight.shape == (n,)
    assert weight.dtype in DTYPES
    y, scale = empty(x, dtype=dtype), torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
    _call("rms_norm", x.numel() // n, n, x, _half(x), weight, _half(weight), eps, y, _half(y), scale)
    return y, scale


def rms_norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The gradient of x, in x's dtype."""
    x, grad, weight, n = x.contiguous(), grad.contiguous(), weight.contiguous(), x.shape[-1]
    dx = empty(x)
    assert grad.shape == x.shape
    numbers = (grad, _half(grad), x, _half(x), weight, _half(weight), scale, dx)
    _call("rms_norm_backward", x.numel() // n, n, *numbers)
    return dx


def add_scaled(x: torch.Tensor, z: torch.Tensor, scale: float) -> torch.Tensor:
    """x + scale * z, in x's dtype."""
    x, z = x.contiguous(), z.contiguous()
    assert x.shape == z.shape
    y = empty(x)
    _call("add_scaled", x.numel(), x, _half(x), z, _half(z), scale, y)
    return y


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = _alike(gate, up)
    y = empty(gate)
    _call("gated_silu", gate.numel(), gate, up, y, _half(y))
    return y


def gated_silu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up."""
    grad, gate, up = _alike(grad, gate, up)
    d_gate, d_up = empty(gate), empty(up)
    _call("gated_silu_backward", gate.numel(), grad, gate, up, d_gate, d_up, _half(grad))
    return d_gate, d_up


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    """x (B, H, T, D), tokens before heads in memory, as the result is; cos and sin (B or 1, 1, T, n) in x's dtype."""
    (batch, heads, tokens, size), n = x.shape, cos.shape[-1]
    assert (cos.dtype, sin.dtype) == (x.dtype, x.dtype)
    assert n <= size
    assert cos.shape[2] == tokens
    x, cos, sin = x.transpose(1, 2).contiguous(), cos.contiguous(), sin.contiguous()
    y = empty(x)
    shape = (batch * tokens, heads, size, n, cos.numel() // n)
    _call("rotate", *shape, x, cos, sin, sign, y, _half(x))
    return y.transpose(1, 2)


def threshold(p: float) -> int:
    """What 16 random bits of a number are at least if it is kept, as it is not with probability p."""
    return min(round(p * 65536) - 32768, 32767)


def dropout(x: torch.Tensor, seed: torch.Tensor, p: float, *, inplace: bool = False) -> torch.Tensor:
    x = x.contiguous()
    y = x if inplace else empty(x)
    _call("dropout", x.numel(), x, y, _half(x), seed, threshold(p))
    return y


def causal_softmax(scores: torch.Tensor, queries: int, scale: float) -> torch.Tensor:
    """In place, on scores (..., keys) that lie end to end, of blocks of so many queries on as many keys or more."""
    keys = scores.shape[-1]
    _call("causal_softmax", scores.numel() // keys, keys, queries, keys - queries, scale, scores, _half(scores))
    return scores


def causal_softmax_backward(grad: torch.Tensor, weights: torch.Tensor, queries: int, scale: float) -> torch.Tensor:
    """In place: the gradient of the weights becomes that of the scores."""
    keys = grad.shape[-1]
    shape = (grad.numel() // keys, keys, queries, keys - queries)
    _call("causal_softmax_backward", *shape, scale, weights, grad, _half(grad))
    return grad


def attend_one(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Attention (B, H, 1, D) of one query each, q (B, H, 1, D), at `places` (B, 1) of keys and values.

    Those (B, G, S, D) begin a longer store of the same layout.
    """
    batch, heads, _, size = q.shape
    groups, capacity = keys.shape[1], keys.stride(1) // size
    assert keys.stride() == values.stride() == (groups * capacity * size, capacity * size, size, 1)
    assert (keys.dtype, values.dtype, places.dtype) == (q.dtype, q.dtype, torch.int64)
    assert places.shape == (batch, 1)
    assert isinstance(places, FakeTensor) or int(places.max()) < keys.shape[2]
    y = empty(q)
    shape = (batch, heads, groups, size, capacity, window or capacity)
    stores = (keys.as_strided((1,), (1,)), values.as_strided((1,), (1,)))  # where they begin
    _call("attend_one", *shape, scale, q.contiguous(), *stores, places.contiguous(), y, _half(q))
    return y


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """Of each row of logits (n, V) the loss, float32; `gradient` is filled in if there is one. It may be the logits."""
    losses = torch.empty(len(logits), dtype=torch.float32)
    assert labels.shape == losses.shape
    assert labels.dtype == torch.int64
    _call("cross_entropy", *logits.shape, logits, _half(logits), labels, losses, gradient)
    return losses
