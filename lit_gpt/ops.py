"""The kernel seam: every piece of arithmetic that may one day have a faster body, and nothing else.

A faster body stands beside its plain twin here, with the same signature, and a test runs both.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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

    @classmethod
    def of(cls, tokens: torch.Tensor, lengths: Sequence[int] | None = None) -> "Layout":
        """The layout of tokens (B, T) without a cache."""
        if lengths is None:
            return cls(torch.arange(tokens.shape[1], device=tokens.device)[None], tokens.shape[1])
        assert tokens.shape == (1, sum(lengths)), f"lengths {sum(lengths)} do not cover tokens {tuple(tokens.shape)}"
        positions = torch.cat([torch.arange(n) for n in lengths])[None].to(tokens.device)
        return cls(positions, max(lengths), lengths)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467), computed in float32."""
    return (F.rms_norm(x.float(), x.shape[-1:], eps=eps) * weight.float()).to(x.dtype)


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
    if layout.lengths is not None:
        rows = zip(*(x.split(list(layout.lengths), dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([_causal(q, k, v, scale, window, softcap) for q, k, v in rows], dim=2)
    if not layout.cached or q.shape[2] == k.shape[2]:
        return _causal(q, k, v, scale, window, softcap)
    hidden = torch.arange(k.shape[2], device=q.device) > layout.positions[:, None, :, None]  # (B, 1, T, S)
    if window is not None:
        hidden |= torch.arange(k.shape[2], device=q.device) <= layout.positions[:, None, :, None] - window
    return _masked(q, k, v, scale, hidden, softcap)


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    n = q.shape[2]
    slides = window is not None and window < n
    # On CPUs the fused kernel gains little from bfloat16: up to about a thousand tokens plain products are faster.
    plain = _device(q) == "cpu" and q.dtype != torch.float32 and n <= 1024
    if softcap is None and not slides and not plain:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    if slides:
        assert window is not None
        hidden |= torch.ones(n, n, dtype=torch.bool, device=q.device).tril(-window)
    return _masked(q, k, v, scale, hidden, softcap)


def _masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, hidden: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """Plain products; `hidden` (T, S) or (B, 1, T, S) is True where a query must not look."""
    batch, heads, n, size = q.shape
    groups = k.shape[1]
    q = q.reshape(batch, groups, heads // groups * n, size)  # heads of one group share their keys: one product
    scores = (q @ k.transpose(2, 3) * scale).view(batch, heads, n, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(v.dtype)
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
    return _HeadLoss.apply(head, chunk, labels, x, *parameters)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, head, chunk, labels, x, *parameters):
        needed = [t.requires_grad for t in (x, *parameters)]
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        dx, sums = torch.empty_like(x), [torch.zeros_like(p) for p in parameters]
        for start in range(0, len(x), chunk):
            with torch.set_grad_enabled(any(needed)):
                piece = x[start : start + chunk].detach().requires_grad_(needed[0])
                loss = F.cross_entropy(head(piece).float(), labels[start : start + chunk], reduction="sum")
            total += loss.detach()
            if any(needed):
                leaves = [t for t, need in zip((piece, *parameters), needed, strict=True) if need]
                grads = iter(torch.autograd.grad(loss, leaves))
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
