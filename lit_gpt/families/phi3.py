"""Phi-3, Phi-3.5 and Phi-4: Llama with fused query-key-value and gate-up weights."""

from dataclasses import replace

from lit_gpt.config import Config
from lit_gpt.families import llama
from lit_gpt.families.table import HALVES, STACKED_QKV, Family, HFConfig, qkv, rows, without

ROWS = without(llama.ROWS, "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") + rows(
    ("model.layers.{i}.self_attn.qkv_proj.weight", qkv("transformer.h.{i}.attn", "weight"), STACKED_QKV),
    (
        "model.layers.{i}.mlp.gate_up_proj.weight",
        ("transformer.h.{i}.mlp.gate.weight", "transformer.h.{i}.mlp.up.weight"),
        HALVES,
    ),
)


def read(hf: HFConfig) -> Config:
    return replace(llama.read({"rms_norm_eps": 1e-5, **hf}), family="phi3", sliding_window=hf.get("sliding_window"))


def write(config: Config) -> HFConfig:
    hf = {**llama.write(config), "model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
    hf |= {"sliding_window": config.sliding_window, "partial_rotary_factor": config.rotary_percentage}
    if original := (config.rope_scaling or {}).get("original_max_position_embeddings"):  # linear has none
        hf["original_max_position_embeddings"] = original
    return hf


_MINI = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "sliding_window": 2047,
}
PRESETS: dict[str, HFConfig] = {
    "microsoft/Phi-3-mini-4k-instruct": _MINI,
    "microsoft/phi-4": {
        **_MINI,
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "vocab_size": 100352,
        "max_position_embeddings": 16384,
        "rope_theta": 250000.0,
        "sliding_window": None,
    },
}
FAMILY = Family("phi3", ("phi3",), read, write, ROWS, llama.DROPPED, PRESETS)
