"""A fast body beside its plain twin."""

import torch

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}  # of the largest number


def both(fast, plain, *inputs: torch.Tensor, tolerance: float | None = None) -> None:
    """Same outputs, and same gradients for one random seed of the way back."""
    results = []
    for function in (fast, plain):
        leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        out = function(*leaves)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
        results.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for got, expected in zip(*results, strict=True):
        limit = TOLERANCE[expected.dtype] if tolerance is None else tolerance
        assert (got - expected).abs().max() <= limit * expected.abs().max()
