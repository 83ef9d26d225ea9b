"""The memory planner: what a run will hold at its peak, from shapes alone, in seconds and on any machine.

The model's own code runs on tensors that have shapes but no numbers (torch's fake tensors), and every storage is
counted from the operator that makes it to the moment it is freed. So the plan follows the code by itself.
"""

import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_gpt import checkpoint, lora, ops, optimizers, quantization, runtime, surgery
from lit_gpt.cache import KVCache
from lit_gpt.config import PER_LAYER, Config
from lit_gpt.generation import decode_step, prefill
from lit_gpt.kernels import rows
from lit_gpt.lora import LoRASettings
from lit_gpt.model import GPT

PARTS = ("program", "weights", "adapter", "gradients", "optimizer", "cache", "activations", "logits", "workspace")
# What LoRA on a CPU was seen to hold beyond the count (benchmarks/planned_memory.py): libraries grow once they work.
# Full fine-tuning held 0.15 GB more, which is not explained. Where it is torch that asks for what is kept, glibc's heap
# has holes besides, which no later block fits into. Tiny runs hold less: three times what passes.
CPU_REST, CPU_HOLES, CPU_HOLES_OF_PASSING, MOST_CPU_HOLES = 50_000_000, 250_000_000, 0.15, 500_000_000  # a share; bytes
ROUNDING = 512  # bytes: what CUDA's allocator hands out is a multiple
# What 13 settings of a 7B model held beyond the count on an H100, 0.05 to 0.14 GB (benchmarks/gpu.py): cuBLAS asks for
# 32 MiB for each thread that calls it. For recorded steps too (recorded.py): 0.04 GB more, in the one setting measured.
GPU_REST = 70_000_000


class Ledger(TorchDispatchMode):
    """Counts the storages that operators make, by part, and remembers what was there when most was.

    `part` is the part that new storages belong to, unless their shape tells more: logits end in the vocabulary, and a
    second tensor of a weight's shape is a copy of it that lives only while it is used.
    """

    def __init__(self, vocab_size: int = -1) -> None:
        super().__init__()
        self.part = "weights"
        self.vocab_size = vocab_size
        self.weight_shapes: set[tuple[int, ...]] = set()
        self.cache_length = -1
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._known: dict[int, tuple[weakref.ref, str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        return out

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or tensor.is_meta:
            return
        part = self.part
        if part == "activations":
            if tensor.ndim and tensor.shape[-1] == self.vocab_size:
                part = "logits"
            elif tuple(tensor.shape) in self.weight_shapes:
                part = "workspace"
            elif tensor.ndim == 4 and tensor.shape[2] == self.cache_length:
                part = "cache"
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
        self._known[key] = (weakref.ref(storage, lambda _: self._forget(key)), part, size)
        self.now[part] += size
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def _forget(self, key: int) -> None:
        _, part, size = self._known.pop(key)
        self.now[part] -= size

    def is_now(self, tensor: torch.Tensor, part: str) -> None:
        """Count a tensor as another part from here on."""
        key = tensor.untyped_storage()._cdata
        if key in self._known:
            ref, old, size = self._known[key]
            self._known[key] = (ref, part, size)
            self.now[old] -= size
            self.now[part] += size


@dataclass(frozen=True)
class Plan:
    """Bytes at the peak, by part."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def gb(self) -> float:
        """In units of 10^9 bytes."""
        return self.total / 1e9

    def rows(self) -> list[tuple[str, str]]:
        """For `report.table`: each part that takes something, and the total."""
        rows = [(part, f"{size / 1e9:.2f} GB") for part, size in self.parts.items() if size >= 5e6]
        return [("part", "at the peak"), *rows, ("total", f"{self.gb:.2f} GB")]


@dataclass(frozen=True)
class Setting:
    """All that the memory of a run depends on, besides the architecture. `lora` None: every weight trains."""

    precision: runtime.Precision
    quantize: str | None = None
    lora: LoRASettings | None = field(default_factory=LoRASettings)
    rows: tuple[int, ...] = (1024,) * 4  # tokens of each row of the largest micro-batch
    activation_checkpointing: bool = False
    optimizer: str = "adamw"
    device: str = "cuda"  # or "cpu", where the program itself counts too
    n_skipped: int = 0  # numbers of linear layers that are in full, though `quantize` is of their kind

    def __post_init__(self) -> None:
        if max(self.rows, default=0) < 2:
            raise ValueError("there is nothing to plan: the micro-batch size must be at least 1, the length 2")


@contextmanager
def _counted(config: Config, setting: Setting, dtype: torch.dtype) -> Iterator[tuple[GPT, Ledger]]:
    """The model as `checkpoint.load_model` makes it, with memory but without numbers, and the ledger that counts it.

    Its weights are in `dtype`, those of the norms in what is trained in.
    """
    model, kind = checkpoint.hollow(config), setting.quantize
    checkpoint.check_kind(config, kind, config.name)
    if kind:
        surgery.swap(
            model,
            lambda name, module: quantization.quantizable(name, module, kind),
            lambda name, linear: quantization.empty(linear.in_features, linear.out_features, kind),  # type: ignore
        )
    metas, ledger = checkpoint.parameter_metas(model), Ledger(config.vocab_size)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    ledger.weight_shapes = {(linear.out_features, linear.in_features) for linear in linears}
    with ops.as_on(setting.device), FakeTensorMode(), ledger:
        for name, meta in metas.items():
            checkpoint.place(model, name, torch.empty(meta.shape), dtype, setting.precision.trained, "cpu")
        for linear in linears:
            if isinstance(linear, quantization.QuantizedLinear):
                for leaf, (shape, kept) in linear.layout().items():
                    linear.load(leaf, torch.empty(shape, dtype=kept))
        model.tie()
        ledger.peak.clear()
        yield model, ledger


def _dtype_in_training(setting: Setting) -> torch.dtype:
    """That of the weights which are not quantized; finetune/full.py trains them."""
    return setting.precision.trained if setting.lora is None else setting.precision.frozen


SHALLOW, DEEPER = 2, 3  # layers


def _shallow(config: Config, n_layer: int) -> Config:
    """A config whose layers are all alike, with fewer of them."""
    fewer = {name: layers[:n_layer] for name in PER_LAYER if (layers := getattr(config, name))}
    return replace(config, n_layer=n_layer, **fewer)


def _by_depth(count: Callable[[Config, Setting], list[Counter[str]]], config: Config, setting: Setting) -> Plan:
    """The plan of two shallow models, drawn out to the whole depth: what a layer adds is the same for each.

    `count` gives the peak of each phase. A deep model's may be in another phase than a shallow one's.
    """
    if config.n_layer <= DEEPER or any(len(set(getattr(config, name) or [0])) > 1 for name in PER_LAYER):
        phases = count(config, setting)
    else:
        small, large = (count(_shallow(config, n), setting) for n in (SHALLOW, DEEPER))
        more = config.n_layer - DEEPER
        phases = [
            Counter({part: size + more * (size - less[part]) for part, size in much.items()})
            for less, much in zip(small, large, strict=True)
        ]
    found = max(phases, key=Counter.total)
    found["weights"] += _more_for_skipped(setting)
    if setting.device == "cpu":
        passing = sum(found.get(part, 0) for part in ("activations", "logits", "workspace"))
        found["program"] = runtime.resident_bytes() + min(3 * passing, _cpu_rest(config, passing))
    else:
        found["workspace"] = found.get("workspace", 0) + GPU_REST
    return Plan({part: found[part] for part in PARTS if found.get(part)})


def _more_for_skipped(setting: Setting) -> int:
    """Bytes that layers in full take more than they would in few bits."""
    if not setting.quantize or not setting.n_skipped:
        return 0
    in_few = quantization.empty(quantization.BLOCK, setting.n_skipped // quantization.BLOCK, setting.quantize)
    few = sum(prod(shape) * dtype.itemsize for shape, dtype in in_few.layout().values())
    return setting.n_skipped * setting.precision.frozen.itemsize - few


def _cpu_rest(config: Config, passing: int) -> int:
    """What comes on top on a CPU: little, where the bodies in C make all that a step keeps."""
    if rows.available() and (config.norm, config.mlp, config.activation) == ("rms", "gated", "silu"):
        return CPU_REST
    return min(CPU_HOLES + int(CPU_HOLES_OF_PASSING * passing), MOST_CPU_HOLES)


def plan_training(config: Config, setting: Setting) -> Plan:
    """The peak of a training step on micro-batches of the longest rows, once the optimizer has its state.

    Raises ValueError for weights in few bits without LoRA.
    """
    if setting.quantize and setting.lora is None:
        raise ValueError(f"weights in {setting.quantize} cannot be trained: plan LoRA, or leave out --quantize")
    return _by_depth(_training, config, setting)


def plan_inference(config: Config, setting: Setting, new_tokens: int = 100) -> Plan:
    """The peak of answering one prompt of as many tokens as the longest row with `new_tokens` more."""
    return _by_depth(partial(_inference, new_tokens=new_tokens), config, setting)


def _training(config: Config, setting: Setting) -> list[Counter[str]]:
    """Of the way forward, with the head and its gradient, and of the way back; not of the optimizer's step."""
    with _counted(config, setting, _dtype_in_training(setting)) as (model, ledger):
        ledger.part = "adapter"
        if setting.lora is None:
            model.requires_grad_(True)
        else:
            lora.attach(model, setting.lora)
        if setting.activation_checkpointing:
            runtime.checkpoint_activations(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ledger.part = "optimizer"
        state = [torch.empty(optimizers.state_bytes(setting.optimizer, p), dtype=torch.uint8) for p in trained]
        ledger.part = "gradients"  # those of the micro-batches before
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        ledger.part = "activations"
        lengths = tuple(n - 1 for n in setting.rows)  # the last token is only a label
        tokens, where = torch.zeros(1, sum(lengths), dtype=torch.long), torch.arange(sum(lengths))
        model.train()
        with runtime.autocast(setting.precision, "cpu"):
            loss = model(tokens, labels=tokens, where=where, lengths=lengths)
            forward = ledger.peak.copy()
            ledger.peak.clear()
            loss.backward()
        del state
        return [forward, ledger.peak]


@torch.no_grad()
def _inference(config: Config, setting: Setting, new_tokens: int) -> list[Counter[str]]:
    with _counted(config, setting, setting.precision.frozen) as (model, ledger):
        model.eval()
        ledger.part = "adapter"
        if setting.lora is not None:
            lora.attach(model, setting.lora)
        prompt = [0] * min(max(setting.rows), config.block_size - new_tokens)
        cache = KVCache(config.n_layer, 1, len(prompt) + new_tokens)
        ledger.part, ledger.cache_length = "activations", cache.capacity
        with runtime.autocast(setting.precision, "cpu"):
            prefill(model, [prompt], cache, torch.device("cpu"))
            decode_step(model, torch.zeros(1, 1, dtype=torch.long), cache)
        return [ledger.peak]


def remedies(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Flags that lower the peak and the settings they give, each on top of those before, the cheapest first."""
    while len(setting.rows) > 1:
        setting = replace(setting, rows=setting.rows[: len(setting.rows) // 2])
        yield "--train.micro_batch_size", setting
    if not setting.activation_checkpointing:
        setting = replace(setting, activation_checkpointing=True)
        yield "--activation_checkpointing", setting
    if setting.lora is None and setting.optimizer in ("adamw", "adamw-paged"):
        setting = replace(setting, optimizer="adamw-8bit")
        yield "--optimizer", setting
    smaller = runtime.PRECISIONS["bf16-true" if setting.lora is None else "bf16-mixed"]
    if _dtype_in_training(setting).itemsize > smaller.frozen.itemsize:
        setting = replace(setting, precision=smaller)
        yield "--precision", setting
    if setting.lora is not None and not setting.quantize:
        setting = replace(setting, quantize="bnb.nf4")
        yield "--quantize", setting
    while setting.rows[0] > 256:
        setting = replace(setting, rows=(max(setting.rows[0] // 2, 256),))
        yield "--train.max_seq_length", setting


VALUES = {  # flag -> its value in a setting
    "--train.micro_batch_size": lambda s: len(s.rows),
    "--activation_checkpointing": lambda s: str(s.activation_checkpointing).lower(),
    "--optimizer": lambda s: s.optimizer,
    "--precision": lambda s: s.precision.name,
    "--quantize": lambda s: s.quantize,
    "--train.max_seq_length": lambda s: max(s.rows),
}


def advice(config: Config, setting: Setting, limit: float) -> str:
    """The flags with which training fits `limit` bytes, and what it then takes; or that nothing helps."""
    flags: dict[str, Any] = {}
    for flag, tried in remedies(setting):
        flags[flag] = VALUES[flag](tried)
        if (plan := plan_training(config, tried)).total <= limit:
            return f"{' '.join(f'{name} {value}' for name, value in flags.items())} would take {plan.gb:.2f} GB"
    instead = "train an adapter with finetune/lora.py, or " if setting.lora is None else ""
    return f"nothing fits {limit / 1e9:.2f} GB; {instead}take a smaller model"


def parse_size(text: str) -> float:
    """Bytes of a size such as `24GB`, `24 GiB` or `800MB`. Raises ValueError for anything else."""
    units = {"GB": 1e9, "GIB": 2**30, "MB": 1e6, "MIB": 2**20}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MG]i?B)\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"--memory_limit must be a size such as 24GB, not {text!r}")
    return float(match[1]) * units[match[2].upper()]
