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


def _size(hidden: int, layers: int, heads: int, vocab: int = 50304, length: int = 2048, **more: object) -> HFConfig:
    return {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": length,
        "hidden_act": "gelu",
        "rotary_pct": 0.25,
        **more,
    }


_PYTHIA = {
    "70m": _size(512, 6, 8),
    "160m": _size(768, 12, 12),
    "410m": _size(1024, 24, 16),
    "1b": _size(2048, 16, 8),
    "1.4b": _size(2048, 24, 16),
    "2.8b": _size(2560, 32, 32),
    "6.9b": _size(4096, 32, 32, 50432),
    "12b": _size(5120, 36, 40, 50688),
}
_INCITE: HFConfig = {"rotary_pct": 1.0, "use_parallel_residual": False}
_INCITE_3B, _INCITE_7B = _size(2560, 32, 32, 50432, **_INCITE), _size(4096, 32, 32, 50432, **_INCITE)
_ALPHA_3B, _ALPHA_7B = _size(4096, 16, 32, 50688, 4096), _size(6144, 16, 48, 50432, 4096)
_CODE = _size(2560, 32, 32, 49152, 4096)
_DOLLY_3B = _size(2560, 32, 32, 50280)

PRESETS: dict[str, HFConfig] = {
    "stabilityai/stablelm-base-alpha-3b": _ALPHA_3B,
    "stabilityai/stablelm-base-alpha-7b": _ALPHA_7B,
    "stabilityai/stablelm-tuned-alpha-3b": _ALPHA_3B,
    "stabilityai/stablelm-tuned-alpha-7b": _ALPHA_7B,
    "stabilityai/stablecode-completion-alpha-3b": {**_CODE, "max_position_embeddings": 16384},
    "stabilityai/stablecode-completion-alpha-3b-4k": _CODE,
    "stabilityai/stablecode-instruct-alpha-3b": _CODE,
    "EleutherAI/pythia-14m": _size(128, 6, 4, length=512),
    "EleutherAI/pythia-31m": _size(256, 6, 8, length=1024),
    **{f"EleutherAI/pythia-{size}{end}": shape for size, shape in _PYTHIA.items() for end in ("", "-deduped")},
    **{f"togethercomputer/RedPajama-INCITE-{kind}-3B-v1": _INCITE_3B for kind in ("Base", "Chat", "Instruct")},
    **{f"togethercomputer/RedPajama-INCITE-7B-{kind}": _INCITE_7B for kind in ("Base", "Chat", "Instruct")},
    **{f"togethercomputer/RedPajama-INCITE-{kind}-7B-v0.1": _INCITE_7B for kind in ("Base", "Chat", "Instruct")},
    "databricks/dolly-v2-3b": _DOLLY_3B,
}
DROPPED = (r"rotary_emb\.inv_freq$", r"attention\.bias$", r"attention\.masked_bias$")
FAMILY = Family("neox", ("gpt_neox",), read, write, ROWS, DROPPED, PRESETS)
