"""Products with a weight, by whichever way this processor is fastest at."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from lit_gpt import ops
from lit_gpt.kernels import empty
from lit_gpt.kernels import products as own


def _slow() -> Iterator[torch.dtype]:
    known = torch.backends.mkldnn.is_available()
    # oneDNN takes bfloat16 on every AVX512, but imitates it where the processor has no products of it.
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    imitated = torch.backends.cpu.get_cpu_capability() == "AVX512" and not has_bf16
    if imitated or not (known and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        yield torch.bfloat16
    if not (known and torch.ops.mkldnn._is_mkldnn_fp16_supported()):
        yield torch.float16


SLOW = frozenset(_slow())  # what this CPU cannot multiply: torch's last resort was seen to take 8 to 70 times as long
WIDENED = 2**20  # numbers of a weight that are float32 at a time: they stay in the cache


def goes_wide(x: torch.Tensor) -> bool:
    """Whether products of x are computed in float32, and rounded once."""
    return x.dtype in SLOW and ops.device_of(x) == "cpu"


def copied(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in that dtype, in memory that is found again once it is freed (`kernels.empty`); a step makes hundreds."""
    if x.dtype == dtype or not ops.in_c(x):
        return x.to(dtype)
    return empty(x, dtype=dtype).copy_(x)


def widened(x: torch.Tensor) -> torch.Tensor:
    """x as it is multiplied fastest: itself, or in float32."""
    return copied(x, torch.float32) if goes_wide(x) else x


def as_they_are(x: torch.Tensor) -> AbstractContextManager[object]:
    """For products of `widened` numbers, which autocast would round again."""
    return torch.autocast("cpu", enabled=False) if goes_wide(x) else nullcontext()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., in) weight^T + bias, (..., out). Like torch's it keeps x only where the weight trains."""
    dtype, trains = ops.autocast_dtype(x), torch.is_grad_enabled()
    # One token needs each number of the weight once, which torch widens as it reads.
    wide = dtype in SLOW and ops.device_of(x) == "cpu" and (trains or x.numel() > x.shape[-1])
    fits = x.shape[-1:] == weight.shape[1:] and (bias is None or bias.shape == weight.shape[:1])
    known = ops.in_c(x) and weight.dtype == dtype and x.numel() >= own.FEWEST * x.shape[-1]
    if not fits or not (wide or known):
        return F.linear(x, weight, bias)
    x, weight = x.to(dtype), weight.to(dtype)
    y: torch.Tensor = _Linear.apply(x, weight, bias) if trains else _linear(x, weight, bias)
    return y


def linear_backward(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """grad (..., out) weight, (..., in): the gradient of `linear`'s x."""
    if goes_wide(grad):
        flat = grad.flatten(0, -2)
        with as_they_are(grad):
            parts = (linear_backward(widened(flat[:, rows_of]), part) for rows_of, part in _pieces(weight))
            total = reduce(torch.Tensor.add_, parts)
        return copied(total, grad.dtype).view(*grad.shape[:-1], weight.shape[1])
    if not ops.in_c(grad):
        return grad @ weight
    if own.fits(grad, weight):
        return own.product(grad, weight, back=True)
    d_x = empty(grad, (*grad.shape[:-1], weight.shape[1]))
    torch.mm(grad.reshape(-1, len(weight)), weight, out=d_x.view(-1, weight.shape[1]))
    return d_x


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if goes_wide(x):
        wide, shape = widened(x), (*x.shape[:-1], len(weight))
        y = empty(x, shape) if ops.in_c(x) else x.new_empty(shape)
        with as_they_are(x):
            for rows_of, part in _pieces(weight):
                y[..., rows_of] = _linear(wide, part, None if bias is None else bias[rows_of].float())
        return y
    if not ops.in_c(x):
        return F.linear(x, weight, bias)
    if own.fits(x, weight):
        return own.product(x, weight, bias)
    y = empty(x, (*x.shape[:-1], len(weight)))
    flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, len(weight))
    if bias is None:
        torch.mm(flat, weight.t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), flat, weight.t(), out=out)
    return y


def _pieces(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some rows of a weight in float32 at a time, and which they are."""
    step = len(weight) if torch.compiler.is_compiling() else max(1, WIDENED // weight.shape[1])
    # Of the planner's tensors, which have no numbers, one piece tells what all take.
    stop = step if isinstance(weight, FakeTensor) else len(weight)
    for start in range(0, stop, step):
        yield slice(start, start + step), copied(weight[start : start + step], torch.float32)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        d_x, d_weight, d_bias = None, None, None
        if ctx.needs_input_grad[0]:
            d_x = linear_backward(grad, weight)
        if ctx.needs_input_grad[1]:
            with as_they_are(grad):
                d_weight = widened(grad.flatten(0, -2)).t() @ widened(x.flatten(0, -2))
        if ctx.needs_input_grad[2]:
            d_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return d_x, None if d_weight is None else copied(d_weight, weight.dtype), d_bias
