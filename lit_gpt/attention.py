"""Attention: which tokens may see which, and the bodies that compute it, each chosen where it is the fastest."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F

from lit_gpt import ops, products
from lit_gpt.kernels import attention as fused
from lit_gpt.kernels import rows


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
    _bounds: torch.Tensor | None = None

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

    def bounds(self, device: torch.device) -> torch.Tensor:
        """Where each of the sequences laid end to end begins, and where the last ends, (n + 1,) int32. Made once."""
        if self._bounds is None:
            assert self.lengths is not None
            ends = torch.tensor([0, *self.lengths]).cumsum(0, dtype=torch.int32)
            self._bounds = ends.to(device, non_blocking=True)
        return self._bounds

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


def attend(
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
    # Torch's fused attention is as fast where it needs no mask and the processor can multiply such numbers.
    one = layout.cached and (layout.ragged or products.goes_wide(q)) and q.shape[2] == 1 and not torch.is_grad_enabled()
    if one and alike and ops.in_c(q) and k.shape[2] * q.shape[1] // k.shape[1] <= rows.WIDEST:
        return rows.attend_one(q, k, v, layout.positions, scale, window)
    cached = layout.cached and q.shape[2] != k.shape[2]
    lengths = list(layout.lengths or (q.shape[2],))
    reach = max(lengths) if window is None else min(window, max(lengths))
    slides = reach < max(lengths)
    in_one = alike and not cached and min(lengths) > 0 and ops.in_c(q) and fused.available()
    in_one &= not slides or _CPUAttention.without_tiles(q) or reach <= _CPUAttention.LONGEST_BACK
    in_one &= layout.branches is None or not (slides or torch.is_grad_enabled())
    if not in_one and products.goes_wide(q):
        with products.as_they_are(q):
            wide = (x.float() for x in (q, k, v))
            return attend(*wide, scale=scale, layout=layout, window=window, softcap=softcap).to(q.dtype)
    if cached:
        return _masked(q, k, v, scale, layout.beyond(window), softcap)
    if layout.branches is not None:
        if in_one:
            return fused.attention(q, k, v, lengths, scale, None, layout.branches)
        each = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), layout.apart(window), strict=True)
        return _end_to_end([_masked(q, k, v, scale, hidden, softcap) for q, k, v, hidden in each])
    on_cpu = ops.device_of(q) == "cpu" and not torch.compiler.is_compiling()
    # Torch's kernel cannot do without tokens.
    if in_one or (softcap is None and not slides and on_cpu and min(*lengths, q.numel())):
        y: torch.Tensor = _CPUAttention.apply(q, k, v, scale, window if slides else None, layout)
        return y
    if layout.lengths is None:
        return _causal(q, k, v, scale, window, softcap)
    if alike and (slides or len(lengths) > 1) and _takes_varlen(q, k.shape[1]):
        return _varlen(q, k, v, scale, window if slides else None, layout)
    return _rows(q, k, v, scale, window, layout, softcap)


def _rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    layout: Layout,
    softcap: float | None = None,
) -> torch.Tensor:
    """Of each of the sequences laid end to end, one after the other."""
    each = zip(*(x.split(list(layout.lengths or ()), dim=2) for x in (q, k, v)), strict=True)
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


@cache
def _kernel_of_varlen() -> Callable[..., Any] | None:
    """Torch's, None where this version has none or one that knows no windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = set(signature(varlen_attn).parameters)
    if not {"scale", "window_size"} <= known:
        return None
    # Before it had this flag it took groups unasked (torch 2.11).
    return partial(varlen_attn, enable_gqa=True) if "enable_gqa" in known else varlen_attn


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, layout: Layout
) -> torch.Tensor:
    """All sequences (1, H, T, D) in one kernel of flash attention (Dao 2023, arXiv:2307.08691)."""
    kernel = _kernel_of_varlen()
    assert kernel is not None
    assert layout.lengths is not None
    bounds, longest = layout.bounds(q.device), max(layout.lengths)
    before = -1 if window is None else window - 1  # it counts those before a token, -1 for all
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
    y: torch.Tensor = kernel(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(before, 0))
    return y.transpose(0, 1).unsqueeze(0)


def _takes_varlen(q: torch.Tensor, groups: int) -> bool:
    """Whether that kernel is there for such queries (B, H, T, D). On a GPU it has to show first that it is right."""
    on_gpu = ops.device_of(q) == "cuda" and q.numel() > 0 and not torch.compiler.is_compiling()
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] % 8 == 0 and q.shape[3] <= 256
    if not (on_gpu and fits and _kernel_of_varlen()):
        return False
    return q.device.type != "cuda" or varlen_is_right(q.device, q.dtype, q.shape[1], groups, q.shape[3])


@cache
def varlen_is_right(device: torch.device, dtype: torch.dtype, heads: int, groups: int, size: int) -> bool:
    """Whether `_varlen` gives what one row after the other gives, on the way back too; warns where it does not.

    GPUs and builds of torch differ in what they have; an H100 with torch 2.11 passed.
    """
    lengths, n = (3, 70, 1), 74

    def found(way: Callable[..., torch.Tensor], window: int | None) -> list[torch.Tensor]:
        leaves = []
        for h in (heads, groups, groups):  # of no generator: a run's random numbers stay what they were
            x = torch.arange(n * h * size, device=device).mul(0.37 + h).sin().to(dtype)
            leaves.append(x.view(1, n, h, size).transpose(1, 2).requires_grad_())
        layout = Layout.of(torch.zeros(1, n, dtype=torch.long, device=device), lengths)
        y = way(*leaves, size**-0.5, window, layout)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    try:
        # What it keeps for its way back must not come to a checkpointed block that it is held in.
        apart = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False), apart:
            pairs = [
                pair
                for window in (None, 9)
                for pair in zip(*(found(way, window) for way in (_varlen, _rows)), strict=True)
            ]
        if all(bool((a - b).abs().max() <= 3e-2 * b.abs().max()) for a, b in pairs):
            return True
        why = "its results are others here"
    except (RuntimeError, TypeError, ValueError) as problem:
        why = str(problem)
    warnings.warn(f"attention goes row by row instead of through torch's kernel for all rows: {why}", stacklevel=2)
    return False


def causal_softmax(scores: torch.Tensor, queries: int, scale: float) -> torch.Tensor:
    """In place, softmax(scale * scores) of blocks of the last `queries` positions: scores (..., blocks * queries, S).

    A query's weights for the positions after its own are 0.
    """
    if ops.in_c(scores) and scores.shape[-1] <= rows.WIDEST:
        return rows.causal_softmax(scores, queries, scale)
    keys = scores.shape[-1]
    hidden = torch.ones(queries, queries, dtype=torch.bool, device=scores.device).triu_(1)
    scores.mul_(scale).view(-1, queries, keys)[..., keys - queries :].masked_fill_(hidden, float("-inf"))
    return torch.softmax(scores, dim=-1, out=scores)  # the kernel computes in float32


def causal_softmax_backward(grad: torch.Tensor, weights: torch.Tensor, queries: int, scale: float) -> torch.Tensor:
    """The gradient of `causal_softmax`'s scores from that of its weights, which it replaces."""
    if ops.in_c(grad) and grad.shape[-1] <= rows.WIDEST:
        return rows.causal_softmax_backward(grad, weights, queries, scale)
    return torch._softmax_backward_data(grad, weights, -1, weights.dtype).mul_(scale)


def few_shapes(softcap: float | None) -> bool:
    """Whether attention in training is never made of torch's products on this CPU, whose shapes are the rows'."""
    return softcap is None and fused.available() and not torch.cpu._is_amx_tile_supported()


class _CPUAttention(torch.autograd.Function):
    """Causal attention that keeps no weights: they are made again on the way back. Rows do not see one another.

    In C where that is faster. Elsewhere by torch's fused kernel, whose own way back takes three times as long as ours,
    which goes through a block of queries at a time with no more keys than they may see.
    """

    BLOCK = 256  # queries; smaller blocks skip more of what is hidden and start more operators
    LONGEST = 256  # tokens of a row up to which C is faster where torch's products have matrix tiles
    LONGEST_BACK = 1024  # the same on the way back

    @staticmethod
    def without_tiles(q):
        return q.dtype == torch.float32 or products.goes_wide(q) or fused.in_pairs()

    @staticmethod
    def in_c(q, window, lengths, longest):
        faster = window or _CPUAttention.without_tiles(q) or max(lengths) <= longest
        return ops.in_c(q) and fused.available() and faster

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
        if q.shape[2] == 1:  # heads of one group as its rows: on a GPU kernels that take a mask know no groups
            grouped = q.reshape(len(q), k.shape[1], -1, q.shape[3])
            return F.scaled_dot_product_attention(grouped, k, v, visible, scale=scale).reshape(*q.shape[:3], -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
    batch, heads, n, size = q.shape
    groups = k.shape[1]
    q = q.reshape(batch, groups, heads // groups * n, size)  # heads of one group share their keys: one product
    scores = softcap * torch.tanh((q @ k.transpose(2, 3) * scale).view(batch, heads, n, -1) / softcap)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    return (weights.view(batch, groups, heads // groups * n, -1) @ v).view(batch, heads, n, -1)
