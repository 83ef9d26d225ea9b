"""Granite: Llama with four multipliers."""

from dataclasses import replace

from lit_gpt.config import Config
from lit_gpt.families import llama
from lit_gpt.families.table import Family, HFConfig


def read(hf: HFConfig) -> Config:
    return replace(
        llama.read(hf),
        family="granite",
        embedding_scale=hf.get("embedding_multiplier", 1.0),
        residual_scale=hf.get("residual_multiplier", 1.0),
        attention_scale=hf.get("attention_multiplier", 1.0),
        logit_scale=1.0 / hf.get("logits_scaling", 1.0),
    )


def write(config: Config) -> HFConfig:
    return {
        **llama.write(config),
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.scale,
        "logits_scaling": 1.0 / config.logit_scale,
    }


PRESETS: dict[str, HFConfig] = {
    f"ibm-granite/granite-3.3-{size}": {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 49159,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 1e7,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": scale,
        "logits_scaling": logits,
        "tie_word_embeddings": True,
    }
    for size, hidden, inner, scale, logits in (
        ("2b-base", 2048, 8192, 0.015625, 8.0),
        ("2b-instruct", 2048, 8192, 0.015625, 8.0),
        ("8b-base", 4096, 12800, 0.0078125, 16.0),
        ("8b-instruct", 4096, 12800, 0.0078125, 16.0),
    )
}
FAMILY = Family("granite", ("granite",), read, write, llama.ROWS, llama.DROPPED, PRESETS)
