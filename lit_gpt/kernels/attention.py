"""Attention of whole rows, and its way back; see attention.c.

For float32 and bfloat16 on a CPU, where `available`. Heads come and go as (B, H, T, D), with tokens before heads in
memory. `lengths` are those of rows that lie end to end in the B * T tokens; a token sees its row up to itself.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from lit_gpt.kernels import Functions, empty, in_pairs

AT_ONCE = 32  # queries, and at most the numbers of a head, in the loops in C
FEW = 8  # rows times groups, below which the heads of a group are shared out too
_FUNCTIONS = Functions("attention", {"attention": "lllllfppppppplll", "attention_backward": "llllllfpppppppplplll"})


def available() -> bool:
    return _FUNCTIONS.library is not None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None,
    branches: torch.Tensor | None,
) -> torch.Tensor:
    """(B, H, T, D) from q and k, v (B, G, T, D); tokens with `branches` (B, T) see their own and branch 0 only."""
    q, k, v = _alike(q, k, v)
    assert branches is None or (branches.dtype == torch.int64 and branches.is_contiguous())
    y = empty(q)
    sizes = (len(lengths), q.shape[2], k.shape[2], q.shape[3], window or max(lengths))
    _FUNCTIONS.call(
        *("attention", *sizes, scale, _begins(lengths, q), branches, q, k, v, y),
        *(room := _room(2, 2, max(lengths), q), room.shape[1], q.dtype == torch.bfloat16, in_pairs()),
    )
    return y.transpose(1, 2)


def attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v from that of `attention`'s result."""
    q, k, v, grad = _alike(q, k, v, grad)
    assert grad.shape == q.shape
    (batch, n, groups, size), heads = k.shape, q.shape[2]
    parts = 1 if len(lengths) * groups >= FEW else heads // groups
    dq, kind = empty(q), q.dtype if parts == 1 else torch.float32
    dk, dv = (empty(k, (batch, n, groups, parts, size), kind) for _ in (k, v))
    sizes = (len(lengths), heads, groups, parts, size, window or max(lengths))
    _FUNCTIONS.call(
        *("attention_backward", *sizes, scale, _begins(lengths, q), q, k, v, grad, dq, dk, dv, kind == torch.bfloat16),
        *(room := _room(5, 3, max(lengths), q), room.shape[1], q.dtype == torch.bfloat16, in_pairs()),
    )
    sums = ((x.sum(3) if parts > 1 else x[:, :, :, 0]).to(q.dtype) for x in (dk, dv))
    d_keys, d_values = (x.transpose(1, 2) for x in sums)
    return dq.transpose(1, 2), d_keys, d_values


def _alike(q: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All as (B, T, H or G, D), end to end: C trusts that they are of one size and kind."""
    k, v = others[:2]
    assert k.shape == v.shape
    assert (k.shape[0], *k.shape[2:]) == (q.shape[0], *q.shape[2:])
    assert q.shape[1] % k.shape[1] == 0
    assert all(x.dtype == q.dtype for x in others)
    return tuple(x.transpose(1, 2).contiguous() for x in (q, *others))


def _begins(lengths: Sequence[int], q: torch.Tensor) -> torch.Tensor:
    assert sum(lengths) == q.shape[0] * q.shape[1]
    return torch.tensor(list(accumulate(lengths, initial=0)))


def _room(planes: int, lines: int, longest: int, q: torch.Tensor) -> torch.Tensor:
    """Per thread: a row's keys, values and the like (`planes`), its scores (`lines`), and some blocks of queries."""
    n, wide = (-(-size // AT_ONCE) * AT_ONCE for size in (longest, q.shape[3]))
    each = n * (planes * wide + lines * AT_ONCE) + 4 * AT_ONCE * wide
    return empty(q, (torch.get_num_threads(), each), torch.float32)
