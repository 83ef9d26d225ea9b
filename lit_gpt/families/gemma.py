"""Gemma 1, 2 and 3 (text): scaled embeddings, norms that store weight - 1; from 2 on sandwich norms and windows."""

from dataclasses import replace

from lit_gpt.config import Config
from lit_gpt.families import llama
from lit_gpt.families.table import Family, HFConfig, read_rope, read_sliding, rows, without, write_sliding

ROWS = llama.ROWS
SANDWICH_ROWS = without(llama.ROWS, "post_attention_layernorm") + rows(
    ("model.layers.{i}.post_attention_layernorm.weight", "transformer.h.{i}.post_norm_1.weight"),
    ("model.layers.{i}.pre_feedforward_layernorm.weight", "transformer.h.{i}.norm_2.weight"),
    ("model.layers.{i}.post_feedforward_layernorm.weight", "transformer.h.{i}.post_norm_2.weight"),
    ("model.layers.{i}.self_attn.q_norm.weight", "transformer.h.{i}.attn.norm_q.weight"),
    ("model.layers.{i}.self_attn.k_norm.weight", "transformer.h.{i}.attn.norm_k.weight"),
)


def read(hf: HFConfig) -> Config:
    # "gelu" in an old config.json of Gemma 1 always meant the tanh approximation.
    activation = hf.get("hidden_activation") or "gelu_pytorch_tanh"
    config = llama.read({"tie_word_embeddings": True, "head_dim": 256, **hf, "hidden_act": activation})
    return replace(config, family="gemma", norm_offset=1.0, embedding_scale=config.n_embd**0.5)


def read_2(hf: HFConfig) -> Config:
    config = replace(
        read(hf),
        family="gemma2",
        norm_placement="both",
        attention_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=hf.get("attn_logit_softcapping", 50.0),
        logit_softcap=hf.get("final_logit_softcapping", 30.0),
    )
    window = {"sliding_window": 4096, **hf}
    return replace(config, **read_sliding(window, config.n_layer, on=True, slides=lambda i: (i + 1) % 2 == 1))


def read_3(hf: HFConfig) -> Config:
    per_kind = hf.get("rope_parameters") or {}
    full, local = per_kind.get("full_attention"), per_kind.get("sliding_attention") or {}
    uncapped = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = read_2({"rope_theta": 1e6, **uncapped, **hf, "rope_parameters": full})
    every = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    return replace(
        config,
        family="gemma3",
        qk_norm="head",
        rope_local_base=float(local.get("rope_theta") or hf.get("rope_local_base_freq") or 10000.0),
        **(read_rope({"rope_theta": 1e6, **hf}, full) if full else {}),
        **read_sliding({"sliding_window": 4096, **hf}, config.n_layer, on=True, slides=lambda i: (i + 1) % every != 0),
    )


def write(config: Config) -> HFConfig:
    names = {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}
    return {**llama.write(config), **names, "hidden_activation": "gelu_pytorch_tanh"}


def write_2(config: Config) -> HFConfig:
    return {
        **write(config),
        **write_sliding(config),
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "query_pre_attn_scalar": round(config.scale**-2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def write_3(config: Config) -> HFConfig:
    hf = write_2(config)
    hf |= {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    local = {"rope_type": "default", "rope_theta": config.rope_local_base}
    hf["rope_parameters"] = {"full_attention": hf["rope_parameters"], "sliding_attention": local}
    return {**hf, "rope_local_base_freq": config.rope_local_base}


def _size(hidden: int, inner: int, layers: int, heads: int, groups: int, **more: object) -> HFConfig:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 256,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        **more,
    }


_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}
_THREE = {
    "vocab_size": 262144,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
    "rope_local_base_freq": 10000.0,
}
PRESETS: dict[str, HFConfig] = {
    name: shape
    for end in ("", "-it")
    for name, shape in {
        f"google/gemma-2b{end}": _size(2048, 16384, 18, 8, 1),
        f"google/gemma-7b{end}": _size(3072, 24576, 28, 16, 16),
    }.items()
}
PRESETS_2: dict[str, HFConfig] = {
    name: shape
    for end in ("", "-it")
    for name, shape in {
        f"google/gemma-2-2b{end}": _size(2304, 9216, 26, 8, 4, **_CAPS),
        f"google/gemma-2-9b{end}": _size(3584, 14336, 42, 16, 8, **_CAPS),
        f"google/gemma-2-27b{end}": _size(4608, 36864, 46, 32, 16, **_CAPS, query_pre_attn_scalar=144)
        | {"head_dim": 128},
    }.items()
}
PRESETS_3: dict[str, HFConfig] = {
    name: shape
    for end in ("pt", "it")
    for name, shape in {
        f"google/gemma-3-270m{'' if end == 'pt' else '-it'}": _size(640, 2048, 18, 4, 1, **_THREE),
        f"google/gemma-3-1b-{end}": _size(1152, 6912, 26, 4, 1, **_THREE),
    }.items()
}
FAMILY = Family("gemma", ("gemma",), read, write, ROWS, llama.DROPPED, PRESETS)
FAMILY_2 = Family("gemma2", ("gemma2",), read_2, write_2, SANDWICH_ROWS, llama.DROPPED, PRESETS_2)
FAMILY_3 = Family("gemma3", ("gemma3_text",), read_3, write_3, SANDWICH_ROWS, llama.DROPPED, PRESETS_3)
