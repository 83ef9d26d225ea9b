"""The kernel seam: every piece of arithmetic that may one day have a faster body, and nothing else.

A faster body stands beside its plain twin here, with the same signature, and a test runs both.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


_pretended: list[str] = []


@contextmanager
def as_on(device: str) -> Iterator[None]:
    """Choose bodies as on this type of device, whatever the tensors' own: for planning."""
    _pretended.append(device)
    try:
        yield
    finally:
        _pretended.pop()


def _device(x: torch.Tensor) -> str:
    return _pretended[-1] if _pretended else x.device.type


@dataclass
class Layout:
    """Which tokens a batch holds: at which positions, and which may see which.

    Plain batches (B, T) are causal, so padding on the right is never seen. `lengths` splits one row (1, T) into the
    sequences that were laid end to end. With `cached`, keys reach back to position 0; `positions` are the queries'.
    """

    positions: torch.Tensor  # (B, T)
    length: int  # longest position + 1
    lengths: Sequence[int] | None = None
    cached: bool = False
    ragged: bool = False  # the cached sequences differ in length
    _hidden: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict)
    _beyond: dict[int | None, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, tokens: torch.Tensor, lengths: Sequence[int] | None = None) -> "Layout":
        """The layout of tokens (B, T) without a cache."""
        if lengths is None:
            return cls(torch.arange(tokens.shape[1], device=tokens.device)[None], tokens.shape[1])
        assert tokens.shape == (1, sum(lengths)), f"lengths {sum(lengths)} do not cover tokens {tuple(tokens.shape)}"
        positions = torch.cat([torch.arange(n) for n in lengths])[None].to(tokens.device)
        return cls(positions, max(lengths), lengths)

    def rows(self, n_batch: int, n: int) -> Iterator[tuple[int, int, int]]:
        """Place in the batch (B, T), first position and length of each sequence."""
        for row in range(n_batch):
            begin = 0
            for length in self.lengths or (n,):
                yield row, begin, length
                begin += length

    def beyond(self, window: int | None) -> torch.Tensor | None:
        """Where queries must not look among the cached positions, (B, 1, T, S); None if nowhere. Made once."""
        if self.positions.shape[1] == 1 and not self.ragged and (window is None or window >= self.length):
            return None
        if window not in self._beyond:
            keys, at = torch.arange(self.length, device=self.positions.device), self.positions[:, None, :, None]
            self._beyond[window] = keys > at if window is None else (keys > at) | (keys <= at - window)
        return self._beyond[window]

    def hidden(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        """What to add to the scores (n, n) of positions on one another: -inf above the diagonal. Made once."""
        if (n, dtype) not in self._hidden:
            hidden = torch.full((n, n), float("-inf"), dtype=dtype, device=self.positions.device)
            self._hidden[n, dtype] = hidden.triu_(1)
        return self._hidden[n, dtype]


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467), computed in float32."""
    return (F.rms_norm(x.float(), x.shape[-1:], eps=eps) * weight.float()).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `rms_norm_reference`, keeping only x for the way back.

    Under autocast a float32 x comes out rounded, as the linear layer that reads it would round it.
    """
    dtype = autocast_dtype(x) if x.dtype == torch.float32 else x.dtype
    if not torch.is_grad_enabled():
        return _normed(x, weight, eps, dtype)[0]
    y: torch.Tensor = _RMSNorm.apply(x, weight, eps, dtype)
    return y


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and 1 / rms(x) (..., 1)."""
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = torch.rsqrt(norm.square_() / x.shape[-1] + eps)
    return (wide * scale).mul_(weight).to(dtype), scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        y, scale = _normed(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        wide = x.float()
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * wide * scale).flatten(0, -2).sum(0).to(weight.dtype)
        scaled = grad * weight.float()  # float32
        mean = torch.linalg.vecdot(scaled, wide)[..., None] * (scale.pow(3) / x.shape[-1])
        return scaled.mul_(scale).addcmul_(wide, mean, value=-1).to(x.dtype), d_weight, None, None


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """What a linear layer computes in when it is given x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def gated_silu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


class _GatedSilu(torch.autograd.Function):
    """Keeps its two inputs only."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        d_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), d_up


def gated(activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """activation(gate) * up; `activation` is a key of `ACTIVATIONS`."""
    if activation == "silu" and torch.is_grad_enabled():
        y: torch.Tensor = _GatedSilu.apply(gate, up)
        return y
    return ACTIVATIONS[activation](gate) * up


def dropout_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """Booleans of x's shape, False with probability p (to within 2 ** -17)."""
    if x.device.type != "cpu":
        return torch.rand_like(x, dtype=torch.float32) >= p
    # The CPU draws one number after the other: each gives four times 16 bits.
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    return (bits.view(torch.int16)[: x.numel()] >= round(p * 65536) - 32768).view(x.shape)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    layout: Layout,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention of q (B, H, T, D) on k and v (B, G, S, D), G dividing H; returns (B, H, T, D).

    `window` positions are visible, the token's own included; `softcap` bounds the scores, c * tanh(s / c).
    """
    if layout.cached and q.shape[2] != k.shape[2]:
        return _masked(q, k, v, scale, layout.beyond(window), softcap)
    lengths = layout.lengths or (q.shape[2],)
    slides = window is not None and window < max(lengths)
    # On CPUs torch's fused kernel gains little from bfloat16: up to about a thousand tokens plain products are faster.
    if softcap is None and not slides and _device(q) == "cpu" and q.dtype != torch.float32 and max(lengths) <= 1024:
        y: torch.Tensor = _BlockAttention.apply(q, k, v, scale, layout)
        return y
    if layout.lengths is None:
        return _causal(q, k, v, scale, window, softcap)
    rows = zip(*(x.split(list(layout.lengths), dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([_causal(q, k, v, scale, window, softcap) for q, k, v in rows], dim=2)


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    """Of one row (B, H, T, D) that sees itself only."""
    n = q.shape[2]
    slides = window is not None and window < n
    if softcap is None and not slides:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    if slides:
        assert window is not None
        hidden |= torch.ones(n, n, dtype=torch.bool, device=q.device).tril(-window)
    return _masked(q, k, v, scale, hidden, softcap)


class _BlockAttention(torch.autograd.Function):
    """Causal attention in blocks of queries, each with no more keys than it may see; plain products.

    Rows of `layout.lengths` lie end to end and do not see one another.
    """

    BLOCK = 256  # queries; smaller blocks skip more of what is hidden and start more operators

    @staticmethod
    def forward(ctx, q, k, v, scale, layout):
        batch, heads, n, size = q.shape
        groups = k.shape[1]
        kept = []
        out = torch.empty(batch, n, heads, size, dtype=q.dtype, device=q.device).transpose(1, 2)
        for row, begin, length in layout.rows(batch, n):
            keys, values = (x[row, :, begin : begin + length].contiguous() for x in (k, v))
            kept += [keys, values]
            for start in range(0, length, _BlockAttention.BLOCK):
                stop = min(start + _BlockAttention.BLOCK, length)
                here = slice(begin + start, begin + stop)
                # Heads that share keys are one product: (G, H / G * T', D).
                queries = torch.empty(heads, stop - start, size, dtype=q.dtype, device=q.device)
                queries = torch.mul(q[row, :, here], scale, out=queries).view(groups, -1, size)
                scores = torch.bmm(queries, keys[:, :stop].transpose(1, 2))
                scores.view(groups, -1, stop - start, stop)[..., start:] += layout.hidden(stop - start, scores.dtype)
                weights = scores.softmax(dim=-1)  # the kernel computes in float32
                out[row, :, here] = torch.bmm(weights, values[:, :stop]).view(heads, stop - start, size)
                kept += [queries, weights]
        ctx.save_for_backward(*kept)
        ctx.scale, ctx.layout, ctx.shape, ctx.groups = scale, layout, q.shape, groups
        return out

    @staticmethod
    def backward(ctx, grad):
        batch, heads, n, size = ctx.shape
        kept = list(ctx.saved_tensors)
        dq = torch.empty(batch, n, heads, size, dtype=grad.dtype, device=grad.device).transpose(1, 2)
        dk, dv = (dq.new_empty(batch, n, ctx.groups, size).transpose(1, 2) for _ in "kv")
        for row, begin, length in reversed(list(ctx.layout.rows(batch, n))):
            starts = range(0, length, _BlockAttention.BLOCK)
            at = len(kept) - 2 * len(starts) - 2
            keys, values = kept[at : at + 2]
            for start in reversed(starts):  # the last block sees all keys, those before it add to what it gives
                stop = min(start + _BlockAttention.BLOCK, length)
                here = slice(begin + start, begin + stop)
                weights, queries = kept.pop(), kept.pop()
                g = grad[row, :, here].reshape(ctx.groups, -1, size)
                d_weights = torch.bmm(g, values[:, :stop].transpose(1, 2))
                d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
                torch.mul(torch.bmm(d_scores, keys[:, :stop]).view(heads, -1, size), ctx.scale, out=dq[row, :, here])
                more_values, more_keys = torch.bmm(weights.mT, g), torch.bmm(d_scores.mT, queries)
                if stop == length:
                    d_keys, d_values = more_keys, more_values
                else:
                    d_keys[:, :stop] += more_keys
                    d_values[:, :stop] += more_values
            del kept[at:]
            dk[row, :, begin : begin + length] = d_keys
            dv[row, :, begin : begin + length] = d_values
        return dq, dk, dv, None, None


def _masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, hidden: torch.Tensor | None, softcap: float | None
) -> torch.Tensor:
    """`hidden` (T, S) or (B, 1, T, S) is True where a query must not look."""
    if softcap is None:
        visible = None if hidden is None else ~hidden
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
    batch, heads, n, size = q.shape
    groups = k.shape[1]
    q = q.reshape(batch, groups, heads // groups * n, size)  # heads of one group share their keys: one product
    scores = softcap * torch.tanh((q @ k.transpose(2, 3) * scale).view(batch, heads, n, -1) / softcap)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    return (weights.view(batch, groups, heads // groups * n, -1) @ v).view(batch, heads, n, -1)


def head_loss(
    head: Callable[[torch.Tensor], torch.Tensor],
    parameters: Sequence[torch.Tensor],
    x: torch.Tensor,
    labels: torch.Tensor,
    where: torch.Tensor,
    *,
    chunk: int = 128,
) -> torch.Tensor:
    """Sum over the labelled positions of the cross entropy of `head(x)`; a float32 scalar.

    x is (B, T, C), labels (B, T), `where` (n,) the labelled ones of the B * T positions. The others are dropped before
    the vocabulary product, and only `chunk` rows of logits exist at a time: their gradient is taken within the forward
    pass and kept instead of them. `parameters` are the trainable tensors inside `head`.
    """
    x, labels = x.flatten(0, 1)[where], labels.flatten()[where]
    return _HeadLoss.apply(head, chunk, labels, x, *parameters)


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The summed cross entropy of logits (n, V) with labels (n,), float32, and its gradient in the logits' precision.

    Each pass over the logits counts: they are the largest tensor of a step.
    """
    at = labels[:, None]
    wide = logits.to(torch.float32, copy=True).sub_(logits.amax(dim=-1, keepdim=True))
    wanted = wide.gather(1, at)
    total = wide.exp_().sum(dim=-1, keepdim=True)
    loss = (total.log() - wanted).sum()
    if not wants_gradient:
        return loss, None
    wide.div_(total).scatter_add_(1, at, torch.full_like(total, -1.0))
    return loss, wide.to(logits.dtype)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, head, chunk, labels, x, *parameters):
        needed = [t.requires_grad for t in (x, *parameters)]
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        dx, sums = torch.empty_like(x), [torch.zeros_like(p) for p in parameters]
        for start in range(0, len(x), chunk):
            with torch.set_grad_enabled(any(needed)):
                piece = x[start : start + chunk].detach().requires_grad_(needed[0])
                logits = head(piece)
            loss, d_logits = cross_entropy(logits.detach(), labels[start : start + chunk], any(needed))
            total += loss
            if any(needed):
                leaves = [t for t, need in zip((piece, *parameters), needed, strict=True) if need]
                grads = iter(torch.autograd.grad(logits, leaves, d_logits))
                if needed[0]:
                    dx[start : start + chunk] = next(grads)
                for held, need in zip(sums, needed[1:], strict=True):
                    if need:
                        held += next(grads)
        ctx.save_for_backward(dx, *sums)
        return total

    @staticmethod
    def backward(ctx, grad):
        scaled = (
            g * grad if need else None for g, need in zip(ctx.saved_tensors, ctx.needs_input_grad[3:], strict=True)
        )
        return None, None, None, *scaled
