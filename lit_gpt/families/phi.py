"""Phi-1, Phi-1.5 and Phi-2: attention and MLP side by side after one norm, biases everywhere."""

from lit_gpt.config import Config
from lit_gpt.families.table import (
    OLD_HF_ACTIVATIONS,
    Family,
    HFConfig,
    read_activation,
    read_rope,
    read_sizes,
    rows,
    write_rope,
    write_sizes,
)

ROWS = rows(
    ("model.embed_tokens.weight", "transformer.wte.weight"),
    ("model.layers.{i}.input_layernorm.{p}", "transformer.h.{i}.norm_1.{p}"),
    ("model.layers.{i}.self_attn.q_proj.{p}", "transformer.h.{i}.attn.q.{p}"),
    ("model.layers.{i}.self_attn.k_proj.{p}", "transformer.h.{i}.attn.k.{p}"),
    ("model.layers.{i}.self_attn.v_proj.{p}", "transformer.h.{i}.attn.v.{p}"),
    ("model.layers.{i}.self_attn.dense.{p}", "transformer.h.{i}.attn.proj.{p}"),
    ("model.layers.{i}.mlp.fc1.{p}", "transformer.h.{i}.mlp.fc.{p}"),
    ("model.layers.{i}.mlp.fc2.{p}", "transformer.h.{i}.mlp.proj.{p}"),
    ("model.final_layernorm.{p}", "transformer.ln_f.{p}"),
    ("lm_head.{p}", "lm_head.{p}"),
)


def read(hf: HFConfig) -> Config:
    if hf.get("qk_layernorm"):
        raise ValueError("config.json: Phi with qk_layernorm is not supported")
    return Config(
        family="phi",
        **read_sizes(hf),
        **read_rope(hf, fraction=0.5),
        norm="layer",
        norm_bias=True,
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        parallel_residual=True,
        shared_norm=True,
        mlp="plain",
        activation=read_activation(hf),
        qkv_bias=True,
        proj_bias=True,
        mlp_bias=True,
        head_bias=True,
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )


def write(config: Config) -> HFConfig:
    return {
        "model_type": "phi",
        "architectures": ["PhiForCausalLM"],
        **write_sizes(config),
        **write_rope(config),
        "partial_rotary_factor": config.rotary_percentage,
        "hidden_act": OLD_HF_ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
    }


def _size(hidden: int, layers: int, rotated: float) -> HFConfig:
    return {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "vocab_size": 51200,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": rotated,
        "hidden_act": "gelu_new",
    }


PRESETS: dict[str, HFConfig] = {
    "microsoft/phi-1": _size(2048, 24, 0.5),
    "microsoft/phi-1_5": _size(2048, 24, 0.5),
    "microsoft/phi-2": _size(2560, 32, 0.4),
}
FAMILY = Family("phi", ("phi",), read, write, ROWS, (r"rotary_emb\.inv_freq$",), PRESETS)
