"""How a family is described: how its HF `config.json` reads and writes, and one table of weight names for both ways."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lit_gpt.config import Activation, Config

HFConfig = dict[str, Any]


@dataclass(frozen=True)
class Transform:
    """How one of their tensors becomes ours (`split`, in the order of the row's names), and back (`join`)."""

    split: Callable[[Config, torch.Tensor], tuple[torch.Tensor, ...]]
    join: Callable[[Config, tuple[torch.Tensor, ...]], torch.Tensor]


PLAIN = Transform(lambda config, tensor: (tensor,), lambda config, tensors: tensors[0])


@dataclass(frozen=True)
class Row:
    """One line of a weight table. `{i}` runs over layers, `{e}` over experts, `{p}` over weight and bias."""

    theirs: str
    ours: str | tuple[str, ...]
    via: Transform = PLAIN

    def expand(self, config: Config) -> Iterator["Step"]:
        """The row for each layer, expert and parameter."""
        ours = (self.ours,) if isinstance(self.ours, str) else self.ours
        layers = range(config.n_layer) if "{i}" in self.theirs else [0]
        experts = range(config.n_expert) if "{e}" in self.theirs else [0]
        leaves = ("weight", "bias") if "{p}" in self.theirs else ("",)
        for i in layers:
            for e in experts:
                for p in leaves:
                    yield Step(
                        self.theirs.format(i=i, e=e, p=p), tuple(o.format(i=i, e=e, p=p) for o in ours), self.via
                    )


@dataclass(frozen=True)
class Step:
    """A row with its numbers filled in."""

    theirs: str
    ours: tuple[str, ...]
    via: Transform = PLAIN


@dataclass(frozen=True)
class Family:
    """Everything that the project knows of a model family."""

    name: str
    model_types: tuple[str, ...]  # HF's `model_type`s that it reads
    read: Callable[[HFConfig], Config]
    write: Callable[[Config], HFConfig]
    rows: tuple[Row, ...]
    dropped: tuple[str, ...] = ()  # patterns of their names that hold nothing to load
    presets: Mapping[str, HFConfig] = field(default_factory=dict)  # repository -> its config.json's telling keys
    base_prefix: str = ""  # begins their names, except in files that were saved without the head

    def steps(self, config: Config, expected: Iterable[str]) -> list[Step]:
        """The steps that fill the `expected` names of ours; names that no row makes are left for the caller to miss."""
        expected = set(expected)
        steps = [step for row in self.rows for step in row.expand(config)]
        return [step for step in steps if expected.intersection(step.ours)]

    def drops(self, theirs: str) -> bool:
        return any(re.search(pattern, theirs) for pattern in self.dropped)


# --- reading config.json ------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
HF_ACTIVATIONS = {"silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
OLD_HF_ACTIVATIONS = {**HF_ACTIVATIONS, "gelu_tanh": "gelu_new"}  # how GPT-2 and Phi spell, and compute, the same


HF_TYPES: dict[tuple[type, ...], str] = {  # what the keys hold that a family does more with than handing them to Config
    (bool,): "alibi attention_bias bias mlp_bias multi_query new_decoder_architecture norm_topk_prob parallel_attn "
    "qk_layernorm scale_attn_by_inverse_layer_idx scale_attn_weights tie_word_embeddings use_parallel_residual "
    "use_qkv_bias use_sliding_window",
    (dict,): "rope_parameters rope_scaling",
    (list,): "layer_types mlp_only_layers no_rope_layers",
    (str,): "activation activation_function hidden_act hidden_activation model_type",
    (int,): "_sliding_window_pattern decoder_sparse_step max_position_embeddings max_window_layers "
    "no_rope_layer_interval num_ln_in_parallel_attn original_max_position_embeddings sliding_window_pattern",
    (int, float): "partial_rotary_factor query_pre_attn_scalar rope_local_base_freq rope_theta rotary_emb_base "
    "rotary_pct",
}


def check_types(hf: HFConfig) -> None:
    """Raises ValueError naming a key that holds something else than it should; null is the same as absent."""
    for types, keys in HF_TYPES.items():
        for key in keys.split():
            value = hf.get(key)
            if value is not None and type(value) not in types:
                wanted = " or ".join(kind.__name__ for kind in types)
                raise ValueError(f"config.json: {key} must be {wanted}, not {type(value).__name__}")


def require(hf: HFConfig, *keys: str) -> Any:
    """The first of `keys` that the config has; ValueError if it has none."""
    for key in keys:
        if hf.get(key) is not None:
            return hf[key]
    raise ValueError(f"config.json has no {' or '.join(keys)}")


def read_activation(hf: HFConfig, *keys: str) -> Activation:
    name = require(hf, *(keys or ("hidden_act",)))
    if name not in ACTIVATIONS:
        raise ValueError(f"config.json: unknown activation {name!r}; known are {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def read_sizes(hf: HFConfig) -> dict[str, Any]:
    """The sizes that nearly every family spells alike."""
    return {
        "name": str(hf.get("_name_or_path") or "").rstrip("/").rsplit("/", 1)[-1],
        "n_layer": require(hf, "num_hidden_layers"),
        "n_head": require(hf, "num_attention_heads"),
        "n_query_groups": hf.get("num_key_value_heads") or require(hf, "num_attention_heads"),
        "n_embd": require(hf, "hidden_size"),
        "head_size": hf.get("head_dim") or 0,
        "intermediate_size": hf.get("intermediate_size") or 0,
        "vocab_size": require(hf, "vocab_size"),
        "block_size": _context(hf),
    }


def _context(hf: HFConfig) -> int:
    """The longest text that the model is for; with dynamic scaling that is `factor` times the stated one."""
    stated: int = require(hf, "max_position_embeddings")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    dynamic = (rope.get("rope_type") or rope.get("type")) == "dynamic"
    return int(stated * rope["factor"]) if dynamic else stated


def read_sliding(
    hf: HFConfig, n_layer: int, *, on: bool, slides: Callable[[int], bool] | None = None
) -> dict[str, Any]:
    """The window and the layers that it holds for: `layer_types` (transformers 5), else `slides`, else Qwen2's rule."""
    window = hf.get("sliding_window") if on else None
    if window is None:
        return {"sliding_window": None, "sliding_layers": None}
    first = hf.get("max_window_layers", 0)
    layers = [kind == "sliding_attention" for kind in hf.get("layer_types") or []]
    layers = layers or [slides(i) if slides else i >= first for i in range(n_layer)]
    return {"sliding_window": window, "sliding_layers": None if all(layers) else layers}


def write_sliding(config: Config) -> HFConfig:
    """The reverse of `read_sliding`."""
    windows = [config.window(layer) for layer in range(config.n_layer)]
    return {
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def write_sizes(config: Config) -> HFConfig:
    """The keys that nearly every family spells alike."""
    scaling = config.rope_scaling or {}
    dynamic = scaling.get("rope_type") == "dynamic"
    stated = scaling["original_max_position_embeddings"] if dynamic else config.block_size
    return {
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_query_groups,
        "head_dim": config.head_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": stated,
        "tie_word_embeddings": config.tie_embeddings,
    }


def read_rope(hf: HFConfig, parameters: HFConfig | None = None, fraction: float = 1.0) -> dict[str, Any]:
    """Base, scaling and share of rotation, from `rope_parameters` (transformers 5) or the older separate keys."""
    rope = dict(parameters or hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    base = rope.pop("rope_theta", None) or hf.get("rope_theta") or hf.get("rotary_emb_base") or 10000.0
    fraction = (
        rope.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or hf.get("rotary_pct") or fraction
    )
    if rope["rope_type"] == "su":  # the first name of longrope
        rope["rope_type"] = "longrope"
    from lit_gpt.rope import SCALINGS

    if rope["rope_type"] not in SCALINGS:
        raise ValueError(f"config.json: unknown rope_type {rope['rope_type']!r}; known are {sorted(SCALINGS)}")
    if rope["rope_type"] != "default" and hf.get("original_max_position_embeddings"):
        rope.setdefault("original_max_position_embeddings", hf["original_max_position_embeddings"])
    if rope["rope_type"] == "dynamic":  # made for longer texts than max_position_embeddings, which is the old context
        rope.setdefault("original_max_position_embeddings", require(hf, "max_position_embeddings"))
    scaling = None if rope["rope_type"] == "default" else rope
    return {"rope_base": float(base), "rope_scaling": scaling, "rotary_percentage": float(fraction)}


def write_rope(config: Config) -> HFConfig:
    """The reverse of `read_rope`, in both spellings, so that older programs read it too."""
    parameters = {"rope_type": "default", "rope_theta": config.rope_base, **(config.rope_scaling or {})}
    if config.rotary_percentage != 1.0:
        parameters["partial_rotary_factor"] = config.rotary_percentage
    return {"rope_theta": config.rope_base, "rope_scaling": config.rope_scaling, "rope_parameters": parameters}


# --- tensor transforms that several families need ------------------------------------------------------------------


def _split_interleaved(config: Config, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows in groups of [queries of the group, one key, one value]; works for weights and biases."""
    per_group = config.n_head // config.n_query_groups
    grouped = tensor.unflatten(0, (config.n_query_groups, per_group + 2, config.head_size))
    return tuple(part.flatten(0, 2) for part in grouped.split((per_group, 1, 1), dim=1))


def _join_interleaved(config: Config, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    parts = [t.unflatten(0, (config.n_query_groups, -1, config.head_size)) for t in tensors]
    return torch.cat(parts, dim=1).flatten(0, 2)


def _split_stacked(config: Config, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All queries, then all keys, then all values."""
    kv = config.n_query_groups * config.head_size
    return tensor.split((config.n_head * config.head_size, kv, kv))


INTERLEAVED_QKV = Transform(_split_interleaved, _join_interleaved)
STACKED_QKV = Transform(_split_stacked, lambda config, tensors: torch.cat(tensors))
HALVES = Transform(lambda config, tensor: tensor.chunk(2), lambda config, tensors: torch.cat(tensors))


def qkv(prefix: str, leaf: str = "{p}") -> tuple[str, ...]:
    """Our three names of a fused query, key and value."""
    return tuple(f"{prefix}.{part}.{leaf}" for part in "qkv")


def rows(*pairs: Sequence[Any]) -> tuple[Row, ...]:
    return tuple(Row(*pair) for pair in pairs)


def without(table: Sequence[Row], *words: str) -> tuple[Row, ...]:
    """The rows whose names, theirs and ours, have none of the words in them."""
    return tuple(row for row in table if not any(word in f"{row.theirs} {row.ours}" for word in words))
