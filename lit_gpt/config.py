"""An architecture as data. Every family is one `Config`; `lit_config.json` is its fields, one for one."""

import dataclasses
import reprlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lit_gpt import files

Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]
RANGES = {  # far beyond any model that there is; a larger number is a mistake, or meant to take all memory
    "n_layer": (1, 1000),
    "n_head": (1, 4096),
    "n_query_groups": (1, 4096),
    "n_embd": (1, 2**20),
    "head_size": (1, 2**16),
    "intermediate_size": (1, 2**22),
    "expert_size": (1, 2**22),
    "vocab_size": (1, 2**24),
    "block_size": (1, 2**31),
    "norm_eps": (0, 1),
    "rope_base": (2, 1e15),
    "rope_local_base": (2, 1e15),
    "sliding_window": (1, 2**31),
    "n_expert": (0, 1024),
    "n_expert_per_token": (0, 1024),
}
ROPE_NEEDS: dict[str, tuple[str, ...]] = {  # `rope_type` -> the keys that rope.SCALINGS reads of it without a default
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (),
    "longrope": ("long_factor", "short_factor", "original_max_position_embeddings"),
}
ROPE_LISTS = ("long_factor", "short_factor")  # a number for each pair that is rotated
ROPE_KEYS = {key for keys in ROPE_NEEDS.values() for key in keys} | {  # all that is read as numbers
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}


PER_LAYER = ("rope_layers", "sliding_layers", "moe_layers")  # a list of the layers, or None: all are alike


@dataclass
class Config:
    """Sizes and switches of a decoder-only transformer; the defaults are Llama's kind of block.

    Fields that hold one entry per layer are lists; `None` means "the same, or none, everywhere".
    """

    name: str = ""
    family: str = "llama"  # the file in families/ that reads and writes it

    n_layer: int = 16
    n_head: int = 32
    n_query_groups: int = 0  # heads of keys and values; 0: as many as n_head
    n_embd: int = 4096
    head_size: int = 0  # 0: n_embd / n_head
    intermediate_size: int = 0  # 0: 4 * n_embd
    vocab_size: int = 50304  # rows of the embedding, padding rows included
    block_size: int = 4096  # the longest sequence the model was made for

    norm: Literal["rms", "layer", "fixed_layer"] = "rms"  # a key of model.NORMS
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # Gemma stores weight - 1
    norm_bias: bool = False
    norm_placement: Literal["pre", "post", "both"] = "pre"  # post: OLMo 2; both: a sandwich (Gemma 2)
    parallel_residual: bool = False
    shared_norm: bool = False  # attention and MLP read one norm (Falcon-7B, Phi)
    qk_norm: Literal["head", "all"] | None = None  # "head": over head_size (Qwen3); "all": over all heads (OLMo 2)

    mlp: Literal["gated", "plain"] = "gated"  # a key of model.MLPS
    activation: Activation = "silu"  # a key of ops.ACTIVATIONS
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    tie_embeddings: bool = False

    rotary_percentage: float = 1.0  # share of head_size that is rotated
    rope_base: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # HF's keys: rope_type, factor, ...
    rope_local_base: float | None = None  # for sliding layers (Gemma 3), unscaled
    rope_layers: list[bool] | None = None  # layers that rotate; the others have no positions (SmolLM3)
    learned_positions: bool = False  # GPT-2's wpe instead of rotation

    sliding_window: int | None = None
    sliding_layers: list[bool] | None = None  # which layers slide; None with a window: all
    attention_scale: float | None = None  # None: head_size ** -0.5
    attention_softcap: float | None = None
    clip_qkv: float | None = None

    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    n_expert: int = 0
    n_expert_per_token: int = 0
    expert_size: int = 0  # an expert's inner size; 0: intermediate_size
    expert_norm_topk: bool = True  # the chosen experts' weights sum to 1
    moe_layers: list[bool] | None = None  # which layers have experts; None: all, when n_expert > 0

    def __post_init__(self) -> None:
        for name, hint in _hints().items():
            if not _fits(value := getattr(self, name), hint):
                raise ValueError(f"{name} must be {_spelled(hint)}, not {reprlib.repr(value)}")
        if not self.head_size and self.n_embd % max(self.n_head, 1):
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}, and no head_size is given")
        self.n_query_groups = self.n_query_groups or self.n_head
        self.head_size = self.head_size or self.n_embd // max(self.n_head, 1)
        self.intermediate_size = self.intermediate_size or 4 * self.n_embd
        self.expert_size = self.expert_size or self.intermediate_size
        for name, (least, most) in RANGES.items():
            if (value := getattr(self, name)) is not None and not least <= value <= most:
                raise ValueError(f"{name} must lie between {least:,} and {most:,}, and is {reprlib.repr(value)}")
        if self.n_head % self.n_query_groups:
            raise ValueError(f"n_head {self.n_head} is no multiple of n_query_groups {self.n_query_groups}")
        if self.n_layer * self.n_expert > 2**15:
            raise ValueError(f"{self.n_layer} layers of {self.n_expert} experts are more than any model has")
        if self.n_expert and not 1 <= self.n_expert_per_token <= self.n_expert:
            raise ValueError(f"{self.n_expert_per_token} of {self.n_expert} experts cannot be chosen")
        for name in PER_LAYER:
            if (layers := getattr(self, name)) is not None and len(layers) != self.n_layer:
                raise ValueError(f"{name} has {len(layers)} entries for {self.n_layer} layers")
        if not 0 <= self.rotary_percentage <= 1 or self.rope_size % 2:
            raise ValueError(f"rotary_percentage {self.rotary_percentage} of head_size {self.head_size} has no pairs")
        if self.rope_scaling is not None:
            self._check_scaling(self.rope_scaling)

    def _check_scaling(self, scaling: dict[str, Any]) -> None:
        kind = scaling.get("rope_type")
        if not isinstance(kind, str) or kind not in ROPE_NEEDS:
            raise ValueError(f"rope_scaling: unknown rope_type {reprlib.repr(kind)}; known are {', '.join(ROPE_NEEDS)}")
        if missing := [key for key in ROPE_NEEDS[kind] if scaling.get(key) is None]:
            raise ValueError(f"rope_scaling of the type {kind} has no {', '.join(missing)}")
        for key in ROPE_KEYS & scaling.keys():
            value = scaling[key]
            is_list = key in ROPE_LISTS and isinstance(value, list) and len(value) == self.rope_size // 2
            for number in value if is_list else [value]:
                is_number = _fits(number, float) and 0 <= number < 1e15
                if not (is_number and number) if key in ROPE_NEEDS[kind] else not (is_number or number is None):
                    raise ValueError(f"rope_scaling: {key} cannot be {reprlib.repr(value)}")

    @property
    def rope_size(self) -> int:
        """How many of the `head_size` numbers of a head are rotated."""
        return 0 if self.learned_positions else int(self.head_size * self.rotary_percentage)

    @property
    def scale(self) -> float:
        return self.head_size**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def rotation_change(self) -> int | None:
        """The length beyond which all positions are rotated otherwise (LongRoPE's two lists of factors)."""
        scaling = self.rope_scaling or {}
        return scaling["original_max_position_embeddings"] if scaling.get("rope_type") == "longrope" else None

    def window(self, layer: int) -> int | None:
        """How many positions, its own included, a token of this layer may look back to; None: all."""
        slides = self.sliding_layers is None or self.sliding_layers[layer]
        return self.sliding_window if slides else None

    def rotates(self, layer: int) -> bool:
        return self.rope_size > 0 and (self.rope_layers is None or self.rope_layers[layer])

    def has_experts(self, layer: int) -> bool:
        return self.n_expert > 0 and (self.moe_layers is None or self.moe_layers[layer])

    @classmethod
    def from_name(cls, name: str) -> "Config":
        """The architecture of a known repository, such as `pythia-160m` or `meta-llama/Llama-2-7b-hf`."""
        from lit_gpt.families import preset

        return preset(name)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown Config fields {unknown}: was it written by another version of this project?")
        return cls(**values)

    @classmethod
    def from_file(cls, path: Path) -> "Config":
        """Read a `lit_config.json`. Raises ValueError naming the file."""
        values = files.read_json(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; run scripts/convert_hf_checkpoint.py again to rewrite it") from error

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(Config)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value read from JSON is what an annotation says; a whole number will do for a float."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _spelled(hint: Any) -> str:
    """An annotation in words."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_spelled(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    return words.get(hint, "a list of true and false" if get_origin(hint) is list else "an object")
