"""Mistral: Llama with a sliding window."""

from dataclasses import replace

from lit_gpt.config import Config
from lit_gpt.families import llama
from lit_gpt.families.table import Family, HFConfig


def read(hf: HFConfig) -> Config:
    return replace(llama.read(hf), family="mistral", sliding_window=hf.get("sliding_window", 4096))


def write(config: Config) -> HFConfig:
    names = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    return {**llama.write(config), **names, "sliding_window": config.sliding_window}


_7B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
PRESETS: dict[str, HFConfig] = {
    "mistralai/Mistral-7B-v0.1": _7B,
    "mistralai/Mistral-7B-Instruct-v0.1": _7B,
    "mistralai/Mistral-7B-Instruct-v0.2": {**_7B, "rope_theta": 1e6, "sliding_window": None},
    "mistralai/Mistral-7B-v0.3": {**_7B, "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32768},
    "mistralai/Mistral-7B-Instruct-v0.3": {**_7B, "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32768},
}
FAMILY = Family("mistral", ("mistral",), read, write, llama.ROWS, llama.DROPPED, PRESETS)
