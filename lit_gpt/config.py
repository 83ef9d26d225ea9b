"""An architecture as data. Every family is one `Config`; `lit_config.json` is its fields, one for one."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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

    norm: str = "rms"  # a key of model.NORMS
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # Gemma stores weight - 1
    norm_bias: bool = False
    norm_placement: str = "pre"  # "pre"; "post": after the sub-layer (OLMo 2); "both": sandwich (Gemma 2)
    parallel_residual: bool = False
    shared_norm: bool = False  # attention and MLP read one norm (Falcon-7B, Phi)
    qk_norm: str | None = None  # "head": over head_size (Qwen3); "all": over all heads (OLMo 2)

    mlp: str = "gated"  # a key of model.MLPS
    activation: str = "silu"  # a key of ops.ACTIVATIONS
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
        for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size"):
            self._check_size(name, least=1)
        for name in ("n_query_groups", "head_size", "intermediate_size", "expert_size", "n_expert"):
            self._check_size(name, least=0)
        self.n_query_groups = self.n_query_groups or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        self.intermediate_size = self.intermediate_size or 4 * self.n_embd
        self.expert_size = self.expert_size or self.intermediate_size
        if self.n_head % self.n_query_groups:
            raise ValueError(f"n_head {self.n_head} is no multiple of n_query_groups {self.n_query_groups}")

    def _check_size(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number from {least} up, not {value!r}")

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
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls.from_dict(values)
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: {error}; run scripts/convert_hf_checkpoint.py again to rewrite it") from error

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
