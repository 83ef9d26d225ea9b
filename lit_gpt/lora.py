"""LoRA (Hu et al. 2021, arXiv:2106.09685): which layers get factors, the layer, and how it is taken off again."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lit_gpt import ops, products
from lit_gpt.kernels import lora as fused
from lit_gpt.quantization import QuantizedLinear
from lit_gpt.surgery import swap

TARGETS = {  # flag -> the names of the layers that it means
    "query": r"\.attn\.q$",
    "key": r"\.attn\.k$",
    "value": r"\.attn\.v$",
    "projection": r"\.attn\.proj$",
    "mlp": r"\.mlp\.(experts\.\d+\.)?(gate|up|fc|proj)$",
    "head": r"^lm_head$",
}


@dataclass(frozen=True)
class LoRASettings:
    """What an adapter is made of; stored inside it, so that no later script has to ask.

    `targets` are keys of `TARGETS`. The update is alpha / r * B A x.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("query", "value")

    def __post_init__(self) -> None:
        for name, kind in (("r", int), ("alpha", (int, float)), ("dropout", (int, float)), ("targets", (list, tuple))):
            if not isinstance(value := getattr(self, name), kind) or isinstance(value, bool):
                raise ValueError(f"LoRA's {name} cannot be of the type {type(value).__name__}")
        object.__setattr__(self, "targets", tuple(self.targets))  # a file gives a list
        if self.r < 1:
            raise ValueError(f"--lora_r must be at least 1, not {self.r}")
        if not abs(self.alpha) < 1e9:  # catches NaN too
            raise ValueError(f"--lora_alpha must be a number, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--lora_dropout must lie in [0, 1), not {self.dropout}")
        if not self.targets or (unknown := set(self.targets) - set(TARGETS)):
            given = f"not {sorted(unknown)}" if self.targets else "and none is on"
            raise ValueError(f"LoRA needs targets out of {', '.join(TARGETS)}, {given}")

    @classmethod
    def from_flags(cls, r: int, alpha: float, dropout: float, **targets: bool) -> "LoRASettings":
        """From one boolean per target, as the command line has them."""
        return cls(r, alpha, dropout, tuple(name for name, on in targets.items() if on))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "targets": list(self.targets)}


class LoRALinear(nn.Module):
    """A linear layer, of whatever kind, plus a low-rank update; only the factors train.

    The factors are bare parameters, so that no pass over linear layers takes them for one. They are float32 whatever
    the base is, and rounded to the input's precision when used.
    """

    def __init__(self, base: nn.Linear, settings: LoRASettings):
        super().__init__()
        device = base.weight.device
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(settings.r, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, settings.r, dtype=torch.float32, device=device))
        self.scaling, self.dropout = settings.alpha / settings.r, settings.dropout
        if device.type != "meta":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen, a, b = x.to(ops.autocast_dtype(x)), self.lora_A, self.lora_B
        how = self.scaling, self.dropout if self.training else 0.0
        if ops.in_c(seen) and fused.fits(seen, a, b):
            return _FusedLayer.apply(self.base, seen, a, b, *how, getattr(seen, "normed", None))
        return _Update.apply(self.base(x), seen, a, b, *how)

    def merged(self) -> nn.Linear:
        """The plain layer with the update in its weight, in the base's precision. ValueError for a quantized base."""
        if isinstance(self.base, QuantizedLinear):
            raise ValueError(
                "a quantized layer cannot take the update in; scripts/merge_lora.py merges into full weights"
            )
        weight = merged_weight(self.base.weight.detach(), self.lora_A.detach(), self.lora_B.detach(), self.scaling)
        self.base.weight = nn.Parameter(weight, requires_grad=False)
        return self.base


class _Update(torch.autograd.Function):
    """y + scaling * B A dropout(x), put into y itself; of y nothing is kept, and x once for all layers that read it.

    y (..., out), x (..., in) in y's precision, to which the float32 factors are rounded when used.
    """

    @staticmethod
    def forward(ctx, y, x, a, b, scaling, p):
        drawn = ops.draw_dropout(x, p) if p else None
        a_used, b_used = (products.widened(factor.to(x.dtype)) for factor in (a / (1 - p), b * scaling))
        seen = x if drawn is None else ops.dropped(x, drawn, p)
        with products.as_they_are(x):
            low = F.linear(products.widened(seen.flatten(0, -2)), a_used)  # (n, r)
            flat, shape, wide = y.flatten(0, -2), y.shape, low.dtype != y.dtype
            if torch.compiler.is_compiling():  # it decides itself what to write over, and fails for layers with a bias
                y = (flat + low @ b_used.t()).to(y.dtype) if wide else torch.addmm(flat, low, b_used.t())
                y = y.view(shape)
            else:
                total = products.widened(flat).addmm_(low, b_used.t())  # y itself, unless that is narrower
                if wide:
                    flat.copy_(total)
                ctx.mark_dirty(y)
        ctx.save_for_backward(x, drawn, low, a_used, b_used)
        ctx.scaling, ctx.p = scaling, p
        return y

    @staticmethod
    def backward(ctx, grad):
        x, drawn, low, a_used, b_used = ctx.saved_tensors
        flat, d_x = products.widened(grad.flatten(0, -2)), None
        seen = x if drawn is None else ops.dropped(x, drawn, ctx.p)
        with products.as_they_are(x):
            d_low = flat @ b_used
            d_b = (flat.t() @ low).float().mul_(ctx.scaling)
            d_a = (d_low.t() @ products.widened(seen.flatten(0, -2))).float().div_(1 - ctx.p)
            if ctx.needs_input_grad[1]:
                # A float32 product lies in memory that is found again once it is freed.
                d_x = d_low @ a_used if d_low.dtype == x.dtype else products.linear_backward(d_low, a_used)
                d_x = products.copied(d_x, x.dtype).view(x.shape)
                d_x = d_x if drawn is None else ops.dropped(d_x, drawn, ctx.p, inplace=True)
        return grad, d_x, d_a, d_b, None, None


class _FusedLayer(torch.autograd.Function):
    """The frozen layer and, in one pass over memory each way, its update; a `normed` x is made again where needed.

    The update's gradient of x is added to the layer's where it is made, rather than by autograd.
    """

    @staticmethod
    def forward(ctx, base, x, a, b, scaling, p, normed):
        y = base(x)
        drawn = ops.draw_dropout(x, p) if p else None
        low = fused.update(y, x, a, b, drawn, scaling, p)
        ctx.save_for_backward(*(normed or (x, None, None)), a, b, drawn, low)
        ctx.base, ctx.how = base, (scaling, p)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        base, d_x = ctx.base, None
        if ctx.needs_input_grad[1]:
            quantized = isinstance(base, QuantizedLinear)
            d_x = products.linear_backward(grad, (base.dense if quantized else base.weight.to)(grad.dtype))
        gradients = fused.update_backward(grad, *ctx.saved_tensors, *ctx.how, d_x=d_x)
        return None, d_x, *gradients, None, None, None


def merged_weight(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """weight (out, in) + scaling * b (out, r) a (r, in): added in float32, rounded once to the weight's precision."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling).to(weight.dtype)


def targeted(model: nn.Module, settings: LoRASettings) -> dict[str, nn.Linear]:
    """The layers that get factors, by name. Raises ValueError for a target that this model has no layer of."""
    for target in settings.targets:
        if not any(re.search(TARGETS[target], name) for name, _ in model.named_modules()):
            raise ValueError(f"this model has no layer for the LoRA target {target!r}")
    pattern = "|".join(TARGETS[target] for target in settings.targets)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(pattern, name)
    }


def attach(model: nn.Module, settings: LoRASettings) -> list[str]:
    """Freeze the model and give each targeted layer factors; returns the layers' names. ValueError as `targeted`."""
    chosen = targeted(model, settings)
    model.requires_grad_(False)
    return swap(
        model,
        lambda name, module: name in chosen,
        lambda name, module: LoRALinear(module, settings),  # type: ignore[arg-type]
    )


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The factors, by name, detached from the model."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if name.endswith((".lora_A", ".lora_B"))
    }


def check_factors(state: dict[str, torch.Tensor], settings: LoRASettings, where: object) -> None:
    """Raises ValueError for anything in `state` that is no factor of the rank that the settings tell."""
    for name, factor in state.items():
        axis = {"lora_A": 0, "lora_B": 1}.get(str(name).rsplit(".", 1)[-1])
        if axis is None or not isinstance(factor, torch.Tensor) or factor.ndim != 2 or factor.shape[axis] != settings.r:
            raise ValueError(f"{where}: {name} is no factor of rank {settings.r}")
        if not factor.is_floating_point():
            raise ValueError(f"{where}: {name} is of the type {factor.dtype}")


def check_fit(model: nn.Module, settings: LoRASettings, state: dict[str, torch.Tensor], where: object) -> None:
    """Raises ValueError naming what of an adapter's state does not fit a model that has no factors yet."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, layer in targeted(model, settings).items():
        expected[f"{name}.lora_A"] = (settings.r, layer.in_features)
        expected[f"{name}.lora_B"] = (layer.out_features, settings.r)
    _compare(expected, state, where)


def load_adapter_state(model: nn.Module, state: dict[str, torch.Tensor], where: object) -> None:
    """Put factors into a model that has been attached to. Raises ValueError naming what does not fit."""
    factors = {name: p for name, p in model.named_parameters() if name.endswith((".lora_A", ".lora_B"))}
    _compare({name: factor.shape for name, factor in factors.items()}, state, where)
    with torch.no_grad():
        for name, factor in factors.items():
            if factor.is_meta:  # of a model that gets its weights when it runs
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, nn.Parameter(state[name].float()))
            else:
                factor.copy_(state[name])


def _compare(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, torch.Tensor], where: object) -> None:
    problems = [f"missing {name}" for name in sorted(set(expected) - set(state))]
    problems += [f"unexpected {name}" for name in sorted(set(state) - set(expected))]
    problems += [
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in sorted(expected.items())
        if name in state and state[name].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(f"{where} does not fit this model: {', '.join(problems[:6])}{more}")


def merge(model: nn.Module) -> list[str]:
    """Fold every update into its layer: the state dict has the base's names again. Returns the layers' names.

    A tied head that was adapted gets a weight of its own, and the config says so.
    """
    head = getattr(model, "lm_head", None)
    if isinstance(head, LoRALinear):
        model.config.tie_embeddings = False  # type: ignore[union-attr]
    return swap(model, lambda name, module: isinstance(module, LoRALinear), lambda name, module: module.merged())  # type: ignore[operator]
