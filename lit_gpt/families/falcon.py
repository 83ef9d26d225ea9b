"""Falcon 7B (one group of keys and values), 40B and 180B (eight groups, two norms). ALiBi (Falcon-RW) is refused."""

from lit_gpt.config import Config
from lit_gpt.families.table import (
    HF_ACTIVATIONS,
    INTERLEAVED_QKV,
    Family,
    HFConfig,
    qkv,
    read_activation,
    read_rope,
    require,
    rows,
    write_rope,
)

_COMMON = rows(
    ("transformer.word_embeddings.weight", "transformer.wte.weight"),
    ("transformer.h.{i}.self_attention.query_key_value.{p}", qkv("transformer.h.{i}.attn"), INTERLEAVED_QKV),
    ("transformer.h.{i}.self_attention.dense.{p}", "transformer.h.{i}.attn.proj.{p}"),
    ("transformer.h.{i}.mlp.dense_h_to_4h.{p}", "transformer.h.{i}.mlp.fc.{p}"),
    ("transformer.h.{i}.mlp.dense_4h_to_h.{p}", "transformer.h.{i}.mlp.proj.{p}"),
    ("transformer.ln_f.{p}", "transformer.ln_f.{p}"),
    ("lm_head.weight", "lm_head.weight"),
)
ROWS = _COMMON + rows(
    ("transformer.h.{i}.input_layernorm.{p}", "transformer.h.{i}.norm_1.{p}"),
    ("transformer.h.{i}.post_attention_layernorm.{p}", "transformer.h.{i}.norm_2.{p}"),
)
TWO_NORMS_ROWS = _COMMON + rows(
    ("transformer.h.{i}.ln_attn.{p}", "transformer.h.{i}.norm_1.{p}"),
    ("transformer.h.{i}.ln_mlp.{p}", "transformer.h.{i}.norm_2.{p}"),
)


def read(hf: HFConfig) -> Config:
    if hf.get("alibi"):
        raise ValueError("config.json: Falcon with ALiBi (Falcon-RW) is not supported")
    heads = require(hf, "num_attention_heads", "n_head")
    grouped = bool(hf.get("new_decoder_architecture", False))
    if grouped:
        groups = hf.get("num_kv_heads") or hf.get("n_head_kv") or heads
    else:
        groups = 1 if hf.get("multi_query", True) else heads
    parallel = grouped or bool(hf.get("parallel_attn", True))
    two_norms = grouped and (hf.get("num_ln_in_parallel_attn") or 2) == 2
    bias = bool(hf.get("bias", False))
    return Config(
        family="falcon_grouped" if two_norms else "falcon",
        n_layer=require(hf, "num_hidden_layers", "n_layer"),
        n_head=heads,
        n_query_groups=groups,
        n_embd=require(hf, "hidden_size"),
        intermediate_size=hf.get("ffn_hidden_size") or 0,
        vocab_size=require(hf, "vocab_size"),
        block_size=hf.get("max_position_embeddings") or 2048,
        **read_rope(hf),
        norm="layer",
        norm_bias=True,
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        parallel_residual=parallel,
        shared_norm=parallel and not two_norms,
        mlp="plain",
        activation=read_activation({"activation": "gelu", **hf}, "activation"),
        qkv_bias=bias,
        proj_bias=bias,
        mlp_bias=bias,
        tie_embeddings=bool(hf.get("tie_word_embeddings", True)),
    )


def write(config: Config) -> HFConfig:
    grouped = config.family == "falcon_grouped" or config.n_query_groups not in (1, config.n_head)
    return {
        "model_type": "falcon",
        "architectures": ["FalconForCausalLM"],
        **write_rope(config),
        "hidden_size": config.n_embd,
        "ffn_hidden_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_kv_heads": config.n_query_groups,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "new_decoder_architecture": grouped,
        "num_ln_in_parallel_attn": (1 if config.shared_norm else 2) if grouped else None,
        "multi_query": config.n_query_groups == 1,
        "parallel_attn": config.parallel_residual,
        "bias": config.qkv_bias,
        "alibi": False,
        "activation": HF_ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _size(hidden: int, heads: int, layers: int, groups: int) -> HFConfig:
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_kv_heads": groups,
        "vocab_size": 65024,
        "new_decoder_architecture": groups > 1,
    }


PRESETS: dict[str, HFConfig] = {
    f"tiiuae/{name}{end}": _size(*shape)
    for name, end, shape in (
        ("falcon-7b", "", (4544, 71, 32, 1)),
        ("falcon-7b", "-instruct", (4544, 71, 32, 1)),
        ("falcon-40b", "", (8192, 128, 60, 8)),
        ("falcon-40b", "-instruct", (8192, 128, 60, 8)),
        ("falcon-180B", "", (14848, 232, 80, 8)),
        ("falcon-180B", "-chat", (14848, 232, 80, 8)),
    )
}
FAMILY = Family("falcon", ("falcon", "RefinedWebModel", "RefinedWeb"), read, write, ROWS, presets=PRESETS)
GROUPED = Family("falcon_grouped", (), read, write, TWO_NORMS_ROWS)
