"""OLMo 1 (norms with nothing to learn) and OLMo 2 (norms after the sub-layers, normalised queries and keys)."""

from dataclasses import replace

from lit_gpt.config import Config
from lit_gpt.families import llama
from lit_gpt.families.table import Family, HFConfig, rows, without

ROWS_2 = without(llama.ROWS, "layernorm") + rows(
    ("model.layers.{i}.post_attention_layernorm.weight", "transformer.h.{i}.post_norm_1.weight"),
    ("model.layers.{i}.post_feedforward_layernorm.weight", "transformer.h.{i}.post_norm_2.weight"),
    ("model.layers.{i}.self_attn.q_norm.weight", "transformer.h.{i}.attn.norm_q.weight"),
    ("model.layers.{i}.self_attn.k_norm.weight", "transformer.h.{i}.attn.norm_k.weight"),
)


def read(hf: HFConfig) -> Config:
    return replace(llama.read(hf), family="olmo", norm="fixed_layer", norm_eps=1e-5, clip_qkv=hf.get("clip_qkv"))


def read_2(hf: HFConfig) -> Config:
    return replace(llama.read({"rms_norm_eps": 1e-5, **hf}), family="olmo2", norm_placement="post", qk_norm="all")


def write(config: Config) -> HFConfig:
    names = {"model_type": "olmo", "architectures": ["OlmoForCausalLM"]}
    return {**llama.write(config), **names, "clip_qkv": config.clip_qkv}


def write_2(config: Config) -> HFConfig:
    return {**llama.write(config), "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}


def _size(hidden: int, inner: int, layers: int, heads: int, vocab: int, length: int, **more: object) -> HFConfig:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": length,
        "hidden_act": "silu",
        **more,
    }


PRESETS: dict[str, HFConfig] = {
    "allenai/OLMo-1B-hf": _size(2048, 8192, 16, 16, 50304, 2048, tie_word_embeddings=True),
    "allenai/OLMo-7B-hf": _size(4096, 11008, 32, 32, 50304, 2048),
}
_TWO = {"rms_norm_eps": 1e-6, "rope_theta": 500000.0}
PRESETS_2: dict[str, HFConfig] = {
    "allenai/OLMo-2-0425-1B": _size(2048, 8192, 16, 16, 100352, 4096, **_TWO),
    "allenai/OLMo-2-1124-7B": _size(4096, 11008, 32, 32, 100352, 4096, **_TWO),
    "allenai/OLMo-2-1124-13B": _size(5120, 13824, 40, 40, 100352, 4096, **_TWO),
}
FAMILY = Family("olmo", ("olmo",), read, write, llama.ROWS, llama.DROPPED, PRESETS)
FAMILY_2 = Family("olmo2", ("olmo2",), read_2, write_2, ROWS_2, llama.DROPPED, PRESETS_2)
