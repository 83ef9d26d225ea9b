"""A model laid out for one-token steps on a CPU, whose time is that of reading the weights."""

import torch
from torch import nn

from lit_gpt.quantization import Linear4bit
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


def lay_out(model: nn.Module) -> None:
    """Change the model's layers for one-token steps where that is faster; afterwards it can only be run.

    To be called where the model is on a CPU and computes in bfloat16; elsewhere nothing is gained.
    """
    swap(
        model,
        lambda name, module: type(module) is nn.Linear and module.weight.dtype == torch.bfloat16,
        lambda name, module: VectorLinear(module),  # type: ignore[arg-type]
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.pack()
