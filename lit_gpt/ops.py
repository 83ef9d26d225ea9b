"""The kernel seam: every piece of arithmetic that may one day have a faster body, and nothing else.

A faster body stands beside its plain twin here, with the same signature, and a test runs both.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from lit_gpt.kernels import attention as fused
from lit_gpt.kernels import rows

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


def in_c(x: torch.Tensor) -> bool:
    """Whether x is for the compiled bodies; where blocks are compiled, torch's compiler makes better ones itself."""
    fits = _device(x) == "cpu" and x.dtype in rows.DTYPES and x.numel() > 0
    return fits and not torch.compiler.is_compiling() and rows.available()


@dataclass
class Layout:
    """Which tokens a batch holds: at which positions, and which may see which.

    Plain batches (B, T) are causal, so padding on the right is never seen. `lengths` splits one row (1, T) into the
    sequences that were laid end to end. `branches` are continuations of a sequence's beginning, laid end to end behind
    it: a token sees the beginning, where they are 0, and its own. With `cached`, keys reach back to position 0;
    `positions` are the queries'.
    """

    positions: torch.Tensor  # (B, T)
    length: int  # longest position + 1
    lengths: Sequence[int] | None = None
    branches: torch.Tensor | None = None  # (1, T)
    cached: bool = False
    ragged: bool = False  # the cached sequences differ in length
    _beyond: dict[int | None, torch.Tensor] = field(default_factory=dict)
    _apart: dict[int | None, list[torch.Tensor]] = field(default_factory=dict)

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
        """Where queries must not look among cached positions, (B, 1, T, S); None if nowhere. Made once."""
        sees_all = window is None or window >= self.length
        if self.positions.shape[1] == 1 and not self.ragged and sees_all:
            return None
        if window not in self._beyond:
            keys = torch.arange(self.length, device=self.positions.device)
            self._beyond[window] = _hidden(self.positions[:, None, :, None], keys, window)
        return self._beyond[window]

    def apart(self, window: int | None) -> list[torch.Tensor]:
        """Where the queries of each sequence must not look among its beginning and branches, (T, T) each. Made once."""
        if window not in self._apart:
            assert self.branches is not None
            assert self.lengths is not None
            parts = (x[0].split(list(self.lengths)) for x in (self.positions, self.branches))
            self._apart[window] = [
                _hidden(at[:, None], at, window) | (branch != 0) & (branch != branch[:, None])
                for at, branch in zip(*parts, strict=True)
            ]
        return self._apart[window]


def _hidden(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether a query at a position must not look at a key at another."""
    return keys > queries if window is None else (keys > queries) | (keys <= queries - window)


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
    if in_c(x) and {dtype, weight.dtype} <= set(rows.DTYPES) and x.shape[-1] <= rows.WIDEST:
        return rows.rms_norm(x, weight, eps, dtype)
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
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * x.float() * scale).flatten(0, -2).sum(0).to(weight.dtype)
        if in_c(x) and {grad.dtype, weight.dtype} <= set(rows.DTYPES) and x.shape[-1] <= rows.WIDEST:
            return rows.rms_norm_backward(grad, x, weight, scale), d_weight, None, None
        wide = x.float()
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


def _gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return rows.gated_silu(gate, up) if in_c(gate) else F.silu(gate).mul_(up)


class _GatedSilu(torch.autograd.Function):
    """Keeps its two inputs only."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _gated_silu(gate, up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        if in_c(gate):
            return rows.gated_silu_backward(grad, gate, up)
        d_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), d_up


def gated(activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """activation(gate) * up; `activation` is a key of `ACTIVATIONS`."""
    if activation == "silu" and (gate.shape, gate.dtype) == (up.shape, up.dtype):
        y: torch.Tensor = _GatedSilu.apply(gate, up) if torch.is_grad_enabled() else _gated_silu(gate, up)
        return y
    return ACTIVATIONS[activation](gate) * up


def rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first n of the D numbers of each head; x is (B, H, T, D), cos and sin (B, 1, T, n) in x's dtype."""
    n = cos.shape[-1]
    turned = x[..., :n]
    out = torch.addcmul(turned * cos, turned.roll(n // 2, -1), sin)
    return out if n == x.shape[-1] else torch.cat((out, x[..., n:]), dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As `rotate_reference`, keeping nothing for the way back, which is the rotation by the opposite angle."""
    if not torch.is_grad_enabled():
        return rows.rotate(x, cos, sin, 1.0) if in_c(x) else rotate_reference(x, cos, sin)
    y: torch.Tensor = _Rotate.apply(x, cos, sin)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def turn(x, cos, sin, sign):
        if in_c(x):
            return rows.rotate(x, cos, sin, float(sign))
        n, half = cos.shape[-1], cos.shape[-1] // 2
        out = torch.empty_like(x)  # in x's layout: tokens before heads, as they come from a linear layer
        torch.mul(x[..., :n], cos, out=out[..., :n])
        out[..., :half].addcmul_(x[..., half:n], sin[..., :half], value=sign)
        out[..., half:n].addcmul_(x[..., :half], sin[..., half:], value=sign)
        out[..., n:] = x[..., n:]
        return out

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _Rotate.turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _Rotate.turn(grad, cos, sin, -1), None, None


def draw_dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """What tells which numbers of x drop with probability p: a seed on a CPU, elsewhere booleans of x's shape.

    In compiled blocks booleans too: torch's compiler makes wrong code of the twin's whole numbers (torch 2.13).
    """
    if _device(x) != "cpu" or torch.compiler.is_compiling():
        return torch.rand_like(x, dtype=torch.float32) >= p
    return torch.empty((), dtype=torch.int64).random_(-(2**63), None)


def dropped(x: torch.Tensor, drawn: torch.Tensor, p: float, *, inplace: bool = False) -> torch.Tensor:
    """x with zeros where `draw_dropout` says so, each with probability p (on a CPU to within 2 ** -17)."""
    if drawn.ndim == 0 and in_c(x):
        return rows.dropout(x, drawn, _threshold(p), inplace=inplace)
    mask = drawn if drawn.ndim else dropout_mask_reference(x, drawn, p)
    return x.mul_(mask) if inplace else x * mask


def _threshold(p: float) -> int:
    return min(round(p * 65536) - 32768, 32767)


def dropout_mask_reference(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """False where a number of x drops: 16 bits for each, out of splitmix64's states from the seed on.

    (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195.) A function of place and seed, so it need not be kept.
    """

    def mixed(z: torch.Tensor, shift: int) -> torch.Tensor:
        return z ^ ((z >> shift) & (2 ** (64 - shift) - 1))  # a shift that brings zeros in

    states = seed + torch.arange(1, -(-x.numel() // 4) + 1, device=x.device) * -0x61C8864680B583EB
    states = mixed(mixed(states, 30) * -0x40A7B892E31B1A47, 27) * -0x6B2FB644ECCEEE15
    return (mixed(states, 31).view(torch.int16)[: x.numel()] >= _threshold(p)).view(x.shape)


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
    alike = softcap is None and k.dtype == v.dtype == q.dtype and k.shape == v.shape
    # Torch's fused attention is as fast where it needs no mask.
    one = layout.cached and layout.ragged and q.shape[2] == 1 and not torch.is_grad_enabled()
    if one and alike and in_c(q) and k.shape[2] * q.shape[1] // k.shape[1] <= rows.WIDEST:
        return rows.attend_one(q, k, v, layout.positions, scale, window)
    if layout.cached and q.shape[2] != k.shape[2]:
        return _masked(q, k, v, scale, layout.beyond(window), softcap)
    lengths = list(layout.lengths or (q.shape[2],))
    reach = max(lengths) if window is None else min(window, max(lengths))
    slides = reach < max(lengths)
    in_one = alike and min(lengths) > 0 and in_c(q) and fused.available()
    in_one &= not slides or q.dtype == torch.float32 or reach <= _CPUAttention.LONGEST_BACK
    if layout.branches is not None:
        if in_one and not slides and not torch.is_grad_enabled():
            return fused.attention(q, k, v, lengths, scale, None, layout.branches)
        each = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), layout.apart(window), strict=True)
        return _end_to_end([_masked(q, k, v, scale, hidden, softcap) for q, k, v, hidden in each])
    on_cpu = _device(q) == "cpu" and not torch.compiler.is_compiling()
    # Torch's kernel cannot do without tokens.
    if in_one or (softcap is None and not slides and on_cpu and min(*lengths, q.numel())):
        y: torch.Tensor = _CPUAttention.apply(q, k, v, scale, window if slides else None, layout)
        return y
    if layout.lengths is None:
        return _causal(q, k, v, scale, window, softcap)
    each = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    return _end_to_end([_causal(q, k, v, scale, window, softcap) for q, k, v in each])


def _end_to_end(outs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sequences (B, H, T, D) as one, whose tokens come before heads in memory, as the next layer reads them."""
    return outs[0] if len(outs) == 1 else torch.cat([out.transpose(1, 2) for out in outs], dim=1).transpose(1, 2)


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


def causal_softmax(scores: torch.Tensor, queries: int, scale: float) -> torch.Tensor:
    """In place, softmax(scale * scores) of blocks of the last `queries` positions: scores (..., blocks * queries, S).

    A query's weights for the positions after its own are 0.
    """
    if in_c(scores) and scores.shape[-1] <= rows.WIDEST:
        return rows.causal_softmax(scores, queries, scale)
    keys = scores.shape[-1]
    hidden = torch.ones(queries, queries, dtype=torch.bool, device=scores.device).triu_(1)
    scores.mul_(scale).view(-1, queries, keys)[..., keys - queries :].masked_fill_(hidden, float("-inf"))
    return torch.softmax(scores, dim=-1, out=scores)  # the kernel computes in float32


def causal_softmax_backward(grad: torch.Tensor, weights: torch.Tensor, queries: int, scale: float) -> torch.Tensor:
    """The gradient of `causal_softmax`'s scores from that of its weights, which it replaces."""
    if in_c(grad) and grad.shape[-1] <= rows.WIDEST:
        return rows.causal_softmax_backward(grad, weights, queries, scale)
    return torch._softmax_backward_data(grad, weights, -1, weights.dtype).mul_(scale)


class _CPUAttention(torch.autograd.Function):
    """Causal attention that keeps no weights: they are made again on the way back. Rows do not see one another.

    In C where that is faster. Elsewhere by torch's fused kernel, whose own way back takes three times as long as ours,
    which goes through a block of queries at a time with no more keys than they may see.
    """

    BLOCK = 256  # queries; smaller blocks skip more of what is hidden and start more operators
    LONGEST = 256  # tokens of a row up to which C is faster in bfloat16, for which torch may use tiles
    LONGEST_BACK = 1024  # the same on the way back

    @staticmethod
    def in_c(q, window, lengths, longest):
        return in_c(q) and fused.available() and (window or q.dtype == torch.float32 or max(lengths) <= longest)

    @staticmethod
    def forward(ctx, q, k, v, scale, window, layout):
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.window, ctx.layout = scale, window, layout
        ctx.lengths = layout.lengths or (q.shape[2],) * q.shape[0]
        if _CPUAttention.in_c(q, window, ctx.lengths, _CPUAttention.LONGEST):
            return fused.attention(q, k, v, ctx.lengths, scale, window, None)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        lengths = list(layout.lengths or (q.shape[2],))
        parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        return _end_to_end([kernel(*part, 0.0, True, scale=scale)[0] for part in parts])

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        if _CPUAttention.in_c(q, ctx.window, ctx.lengths, _CPUAttention.LONGEST_BACK):
            return *fused.attention_backward(grad, q, k, v, ctx.lengths, ctx.scale, ctx.window), None, None, None
        batch, heads, n, size = q.shape
        groups = k.shape[1]
        dq, dk, dv = (x.new_empty(batch, n, x.shape[1], size).transpose(1, 2) for x in (q, k, v))
        for row, begin, length in ctx.layout.rows(batch, n):
            keys, values = (x[row, :, begin : begin + length].contiguous() for x in (k, v))
            for start in reversed(range(0, length, _CPUAttention.BLOCK)):
                stop = min(start + _CPUAttention.BLOCK, length)
                here = slice(begin + start, begin + stop)
                # Heads that share keys are one product: (G, H / G * T', D).
                queries, g = (x[row, :, here].reshape(groups, -1, size) for x in (q, grad))
                weights = causal_softmax(torch.bmm(queries, keys[:, :stop].mT), stop - start, ctx.scale)
                d_weights = torch.bmm(g, values[:, :stop].mT)
                more_values = torch.bmm(weights.mT, g)
                d_scores = causal_softmax_backward(d_weights, weights, stop - start, ctx.scale)
                dq[row, :, here] = torch.bmm(d_scores, keys[:, :stop]).view(heads, -1, size)
                more_keys = torch.bmm(d_scores.mT, queries)
                if stop == length:  # the last block sees all keys, those before it add to what it gives
                    d_keys, d_values = more_keys, more_values
                else:
                    d_keys[:, :stop] += more_keys
                    d_values[:, :stop] += more_values
            dk[row, :, begin : begin + length] = d_keys
            dv[row, :, begin : begin + length] = d_values
        return dq, dk, dv, None, None, None


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
    chunk: int = 256,
) -> torch.Tensor:
    """Sum over the labelled positions of the cross entropy of `head(x)`; a float32 scalar.

    x is (B, T, C), labels (B, T), `where` (n,) the labelled ones of the B * T positions. The others are dropped before
    the vocabulary product, and only `chunk` rows of logits exist at a time: their gradient is taken within the forward
    pass and kept instead of them. `parameters` are the trainable tensors inside `head`.
    """
    x, labels = x.flatten(0, 1)[where], labels.flatten()[where]
    needed = [torch.is_grad_enabled() and t.requires_grad for t in (x, *parameters)]
    return _HeadLoss.apply(head, chunk, needed, labels, x, *parameters)


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The cross entropies (n,) of logits (n, V) with labels (n,), float32, and their gradient in the logits' precision.

    Each pass over the logits counts: they are the largest tensor of a step.
    """
    if in_c(logits):
        logits = logits.contiguous()
        gradient = torch.empty_like(logits) if wants_gradient else None
        return rows.cross_entropy(logits, labels.contiguous(), gradient), gradient
    at = labels[:, None]
    wide = logits.to(torch.float32, copy=True).sub_(logits.amax(dim=-1, keepdim=True))
    wanted = wide.gather(1, at)
    total = wide.exp_().sum(dim=-1, keepdim=True)
    losses = (total.log() - wanted)[:, 0]
    if not wants_gradient:
        return losses, None
    wide.div_(total).scatter_add_(1, at, torch.full_like(total, -1.0))
    return losses, wide.to(logits.dtype)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, head, chunk, needed, labels, x, *parameters):
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        sums = [torch.zeros_like(t) if need else None for t, need in zip((x, *parameters), needed, strict=True)]
        for start in range(0, len(x), chunk):
            with torch.set_grad_enabled(any(needed)):
                piece = x[start : start + chunk].detach().requires_grad_(needed[0])
                logits = head(piece)
            losses, d_logits = cross_entropy(logits.detach(), labels[start : start + chunk], any(needed))
            total += losses.sum()
            if any(needed):
                leaves = [t for t, need in zip((piece, *parameters), needed, strict=True) if need]
                parts = [part for part in sums if part is not None]
                if needed[0]:
                    parts[0] = parts[0][start : start + chunk]
                for part, grad in zip(parts, torch.autograd.grad(logits, leaves, d_logits), strict=True):
                    part += grad
        ctx.save_for_backward(*sums)
        return total

    @staticmethod
    def backward(ctx, grad):
        return None, None, None, None, *(None if total is None else total * grad for total in ctx.saved_tensors)
