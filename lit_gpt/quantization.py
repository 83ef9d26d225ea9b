"""Linear layers that keep their weight in 4 or 8 bits and compute in the precision of their input.

4-bit: blocks of 64 numbers share a scale and each becomes one of 16 levels (QLoRA, arXiv:2305.14314, section 3; `-dq`
also stores the scales in 8 bits). 8-bit: each row shares a scale. Only a frozen weight can be kept so; a LoRA update
beside it trains. bitsandbytes gives the levels and the kernels; where one is wrong for a shape, plain torch is used.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from lit_gpt import products
from lit_gpt.kernels import four_bits

BLOCK = four_bits.BLOCK  # numbers that share a scale
NESTED_BLOCK = 256  # scales that share a scale, with -dq
KINDS = ("bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8")
SYNONYMS = {"bnb.int8-training": "bnb.int8"}
HEAD = "+head"  # may end a kind: the output head too


def resolve(kind: str | None) -> str | None:
    """The kind's own name. Raises ValueError that lists the kinds, or says how to install bitsandbytes."""
    if kind is None:
        return None
    base = SYNONYMS.get(kind.removesuffix(HEAD), kind.removesuffix(HEAD))
    if base not in KINDS:
        known = ", ".join((*KINDS, *SYNONYMS))
        raise ValueError(f"unknown --quantize {kind!r}; known are {known}, each with {HEAD} for the output head too")
    import_bitsandbytes("--quantize")
    return base + HEAD if kind.endswith(HEAD) else base


@cache
def import_bitsandbytes(asked_by: str = "this") -> Any:
    """The library. Raises ValueError that says what needs it, and how to install it."""
    # It warns of an optional package that it would download code with.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"{asked_by} needs bitsandbytes: pip install 'lit-gpt[quantize]' ({error})") from error
    return bitsandbytes


def quantizable(name: str, module: nn.Module, kind: str = "") -> bool:
    """Plain linear layers, but not the router of a mixture of experts, whose choices are delicate.

    The head, whose errors nothing after it evens out, only if the kind says so.
    """
    named = (name != "lm_head" or kind.endswith(HEAD)) and not name.endswith("router")
    return isinstance(module, nn.Linear) and not isinstance(module, QuantizedLinear) and named


def quantize(weight: torch.Tensor, kind: str) -> "QuantizedLinear":
    """A layer that holds `weight` (out, in) quantized, on the weight's device; its bias, if any, is set later."""
    layer = empty(weight.shape[1], weight.shape[0], kind)
    layer.fill(weight)
    return layer


def empty(in_features: int, out_features: int, kind: str) -> "QuantizedLinear":
    """A layer without numbers, for `load`."""
    kind = kind.removesuffix(HEAD)
    made: QuantizedLinear = (Linear8bit if kind == "bnb.int8" else Linear4bit)(in_features, out_features, kind)
    return made


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight exists in full only while it is used."""

    def __init__(self, in_features: int, out_features: int, kind: str):
        nn.Module.__init__(self)  # not nn.Linear's: there is no full weight to allocate
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        self.register_parameter("bias", None)

    def fill(self, weight: torch.Tensor) -> None:
        """Quantize `weight` (out, in) into this layer."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (out, in) as it computes."""
        raise NotImplementedError

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each part but the bias."""
        raise NotImplementedError

    def at(self, index: torch.Tensor) -> torch.Tensor:
        """The weight's numbers at these positions of its flat order, float32."""
        return self.dense(torch.float32).flatten()[index]

    def parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What has to be stored of it."""
        yield from self.state_dict().items()

    def load(self, leaf: str, tensor: torch.Tensor) -> None:
        """Take back one of the `parts`."""
        if leaf in ("weight", "bias"):
            setattr(self, leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_buffer(leaf, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if mixed else x.dtype
        y: torch.Tensor = _FrozenMatmul.apply(x, self, dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


class _FrozenMatmul(torch.autograd.Function):
    """x W^T; the backward pass makes W again, and needs nothing else."""

    @staticmethod
    def forward(ctx, x, layer, dtype):
        ctx.layer, ctx.dtypes = layer, (x.dtype, dtype)
        return products.linear(x.to(dtype), layer.dense(dtype))

    @staticmethod
    def backward(ctx, grad):
        x_dtype, dtype = ctx.dtypes
        return products.linear_backward(grad.to(dtype), ctx.layer.dense(dtype)).to(x_dtype), None, None


class Linear8bit(QuantizedLinear):
    """Each row is whole numbers from -127 to 127 times a scale."""

    def fill(self, weight: torch.Tensor) -> None:
        codes = torch.empty_like(weight, dtype=torch.int8)
        scales = weight.new_empty(len(weight), 1, dtype=torch.float32)
        # On a CPU some rows at a time, which stay in the cache.
        at_once = len(weight) if weight.is_cuda else max(1, products.WIDENED // weight.shape[1])
        for rows, code, scale in zip(*(x.split(at_once) for x in (weight, codes, scales)), strict=True):
            wide = rows.to(torch.float32, copy=True)
            scale.copy_(wide.abs().amax(dim=1, keepdim=True).clamp_(min=1e-38) / 127)
            code.copy_(wide.div_(scale).round_())
        self.load("weight", codes)
        self.load("scale", scales)

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = self.out_features, self.in_features
        return {"weight": ((n, k), torch.int8), "scale": ((n, 1), torch.float32)}

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype) * self.get_buffer("scale").to(dtype)


class Linear4bit(QuantizedLinear):
    """Two numbers to a byte, as bitsandbytes lays them out: the first in the high half."""

    code: torch.Tensor  # the levels, and those of the scales with -dq
    nested_code: torch.Tensor

    def __init__(self, in_features: int, out_features: int, kind: str):
        super().__init__(in_features, out_features, kind)
        self.levels, self.block = kind.removeprefix("bnb.").removesuffix("-dq"), BLOCK
        self.level_values = _levels(self.levels), _nested_levels() if kind.endswith("-dq") else ()
        self.packed: tuple[torch.Tensor, torch.Tensor] | None = None  # for one-token decoding, see `pack`

    def fill(self, weight: torch.Tensor) -> None:
        codes, absmax = quantize_4bit(weight, self.levels)
        self.load("weight", codes)
        if not self.kind.endswith("-dq"):
            self.load("absmax", absmax)
            return
        offset = absmax.mean()
        small, state = import_bitsandbytes().functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        for leaf, tensor in (("absmax", small), ("nested_absmax", state.absmax), ("offset", offset)):
            self.load(leaf, tensor)

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n = self.out_features * self.in_features
        n_blocks = -(-n // BLOCK)
        codes = {"weight": ((-(-n // 2), 1), torch.uint8)}
        if not self.kind.endswith("-dq"):
            return {**codes, "absmax": ((n_blocks,), torch.float32)}
        nested = {"nested_absmax": ((-(-n_blocks // NESTED_BLOCK),), torch.float32), "offset": ((), torch.float32)}
        return {**codes, "absmax": ((n_blocks,), torch.uint8), **nested}

    def scales(self) -> torch.Tensor:
        """The scale of each block, float32."""
        stored = self._buffers["absmax"]
        assert stored is not None
        if not self.kind.endswith("-dq"):
            return stored
        nested, operator = self.get_buffer("nested_absmax"), torch.ops.bitsandbytes.dequantize_blockwise.default
        absmax = operator(stored, nested, self.nested_code, NESTED_BLOCK, torch.float32)
        return absmax + self.get_buffer("offset")

    def load(self, leaf: str, tensor: torch.Tensor) -> None:
        """See above. The levels come to where the scales are, once: sending them takes longer than using them."""
        super().load(leaf, tensor)
        if leaf == "absmax":
            for name, values in zip(("code", "nested_code"), self.level_values, strict=True):
                self.register_buffer(name, torch.tensor(values, device=tensor.device), persistent=False)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype == torch.float64:  # no kernel makes it
            return self.dense(torch.float32).to(dtype)
        shape = (self.out_features, self.in_features)
        if four_bits.makes(self.weight, dtype):
            return four_bits.dense(self.weight.detach(), self.code, self.scales(), self.block, shape, dtype)
        # The CPU kernel begins a new block with each row, which is wrong unless rows are whole blocks.
        if self.weight.is_cuda or self.in_features % self.block == 0:
            import_bitsandbytes()
            operator = torch.ops.bitsandbytes.dequantize_4bit.default
            return operator(self.weight, self.scales(), self.block, self.levels, shape, dtype).view(shape)
        pairs = self.weight.flatten()
        codes = torch.stack((pairs >> 4, pairs & 15), dim=1).flatten()[: shape[0] * shape[1]].long()
        scales = self.scales().repeat_interleave(self.block)[: len(codes)]
        return (levels_of(self.levels, pairs.device)[codes] * scales).view(shape).to(dtype)

    def is_of(self, kind: str) -> bool:
        """Whether `quantize` makes layers like this one of that kind."""
        return self.kind == kind.removesuffix(HEAD) and self.block == BLOCK

    def at(self, index: torch.Tensor) -> torch.Tensor:
        """See above; the others stay packed."""
        pair = self.weight.flatten()[index // 2]
        code = torch.where(index % 2 == 0, pair >> 4, pair & 15).long()
        return levels_of(self.levels, pair.device)[code] * self.scales()[index // self.block]

    def split(self, cut: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> list["Linear4bit"]:
        """Layers of the groups of rows that `cut` makes of a tensor (out, ...), their numbers unchanged.

        Rows must be whole blocks. Scales come out of double quantization: those of a row are no whole block of it.
        """
        codes, scales = (cut(tensor.view(self.out_features, -1)) for tensor in (self.weight.detach(), self.scales()))
        made = [Linear4bit(self.in_features, len(rows), f"bnb.{self.levels}") for rows in codes]
        for layer, rows, absmax in zip(made, codes, scales, strict=True):
            layer.block = self.block
            layer.load("weight", rows.reshape(-1, 1))
            layer.load("absmax", absmax.flatten())
        return made

    def pack(self) -> bool:
        """Lay the weight out for the CPU's one-token kernel instead; tells whether that is possible.

        For processes that only generate: a packed layer has no gradient and cannot be stored.
        """
        functional = import_bitsandbytes().functional
        n, k = self.out_features, self.in_features
        if self.weight.is_cuda or n % 32 or k % self.block or not functional.has_avx512bf16():
            return False
        absmax = self.scales().view(n, k // self.block).t().to(torch.bfloat16).contiguous()
        self.packed = (pack_rows(self.weight.view(n, k // 2)), absmax)
        self.weight = nn.Parameter(self.packed[0], requires_grad=False)
        for leaf in self.layout().keys() - {"weight"}:
            delattr(self, leaf)
        return True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            return self._without_weight(x, *self.packed)
        one = x.is_cuda and x.numel() == self.in_features and not torch.is_grad_enabled()
        if one and self.in_features % self.block == 0 and x.dtype != torch.float64:
            return self._without_weight(x, self.weight, self.scales())
        return super().forward(x)

    def _without_weight(self, x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        """By the kernel that reads the codes themselves; it rounds a number's level and scale before they meet."""
        mixed = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if mixed else x.dtype
        shape, operator = [self.out_features, self.in_features], torch.ops.bitsandbytes.gemv_4bit.default
        y = operator(x.to(dtype).contiguous(), codes, shape, absmax, self.code, self.block)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@cache
def _levels(name: str) -> tuple[float, ...]:
    """Those of `levels_of` as numbers."""
    levels: list[float] = levels_of(name).tolist()
    return tuple(levels)


@cache
def _nested_levels() -> tuple[float, ...]:
    """The 256 levels that the scales of a double-quantized weight take."""
    levels: list[float] = import_bitsandbytes().functional.create_dynamic_map().tolist()
    return tuple(levels)


def pack_rows(codes: torch.Tensor) -> torch.Tensor:
    """Codes (n, k / 2), two columns to a byte, in the order of the one-token kernel: row r by row r + 16.

    Of 32 rows, a column's codes lie together, columns in pairs; a byte holds rows r (low half) and r + 16 (high half).
    The same as bitsandbytes' `_convert_weight_packed_for_cpu`, without its eightfold copy.
    """
    n, half_k = codes.shape
    rows = codes.view(n // 32, 2, 16, half_k)
    even, odd = rows >> 4, rows & 15
    pairs = [(part[:, 1] << 4) | part[:, 0] for part in (even, odd)]  # (n / 32, 16, k / 2) each
    return torch.stack(pairs, dim=-1).transpose(1, 2).reshape(n, half_k).contiguous()


def levels_of(name: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """The 16 levels of `nf4` or `fp4`, float32."""
    levels: torch.Tensor = import_bitsandbytes().functional.get_4bit_type(name, device=device)
    return levels


def quantize_4bit(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (n / 2, 1) uint8 and the block scales (n / 64,) of a weight, bit for bit as bitsandbytes makes them.

    On the CPU theirs takes two minutes for 7 billion numbers. Counting the bounds below each number takes seconds in C,
    and a fifth of that here, a cache-sized piece at a time.
    """
    if weight.is_cuda or weight.numel() % BLOCK:
        import_bitsandbytes()
        operator = torch.ops.bitsandbytes.quantize_4bit.default
        codes, absmax = operator(weight.contiguous(), BLOCK, name, torch.uint8)
        return codes, absmax
    levels = levels_of(name)
    order = torch.argsort(levels)
    between = (levels[order[:-1]] + levels[order[1:]]) / 2
    if four_bits.fits(weight):
        codes, absmax = four_bits.quantized(weight, between, order)
        return codes[:, None], absmax
    bounds = between.tolist()
    blocks = weight.reshape(-1, BLOCK)
    absmax = torch.empty(len(blocks), dtype=torch.float32)
    codes = torch.empty(weight.numel() // 2, dtype=torch.uint8)
    at_once = (1 << 18) // BLOCK
    for start in range(0, len(blocks), at_once):
        piece = blocks[start : start + at_once].float()
        peak = piece.abs().amax(dim=1)
        absmax[start : start + at_once] = peak
        scaled = (piece * (1.0 / peak.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
        index = torch.zeros(scaled.shape, dtype=torch.uint8)
        for bound in bounds:
            index += scaled > bound
        index = index if name == "nf4" else order.to(torch.uint8)[index.long()]
        flat = index.view(-1)
        codes[start * BLOCK // 2 : start * BLOCK // 2 + len(flat) // 2] = (flat[::2] << 4) | flat[1::2]
    return codes[:, None], absmax
