"""GPT-2: learned positions, weights stored (in, out), query-key-value fused."""

import torch

from lit_gpt.config import Config
from lit_gpt.families.table import (
    OLD_HF_ACTIVATIONS,
    PLAIN,
    STACKED_QKV,
    Family,
    HFConfig,
    Transform,
    qkv,
    read_activation,
    require,
    rows,
)


def _turned(inner: Transform) -> Transform:
    """The transform on a weight that is stored the other way round; biases have one axis and stay."""

    def turn(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.t().contiguous() if tensor.ndim == 2 else tensor

    return Transform(
        lambda config, tensor: inner.split(config, turn(tensor)),
        lambda config, tensors: turn(inner.join(config, tensors)),
    )


ROWS = rows(
    ("transformer.wte.weight", "transformer.wte.weight"),
    ("transformer.wpe.weight", "transformer.wpe.weight"),
    ("transformer.h.{i}.ln_1.{p}", "transformer.h.{i}.norm_1.{p}"),
    ("transformer.h.{i}.attn.c_attn.{p}", qkv("transformer.h.{i}.attn"), _turned(STACKED_QKV)),
    ("transformer.h.{i}.attn.c_proj.{p}", "transformer.h.{i}.attn.proj.{p}", _turned(PLAIN)),
    ("transformer.h.{i}.ln_2.{p}", "transformer.h.{i}.norm_2.{p}"),
    ("transformer.h.{i}.mlp.c_fc.{p}", "transformer.h.{i}.mlp.fc.{p}", _turned(PLAIN)),
    ("transformer.h.{i}.mlp.c_proj.{p}", "transformer.h.{i}.mlp.proj.{p}", _turned(PLAIN)),
    ("transformer.ln_f.{p}", "transformer.ln_f.{p}"),
    ("lm_head.weight", "lm_head.weight"),
)


def read(hf: HFConfig) -> Config:
    if not hf.get("scale_attn_weights", True) or hf.get("scale_attn_by_inverse_layer_idx"):
        raise ValueError("config.json: GPT-2 with another scaling of its attention is not supported")
    return Config(
        family="gpt2",
        n_layer=require(hf, "n_layer", "num_hidden_layers"),
        n_head=require(hf, "n_head", "num_attention_heads"),
        n_embd=require(hf, "n_embd", "hidden_size"),
        intermediate_size=hf.get("n_inner") or 0,
        vocab_size=require(hf, "vocab_size"),
        block_size=require(hf, "n_positions", "max_position_embeddings"),
        learned_positions=True,
        norm="layer",
        norm_bias=True,
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        mlp="plain",
        activation=read_activation({"activation_function": "gelu_new", **hf}, "activation_function"),
        qkv_bias=True,
        proj_bias=True,
        mlp_bias=True,
        tie_embeddings=bool(hf.get("tie_word_embeddings", True)),
    )


def write(config: Config) -> HFConfig:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.intermediate_size,
        "n_positions": config.block_size,
        "vocab_size": config.vocab_size,
        "activation_function": OLD_HF_ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


PRESETS: dict[str, HFConfig] = {
    f"openai-community/{name}": {
        "n_layer": layers,
        "n_head": heads,
        "n_embd": width,
        "vocab_size": 50257,
        "n_positions": 1024,
    }
    for name, layers, heads, width in (
        ("gpt2", 12, 12, 768),
        ("gpt2-medium", 24, 16, 1024),
        ("gpt2-large", 36, 20, 1280),
        ("gpt2-xl", 48, 25, 1600),
    )
}
DROPPED = (r"attn\.bias$", r"attn\.masked_bias$")
FAMILY = Family("gpt2", ("gpt2",), read, write, ROWS, DROPPED, PRESETS, base_prefix="transformer.")
