"""A model laid out for one-token steps on a CPU, whose time is that of reading the weights."""

import ctypes
from typing import Any

import torch
from torch import nn

from lit_gpt.attention import Layout
from lit_gpt.cache import KVCache
from lit_gpt.kernels import block as one_call
from lit_gpt.kernels import few_tokens, rows, tiles
from lit_gpt.lora import LoRALinear
from lit_gpt.model import Block, Linear, Rotations
from lit_gpt.ops import autocast_dtype
from lit_gpt.products import goes_wide
from lit_gpt.quantization import Linear4bit, levels_of
from lit_gpt.surgery import swap


class FewTokensLinear(Linear):
    """A frozen bfloat16 layer that reads its weight as fast as memory allows; more tokens are computed as ever."""

    def __init__(self, plain: Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        if not plain.weight.is_contiguous():
            self.weight = nn.Parameter(plain.weight.contiguous(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n_tokens = x.numel() // self.in_features
        if x.dtype != self.weight.dtype or torch.is_grad_enabled():
            return super().forward(x)
        if n_tokens > 1 and tiles.fits(n_tokens, self.weight.shape):
            y = tiles.product(x.reshape(n_tokens, -1), self.weight)
        elif 0 < n_tokens <= self._most(x) and few_tokens.available():
            y = few_tokens.product(x.reshape(n_tokens, -1), self.weight)
        elif n_tokens == 1:
            y = torch.mv(self.weight, x.flatten())  # for which torch reads faster than for a matrix of one row
        else:
            return super().forward(x)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], self.out_features)

    @staticmethod
    def _most(x: torch.Tensor) -> int:
        return few_tokens.MOST_TOKENS_WIDE if goes_wide(x) else few_tokens.MOST_TOKENS


class FewTokensLinear4bit(nn.Module):
    """A 4-bit layer that multiplies few tokens without making its weight; see `kernels/few_tokens.c`."""

    def __init__(self, layer: Linear4bit):
        super().__init__()
        self.layer = layer
        self.bias = layer.bias
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
        if torch.is_grad_enabled() or dtype != torch.bfloat16 or not 0 < len(flat) <= few_tokens.MOST_TOKENS_4BIT:
            return self.layer(x)
        layer = self.layer
        y = few_tokens.product_4bit(flat.to(dtype), layer.weight, self.scales, self.levels, layer.block)
        return (y if layer.bias is None else y + layer.bias.to(dtype)).view(*x.shape[:-1], layer.out_features)


class DecodeBlock(nn.Module):
    """A block of Llama's kind that takes one cached token of each sequence through all its layers in one call.

    Starting two dozen operators costs as much as reading a small model's weights. All else goes the usual way.
    """

    # In `one_call.Block`'s order. Layers that read the same input have to be of the same kind.
    TOGETHER = (("attn.q", "attn.k", "attn.v"), ("attn.proj",), ("mlp.gate", "mlp.up"), ("mlp.proj",))
    LAYERS = tuple(name for names in TOGETHER for name in names)

    def __init__(self, block: Block):
        super().__init__()
        self.block = block
        config = block.attn.config
        layers = [block.get_submodule(name) for name in self.LAYERS]
        self.factors = [_factors(layer) for layer in layers]
        weights = [_as_c(_base(layer), *factors) for layer, factors in zip(layers, self.factors, strict=True)]
        norms = [norm.data_ptr() for norm in _norms(block)]
        sizes = (config.n_head, config.n_query_groups, config.head_size)
        self.as_c = one_call.Block(*weights, *norms, config.norm_eps, config.scale, *sizes)
        self.tiled = all(tiles.fits(2, (weight.n, weight.k)) for weight in weights)
        is_4bit = any(weight.scales for weight in weights)
        self.most = one_call.MOST_TOKENS if is_4bit or not self.tiled else tiles.MOST_TOKENS

    @staticmethod
    def fits(block: Block) -> bool:
        """Whether the kernel is there, and this block does nothing that it does not know."""
        attention, config = block.attn, block.attn.config
        usual = (config.norm, config.norm_placement, config.norm_offset) == ("rms", "pre", 0)
        usual &= (config.mlp, config.activation, config.residual_scale) == ("gated", "silu", 1)
        usual &= not (config.parallel_residual or config.shared_norm or config.has_experts(attention.layer))
        usual &= max(config.intermediate_size, config.n_head * config.head_size) <= rows.WIDEST
        unchanged = (config.qk_norm, config.clip_qkv, config.attention_softcap, config.window(attention.layer))
        usual &= all(change is None for change in unchanged) and config.rotates(attention.layer)
        if not (usual and one_call.available()):
            return False
        bases = {name: _base(block.get_submodule(name)) for name in DecodeBlock.LAYERS}
        return (
            all(isinstance(base, FewTokensLinear | FewTokensLinear4bit) for base in bases.values())
            and all(len({type(bases[name]) for name in names}) == 1 for names in DecodeBlock.TOGETHER)
            and all(base.bias is None for base in bases.values())
            and all(_plain(norm) for norm in _norms(block))
        )

    def forward(
        self,
        x: torch.Tensor,
        rotations: Rotations,
        layout: Layout,
        cache: KVCache | None,
        where: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if (
            cache is None
            or where is not None
            or x.shape[1] != 1
            or x.dtype != torch.bfloat16
            or torch.is_grad_enabled()
        ):
            return self.block(x, rotations, layout, cache, where)
        heads, groups, size = self.as_c.heads, self.as_c.groups, self.as_c.size
        keys, values = cache.stores(self.block.attn.layer, (groups, size, size), x)
        if len(x) == 1 and cache.capacity <= one_call.LONGEST:
            return one_call.one_token(self.as_c, x, *rotations[False], keys, values, cache.lengths[0])
        if len(x) <= self.most and cache.capacity * heads // groups <= rows.WIDEST:
            return one_call.tokens(self.as_c, x, *rotations[False], keys, values, layout.positions, self.tiled)
        return self.block(x, rotations, layout, cache)


def _norms(block: Block) -> list[nn.Parameter]:
    return [block.get_parameter(f"{name}.weight") for name in ("norm_1", "norm_2")]


def _plain(norm: nn.Parameter) -> bool:
    return norm.dtype == torch.bfloat16 and norm.device.type == "cpu" and norm.is_contiguous()


def _base(layer: Any) -> Any:
    return layer.base if isinstance(layer, LoRALinear) else layer


def _factors(layer: nn.Module) -> tuple[torch.Tensor, ...]:
    """Those of an update as C takes them, if there is one."""
    if not isinstance(layer, LoRALinear):
        return ()
    a, b = layer.lora_A, layer.lora_B * layer.scaling
    missing = -len(a) % one_call.WHOLE
    filled = (nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing)))
    return tuple(factor.detach().to(torch.bfloat16).contiguous() for factor in filled)


def _as_c(base: Any, a: torch.Tensor | None = None, b: torch.Tensor | None = None) -> one_call.Weight:
    update = (0, None, None) if a is None or b is None else (len(a), a.data_ptr(), b.data_ptr())
    if isinstance(base, FewTokensLinear4bit):
        inner, pointers = base.layer, (base.layer.weight, base.scales, base.levels)
        numbers, scales, levels = (ctypes.c_void_p(tensor.data_ptr()) for tensor in pointers)
        return one_call.Weight(inner.out_features, inner.in_features, inner.block, numbers, scales, levels, *update)
    return one_call.Weight(*base.weight.shape, 0, base.weight.data_ptr(), None, None, *update)


def lay_out(model: nn.Module) -> None:
    """Change the model's layers for one-token steps where that is faster; afterwards it can only be run.

    To be called where the model is on a CPU and computes in bfloat16; elsewhere nothing is gained.
    """
    swap(
        model,
        lambda name, module: type(module) is Linear and module.weight.dtype == torch.bfloat16,
        lambda name, module: FewTokensLinear(module),  # type: ignore[arg-type]
    )
    swap(
        model,
        lambda name, module: isinstance(module, Linear4bit) and FewTokensLinear4bit.fits(module),
        lambda name, module: FewTokensLinear4bit(module),  # type: ignore[arg-type]
    )
    swap(
        model,
        lambda name, module: isinstance(module, Block) and DecodeBlock.fits(module),
        lambda name, module: DecodeBlock(module),  # type: ignore[arg-type]
    )
    if not few_tokens.available():
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.pack()
