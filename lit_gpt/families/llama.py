"""Llama 1 to 3.3 and everything that shares its config: Code Llama, Vicuna, SmolLM2, Yi, R1 distils."""

from lit_gpt.config import Config
from lit_gpt.families.table import (
    HF_ACTIVATIONS,
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
    ("model.layers.{i}.input_layernorm.weight", "transformer.h.{i}.norm_1.weight"),
    ("model.layers.{i}.self_attn.q_proj.{p}", "transformer.h.{i}.attn.q.{p}"),
    ("model.layers.{i}.self_attn.k_proj.{p}", "transformer.h.{i}.attn.k.{p}"),
    ("model.layers.{i}.self_attn.v_proj.{p}", "transformer.h.{i}.attn.v.{p}"),
    ("model.layers.{i}.self_attn.o_proj.{p}", "transformer.h.{i}.attn.proj.{p}"),
    ("model.layers.{i}.post_attention_layernorm.weight", "transformer.h.{i}.norm_2.weight"),
    ("model.layers.{i}.mlp.gate_proj.{p}", "transformer.h.{i}.mlp.gate.{p}"),
    ("model.layers.{i}.mlp.up_proj.{p}", "transformer.h.{i}.mlp.up.{p}"),
    ("model.layers.{i}.mlp.down_proj.{p}", "transformer.h.{i}.mlp.proj.{p}"),
    ("model.norm.weight", "transformer.ln_f.weight"),
    ("lm_head.weight", "lm_head.weight"),
)


def read(hf: HFConfig) -> Config:
    bias = bool(hf.get("attention_bias", False))
    return Config(
        family="llama",
        **read_sizes(hf),
        **read_rope(hf),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        activation=read_activation(hf),
        qkv_bias=bias,
        proj_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )


def write(config: Config) -> HFConfig:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **write_sizes(config),
        **write_rope(config),
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


FAMILY = Family("llama", ("llama",), read, write, ROWS, dropped=(r"rotary_emb\.inv_freq$",))
