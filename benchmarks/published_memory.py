"""The memory figures that the original published, predicted with the planner's ledger, beside what this project needs.

Usage: python benchmarks/published_memory.py [--write]   (two minutes; --write renews tutorials/resource-tables.md)

The published figures are `max_memory_allocated` of the original (2023, PyTorch 2.1, bitsandbytes 0.41, an A100), so the
original's way of computing is rebuilt here in outline, for its memory alone: queries, keys and values in one layer
whose update is padded with zeros, logits of all positions, weights under mixed precision in float32 with 16-bit copies.
Its 4-bit layers, the head included, keep their inputs for the way back, and make two 16-bit copies of a weight at a
time. One rule was added after a look at the figures: the loss is taken on a float32 copy of all logits. Without it the
rows were 0.3 to 9 % too low (the worst phi-1.5 at micro-batch 4), by an amount that grows as the logits do.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from lit_gpt import memory, ops, runtime
from lit_gpt.config import Config
from lit_gpt.memory import Ledger, Setting

BITS_PER_WEIGHT = {"bnb.nf4": 4 + 32 / 64, "bnb.nf4-dq": 4 + 8 / 64 + 32 / 64 / 256}
RANK, CHUNK = 8, 128


class Matmul4bit(torch.autograd.Function):
    """Old bitsandbytes: the input is kept, and the weight is there twice in 16 bits while it is used."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: tuple[int, int], codes: torch.Tensor) -> torch.Tensor:
        ctx.shape = shape
        ctx.save_for_backward(x, codes)
        return F.linear(x, torch.empty(shape, dtype=torch.float16).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad @ torch.empty(ctx.shape, dtype=torch.float16).to(grad.dtype), None, None


class Layer(nn.Module):
    """A frozen linear layer in `dtype` or, with `bits`, as old bitsandbytes held it."""

    def __init__(self, n_in: int, n_out: int, bias: bool, dtype: torch.dtype, bits: float | None):
        super().__init__()
        self.shape, self.bits = (n_out, n_in), bits
        size, kind = ((int(n_in * n_out * bits / 8),), torch.uint8) if bits else (self.shape, dtype)
        self.weight = nn.Parameter(torch.empty(size, dtype=kind), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(n_out, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bits is None:
            return F.linear(x, self.weight, self.bias)
        y = Matmul4bit.apply(x, self.shape, self.weight)
        return y if self.bias is None else y + self.bias


class Norm(nn.Module):
    def __init__(self, config: Config, dtype: torch.dtype):
        super().__init__()
        self.kind = config.norm
        self.weight = nn.Parameter(torch.empty(config.n_embd, dtype=dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.weight)
        wide = x.float()
        return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5) * self.weight).to(x.dtype)


class OriginalBlock(nn.Module):
    def __init__(self, config: Config, dtype: torch.dtype, bits: float | None, lora_dtype: torch.dtype | None):
        super().__init__()

        def layer(n_in: int, n_out: int, bias: bool) -> Layer:
            return Layer(n_in, n_out, bias, dtype, bits)

        c, inner = config.n_embd, config.intermediate_size
        self.config = config
        self.norm_1 = Norm(config, dtype)
        self.norm_2 = None if config.shared_norm else Norm(config, dtype)
        self.qkv = layer(c, 3 * c, config.qkv_bias)
        self.proj = layer(c, c, config.proj_bias)
        self.mlp = nn.ModuleList(layer(c, inner, config.mlp_bias) for _ in range(1 + (config.mlp == "gated")))
        self.down = layer(inner, c, config.mlp_bias)
        if lora_dtype is not None:
            self.lora_A = nn.Parameter(torch.empty(2 * RANK, c, dtype=lora_dtype))
            self.lora_B = nn.Parameter(torch.empty(2 * c, RANK, 1, dtype=lora_dtype))
        self.has_lora = lora_dtype is not None

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        y = self.qkv(x)
        if not self.has_lora:
            return y
        low = F.linear(torch.native_dropout(x, 0.05, True)[0], self.lora_A)
        high = F.conv1d(low.transpose(1, 2), self.lora_B, groups=2).transpose(1, 2).reshape(-1, 2 * x.shape[-1])
        rows = torch.zeros(high.shape[-1], dtype=torch.long)
        padded = torch.zeros_like(y).view(-1, y.shape[-1]).index_copy(1, rows, high.to(y.dtype)).view_as(y)
        return y + padded * 2.0

    def attention(self, x: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
        size, turned = self.config.head_size, self.config.rope_size
        q, k, v = self.fused(x).view(1, x.shape[1], -1, 3, size).permute(3, 0, 2, 1, 4).unbind(0)

        def rotate(t: torch.Tensor) -> torch.Tensor:
            first, second = t[..., :turned].chunk(2, dim=-1)
            roped = (t[..., :turned] * cos + torch.cat((-second, first), dim=-1) * cos).to(t.dtype)
            return torch.cat((roped, t[..., turned:]), dim=-1)

        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(x.shape))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.mlp) == 1:
            return self.down(F.gelu(self.mlp[0](x)))
        gate, up = self.mlp[0](x), self.mlp[1](x)
        return self.down(F.silu(gate) * up)

    def forward(self, x: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
        normed = self.norm_1(x)
        attended = self.attention(normed, cos)
        if self.config.parallel_residual:
            return x + attended + self.feed_forward(normed if self.norm_2 is None else self.norm_2(x))
        x = x + attended
        assert self.norm_2 is not None
        return x + self.feed_forward(self.norm_2(x))


def original(
    config: Config, precision: str, quantize: str | None, n_tokens: int, *, batch: int = 1, trains: bool
) -> float:
    """Peak GB of the original: the first training step, which sees the longest row, or generating a short answer."""
    kind = runtime.PRECISIONS[precision]
    dtype = kind.trained  # the original keeps float32 weights under mixed precision
    bits = BITS_PER_WEIGHT[quantize] if quantize else None
    ledger = Ledger(config.vocab_size)
    with ops.as_on("cuda"), FakeTensorMode(), ledger, torch.set_grad_enabled(trains):
        embedding = torch.empty(config.vocab_size, config.n_embd, dtype=dtype)
        blocks = [OriginalBlock(config, dtype, bits, dtype if trains else None) for _ in range(config.n_layer)]
        norm, head = Norm(config, dtype), Layer(config.n_embd, config.vocab_size, config.head_bias, dtype, bits)
        layers = [module for part in (*blocks, head) for module in part.modules() if isinstance(module, Layer)]
        # Generating, autocast keeps the copies of what it takes for trainable.
        copies = [torch.empty(layer.shape, dtype=kind.frozen) for layer in layers] if kind.mixed and not trains else []
        ledger.part = "activations"
        length = n_tokens - 1 if trains else n_tokens
        tokens = torch.zeros(batch, length, dtype=torch.long)
        cos = torch.empty(length, config.rope_size, dtype=torch.float32)
        caches = [torch.empty(2, length + 50, config.n_embd, dtype=kind.frozen) for _ in blocks] if not trains else []
        with runtime.autocast(kind, "cpu"):
            x = F.embedding(tokens, embedding)
            for block in blocks:
                x = block(x, cos)
            x = norm(x)
            chunks = [head(piece) for piece in x.split(CHUNK, dim=1)] if trains else [head(x)]
            if trains:
                targets = tokens.split(CHUNK, dim=1)
                pairs = zip(chunks, targets, strict=True)
                losses = [F.cross_entropy(c.flatten(0, 1).float(), t.flatten(), reduction="none") for c, t in pairs]
                loss = torch.cat(losses).mean()
                del losses
                loss.backward()
        del caches, copies
    return ledger.peak.total() / 1e9


LONGEST = {"stablelm-base-alpha-3b": 1034, "Llama-2-7b-hf": 1304, "Llama-2-13b-hf": 1304, "phi-1_5": 1044}
PROMPT = 8  # tokens of "What food do llamas eat?"
# model, precision, quantization, micro-batch size, published GB of training and of inference
PUBLISHED: list[tuple[str, str, str | None, int, float | None, float | None]] = [
    ("stablelm-base-alpha-3b", "bf16-mixed", None, 1, 26.92, 21.43),
    ("stablelm-base-alpha-3b", "bf16-true", None, 1, 9.69, 7.30),
    ("stablelm-base-alpha-3b", "bf16-true", "bnb.nf4", 1, 6.35, 3.20),
    ("stablelm-base-alpha-3b", "bf16-true", "bnb.nf4-dq", 1, 6.19, 3.04),
    ("stablelm-base-alpha-3b", "bf16-true", None, 2, 12.10, None),
    ("stablelm-base-alpha-3b", "bf16-true", None, 4, 16.92, None),
    ("Llama-2-7b-hf", "bf16-mixed", None, 1, None, 40.21),
    ("Llama-2-7b-hf", "bf16-true", None, 1, 21.30, 13.52),
    ("Llama-2-7b-hf", "bf16-true", "bnb.nf4", 1, 14.14, 4.57),
    ("Llama-2-7b-hf", "bf16-true", "bnb.nf4-dq", 1, 13.84, 4.26),
    ("Llama-2-7b-hf", "bf16-true", None, 2, 29.07, None),
    ("Llama-2-13b-hf", "bf16-true", None, 1, 38.12, 26.21),
    ("Llama-2-13b-hf", "bf16-true", "bnb.nf4", 1, 23.14, 8.32),
    ("Llama-2-13b-hf", "bf16-true", "bnb.nf4-dq", 1, 22.55, 7.72),
    ("phi-1_5", "bf16-true", None, 1, 4.82, 2.86),
    ("phi-1_5", "bf16-true", "bnb.nf4", 1, 3.78, 1.39),
    ("phi-1_5", "bf16-true", "bnb.nf4-dq", 1, 3.72, 1.33),
    ("phi-1_5", "bf16-true", None, 2, 6.76, None),
    ("phi-1_5", "bf16-true", None, 4, 10.68, None),
]


def rows(trains: bool) -> list[tuple[str, ...]]:
    """A row per published figure: what it is of, the figure, the prediction, their ratio, and what ours needs."""
    out = []
    for name, precision, quantize, batch, *figures in PUBLISHED:
        config, published = Config.from_name(name), figures[0 if trains else 1]
        if published is None and not (trains and precision == "bf16-mixed"):
            continue
        n_tokens = LONGEST[name] if trains else PROMPT
        predicted = original(config, precision, quantize, n_tokens, batch=batch, trains=trains)
        setting = Setting(runtime.PRECISIONS[precision], quantize, rows=(n_tokens,) * batch)
        if trains:
            saving = replace(setting, activation_checkpointing=True)
            ours = [memory.plan_training(config, s).gb for s in (setting, saving)]
        else:
            ours = [memory.plan_inference(config, replace(setting, lora=None), new_tokens=50).gb]
        told, ratio = (f"{published:.2f}", f"{predicted / published:.3f}") if published else ("out of 40 GB", "")
        what = (name, precision, quantize or "none", str(batch))
        out.append((*what, told, f"{predicted:.2f}", ratio, *(f"{gb:.2f}" for gb in ours)))
        print(*out[-1], file=sys.stderr, flush=True)
    return out


def markdown(heading: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, ("---",) * len(heading), *body))


def main() -> None:
    what = ("model", "precision", "quantize", "micro-batch", "published", "predicted", "ratio")
    training = markdown((*what, "ours", "ours, checkpointing"), rows(trains=True))
    text = f"### Training, GB\n\n{training}\n\n### Inference, GB\n\n{markdown((*what, 'ours'), rows(trains=False))}\n"
    if "--write" in sys.argv:
        path = Path(__file__).parents[1] / "tutorials" / "resource-tables.md"
        before, rest = path.read_text(encoding="utf-8").split("<!-- published_memory.py -->\n", 1)
        after = rest.split("<!-- end -->", 1)[1]
        path.write_text(f"{before}<!-- published_memory.py -->\n{text}<!-- end -->{after}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
