"""A model laid out for one-token steps on a CPU, whose time is that of reading the weights."""

import torch
from torch import nn

from lit_gpt.kernels import few_tokens
from lit_gpt.ops import autocast_dtype
from lit_gpt.quantization import Linear4bit, levels_of
from lit_gpt.surgery import swap


class VectorLinear(nn.Linear):
    """A frozen bfloat16 layer: one token is a matrix-vector product, for which torch reads faster than for a matrix's.

    1.3 to 1.5 times as fast (benchmarks/LOG.md); more tokens are computed as ever.
    """

    def __init__(self, plain: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() != self.in_features or x.dtype != self.weight.dtype or torch.is_grad_enabled():
            return super().forward(x)
        y = torch.mv(self.weight, x.flatten())
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


class FewTokensLinear4bit(nn.Module):
    """A 4-bit layer that multiplies few tokens without making its weight; see `kernels/few_tokens.c`."""

    def __init__(self, layer: Linear4bit):
        super().__init__()
        self.layer = layer
        self.scales = layer.scales().contiguous()  # out of double quantization
        self.levels = levels_of(layer.levels).to(torch.bfloat16)

    @staticmethod
    def fits(layer: Linear4bit) -> bool:
        """Whether the kernel is there, and right for this layer."""
        whole = layer.in_features % layer.block == 0 and layer.block % 64 == 0
        return whole and layer.weight.device.type == "cpu" and few_tokens.available()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = autocast_dtype(x)
        flat = x.flatten(0, -2)
        if torch.is_grad_enabled() or dtype != torch.bfloat16 or len(flat) > few_tokens.MOST_TOKENS:
            return self.layer(x)
        layer = self.layer
        y = few_tokens.product_4bit(flat.to(dtype), layer.weight, self.scales, self.levels, layer.block)
        return (y if layer.bias is None else y + layer.bias.to(dtype)).view(*x.shape[:-1], -1)


def lay_out(model: nn.Module) -> None:
    """Change the model's layers for one-token steps where that is faster; afterwards it can only be run.

    To be called where the model is on a CPU and computes in bfloat16; elsewhere nothing is gained.
    """
    swap(
        model,
        lambda name, module: type(module) is nn.Linear and module.weight.dtype == torch.bfloat16,
        lambda name, module: VectorLinear(module),  # type: ignore[arg-type]
    )
    swap(
        model,
        lambda name, module: isinstance(module, Linear4bit) and FewTokensLinear4bit.fits(module),
        lambda name, module: FewTokensLinear4bit(module),  # type: ignore[arg-type]
    )
    if not few_tokens.available():
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.pack()
