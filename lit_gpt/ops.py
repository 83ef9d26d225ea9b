"""The kernel seam: every piece of arithmetic that has a faster body, but for attention, products with weights and LoRA.

A faster body stands beside its plain twin here, with the same signature, and a test runs both.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor

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


def device_of(x: torch.Tensor) -> str:
    """The type of device whose bodies are chosen for x."""
    return _pretended[-1] if _pretended else x.device.type


def in_c(x: torch.Tensor) -> bool:
    """Whether x is for the compiled bodies; where blocks are compiled, torch's compiler makes better ones itself."""
    fits = device_of(x) == "cpu" and x.dtype in rows.DTYPES and x.numel() > 0
    return fits and not torch.compiler.is_compiling() and rows.available()


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467), computed in float32."""
    return (F.rms_norm(x.float(), x.shape[-1:], eps=eps) * weight.float()).to(x.dtype)


class Normed(NamedTuple):
    """What a result of `rms_norm` was made of: since the norm keeps it, layers that read the result can keep it too."""

    x: torch.Tensor  # (..., n)
    weight: torch.Tensor  # (n,)
    scale: torch.Tensor  # (..., 1), 1 / rms(x), float32


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `rms_norm_reference`, keeping only x for the way back.

    In C the result's `normed` tells what it was made of, where it has a gradient.
    Under autocast a float32 x comes out rounded, as the linear layer that reads it would round it.
    """
    dtype = autocast_dtype(x) if x.dtype == torch.float32 else x.dtype
    if not torch.is_grad_enabled():
        return _normed(x, weight, eps, dtype)[0]
    y, scale = _RMSNorm.apply(x, weight, eps, dtype)
    if in_c(x) and y.requires_grad:  # otherwise nobody keeps it
        y.normed = Normed(x, weight, scale)
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
        ctx.mark_non_differentiable(scale)
        return y, scale

    @staticmethod
    def backward(ctx, grad, _):
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


def residual(x: torch.Tensor, update: torch.Tensor, scale: float) -> torch.Tensor:
    """x + scale * update."""
    narrower = update.dtype in rows.DTYPES and torch.promote_types(x.dtype, update.dtype) == x.dtype
    if not (in_c(x) and narrower and x.shape == update.shape):
        return torch.add(x, update, alpha=scale)
    y: torch.Tensor = (
        _Residual.apply(x, update, scale) if torch.is_grad_enabled() else rows.add_scaled(x, update, scale)
    )
    return y


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, update, scale):
        ctx.scale, ctx.dtype = scale, update.dtype
        return rows.add_scaled(x, update, scale)

    @staticmethod
    def backward(ctx, grad):
        return grad, (grad if ctx.scale == 1.0 else grad * ctx.scale).to(ctx.dtype), None


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


def tokens_of(expert: int, chosen: torch.Tensor, n_experts: int) -> tuple[torch.Tensor, ...]:
    """Where an expert is named in `chosen` (n, n_expert_per_token): tokens and ranks.

    The planner's tensors have no numbers; of those each expert gets as many as any other.
    """
    if isinstance(chosen, FakeTensor):
        n = -(-chosen.numel() // n_experts)
        return chosen.new_empty(n), chosen.new_empty(n)
    return (chosen == expert).nonzero(as_tuple=True)


def draw_dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """What tells which numbers of x drop with probability p: a seed on a CPU, elsewhere booleans of x's shape.

    In compiled blocks booleans too: torch's compiler makes wrong code of the twin's whole numbers (torch 2.13).
    """
    if device_of(x) != "cpu" or torch.compiler.is_compiling():
        return torch.rand_like(x, dtype=torch.float32) >= p
    return torch.empty((), dtype=torch.int64).random_(-(2**63), None)


def dropped(x: torch.Tensor, drawn: torch.Tensor, p: float, *, inplace: bool = False) -> torch.Tensor:
    """x with zeros where `draw_dropout` says so, each with probability p (on a CPU to within 2 ** -17)."""
    if drawn.ndim == 0 and in_c(x):
        return rows.dropout(x, drawn, p, inplace=inplace)
    mask = drawn if drawn.ndim else dropout_mask_reference(x, drawn, p)
    return x.mul_(mask) if inplace else x * mask


def dropout_mask_reference(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """False where a number of x drops: 16 bits for each, out of splitmix64's states from the seed on.

    (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195.) A function of place and seed, so it need not be kept.
    """

    def mixed(z: torch.Tensor, shift: int) -> torch.Tensor:
        return z ^ ((z >> shift) & (2 ** (64 - shift) - 1))  # a shift that brings zeros in

    states = seed + torch.arange(1, -(-x.numel() // 4) + 1, device=x.device) * -0x61C8864680B583EB
    states = mixed(mixed(states, 30) * -0x40A7B892E31B1A47, 27) * -0x6B2FB644ECCEEE15
    return (mixed(states, 31).view(torch.int16)[: x.numel()] >= rows.threshold(p)).view(x.shape)


def head_loss(
    head: Callable[[torch.Tensor], torch.Tensor],
    parameters: Sequence[torch.Tensor],
    x: torch.Tensor,
    labels: torch.Tensor,
    *,
    chunk: int = 256,
) -> torch.Tensor:
    """Sum of the cross entropies of `head(x)`, x (n, C), with labels (n,); a float32 scalar.

    Only `chunk` rows of logits exist at a time: their gradient is taken within the forward pass and kept instead of
    them. `parameters` are the trainable tensors inside `head`.
    """
    needed = [torch.is_grad_enabled() and t.requires_grad for t in (x, *parameters)]
    return _HeadLoss.apply(head, chunk, needed, labels, x, *parameters)


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The cross entropies (n,) of logits (n, V) with labels (n,), float32, and their gradient in the logits' precision.

    With a gradient the logits are lost, whose place it takes: they are the largest tensor of a step, and each pass over
    them counts.
    """
    if in_c(logits):
        logits = logits.contiguous()
        gradient = logits if wants_gradient else None
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
                del grad
            del logits, d_logits  # before the next piece needs as much
        ctx.save_for_backward(*sums)
        return total

    @staticmethod
    def backward(ctx, grad):
        return None, None, None, None, *(None if total is None else total * grad for total in ctx.saved_tensors)
