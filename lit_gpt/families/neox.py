"""GPT-NeoX: Pythia, RedPajama-INCITE, StableLM-alpha, Dolly v2, stablecode."""

from lit_gpt.config import Config
from lit_gpt.families.table import (
    HF_ACTIVATIONS,
    INTERLEAVED_QKV,
    Family,
    HFConfig,
    qkv,
    read_activation,
    read_rope,
    read_sizes,
    rows,
    write_rope,
    write_sizes,
)

ROWS = rows(
    ("gpt_neox.embed_in.weight", "transformer.wte.weight"),
    ("gpt_neox.layers.{i}.input_layernorm.{p}", "transformer.h.{i}.norm_1.{p}"),
    ("gpt_neox.layers.{i}.attention.query_key_value.{p}", qkv("transformer.h.{i}.attn"), INTERLEAVED_QKV),
    ("gpt_neox.layers.{i}.attention.dense.{p}", "transformer.h.{i}.attn.proj.{p}"),
    ("gpt_neox.layers.{i}.post_attention_layernorm.{p}", "transformer.h.{i}.norm_2.{p}"),
    ("gpt_neox.layers.{i}.mlp.dense_h_to_4h.{p}", "transformer.h.{i}.mlp.fc.{p}"),
    ("gpt_neox.layers.{i}.mlp.dense_4h_to_h.{p}", "transformer.h.{i}.mlp.proj.{p}"),
    ("gpt_neox.final_layer_norm.{p}", "transformer.ln_f.{p}"),
    ("embed_out.weight", "lm_head.weight"),
)


def read(hf: HFConfig) -> Config:
    bias = bool(hf.get("attention_bias", True))
    return Config(
        family="neox",
        **read_sizes(hf),
        **read_rope(hf, fraction=0.25),
        norm="layer",
        norm_bias=True,
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        parallel_residual=bool(hf.get("use_parallel_residual", True)),
        mlp="plain",
        activation=read_activation(hf),
        qkv_bias=bias,
        proj_bias=bias,
        mlp_bias=True,
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )


def write(config: Config) -> HFConfig:
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        **write_sizes(config),
        **write_rope(config),
        "rotary_pct": config.rotary_percentage,
        "rotary_emb_base": config.rope_base,
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.qkv_bias,
    }


DROPPED = (r"rotary_emb\.inv_freq$", r"attention\.bias$", r"attention\.masked_bias$")
FAMILY = Family("neox", ("gpt_neox",), read, write, ROWS, DROPPED)
