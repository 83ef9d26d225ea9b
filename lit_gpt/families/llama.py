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


def _size(hidden: int, inner: int, layers: int, heads: int, groups: int = 0, **more: object) -> HFConfig:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups or heads,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        **more,
    }


_7B, _13B = _size(4096, 11008, 32, 32), _size(5120, 13824, 40, 40)
_34B, _70B = _size(8192, 22016, 48, 64, 8), _size(8192, 28672, 80, 64, 8)
_1: HFConfig = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}  # what Llama 1 has otherwise
_30B = _size(6656, 17920, 60, 52, **_1)
_16K = {"max_position_embeddings": 16384, "rope_scaling": {"type": "linear", "factor": 4.0}}
_LONGCHAT = {**_1, "max_position_embeddings": 16384, "rope_scaling": {"type": "linear", "factor": 8.0}}
_32K = {"max_position_embeddings": 32768, "rope_scaling": {"type": "linear", "factor": 8.0}}
_CODE = {"max_position_embeddings": 16384, "rope_theta": 1e6, "vocab_size": 32016}
_PYTHON = {**_CODE, "vocab_size": 32000}
_3: HFConfig = {"vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192}
_SCALED: HFConfig = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_SCALED |= {"original_max_position_embeddings": 8192, "factor": 8.0}
_3_1: HFConfig = {**_3, "max_position_embeddings": 131072, "rope_scaling": _SCALED}
_3_2: HFConfig = {**_3_1, "rope_scaling": {**_SCALED, "factor": 32.0}, "tie_word_embeddings": True}
_TINY = _size(2048, 5632, 22, 32, 4, max_position_embeddings=2048)
_SMOL: HFConfig = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}

PRESETS: dict[str, HFConfig] = {
    "stabilityai/FreeWilly2": _70B,
    "togethercomputer/LLaMA-2-7B-32K": {**_7B, **_32K},
    "openlm-research/open_llama_3b": _size(3200, 8640, 26, 32, **_1),
    "openlm-research/open_llama_7b": {**_7B, **_1},
    "openlm-research/open_llama_13b": {**_13B, **_1},
    "lmsys/vicuna-7b-v1.3": {**_7B, **_1},
    "lmsys/vicuna-13b-v1.3": {**_13B, **_1},
    "lmsys/vicuna-33b-v1.3": _30B,
    "lmsys/vicuna-7b-v1.5": _7B,
    "lmsys/vicuna-13b-v1.5": _13B,
    "lmsys/vicuna-7b-v1.5-16k": {**_7B, **_16K},
    "lmsys/vicuna-13b-v1.5-16k": {**_13B, **_16K},
    "lmsys/longchat-7b-16k": {**_7B, **_LONGCHAT},
    "lmsys/longchat-13b-16k": {**_13B, **_LONGCHAT},
    "NousResearch/Nous-Hermes-llama-2-7b": _7B,
    "NousResearch/Nous-Hermes-13b": {**_13B, **_1, "vocab_size": 32001},
    "NousResearch/Nous-Hermes-Llama2-13b": {**_13B, "vocab_size": 32032},
    "meta-llama/Llama-2-7b-hf": _7B,
    "meta-llama/Llama-2-7b-chat-hf": _7B,
    "meta-llama/Llama-2-13b-hf": _13B,
    "meta-llama/Llama-2-13b-chat-hf": _13B,
    "meta-llama/Llama-2-70b-hf": _70B,
    "meta-llama/Llama-2-70b-chat-hf": _70B,
    "codellama/CodeLlama-7b-hf": {**_7B, **_CODE},
    "codellama/CodeLlama-13b-hf": {**_13B, **_CODE},
    "codellama/CodeLlama-34b-hf": {**_34B, **_PYTHON},
    "codellama/CodeLlama-7b-Python-hf": {**_7B, **_PYTHON},
    "codellama/CodeLlama-13b-Python-hf": {**_13B, **_PYTHON},
    "codellama/CodeLlama-34b-Python-hf": {**_34B, **_PYTHON},
    "codellama/CodeLlama-7b-Instruct-hf": {**_7B, **_CODE},
    "codellama/CodeLlama-13b-Instruct-hf": {**_13B, **_CODE},
    "codellama/CodeLlama-34b-Instruct-hf": {**_34B, **_PYTHON},
    "garage-bAInd/Platypus-30B": _30B,
    "garage-bAInd/Platypus2-7B": _7B,
    "garage-bAInd/Platypus2-13B": _13B,
    "garage-bAInd/Platypus2-70B": _70B,
    "garage-bAInd/Camel-Platypus2-13B": _13B,
    "garage-bAInd/Camel-Platypus2-70B": _70B,
    "garage-bAInd/Stable-Platypus2-13B": _13B,
    "garage-bAInd/Platypus2-70B-instruct": _70B,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": _TINY,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _TINY,
    "Trelis/Llama-2-7b-chat-hf-function-calling-v2": _7B,
    "meta-llama/Meta-Llama-3-8B": _size(4096, 14336, 32, 32, 8, **_3),
    "meta-llama/Meta-Llama-3-8B-Instruct": _size(4096, 14336, 32, 32, 8, **_3),
    "meta-llama/Meta-Llama-3-70B": _size(8192, 28672, 80, 64, 8, **_3),
    "meta-llama/Llama-3.1-8B": _size(4096, 14336, 32, 32, 8, **_3_1),
    "meta-llama/Llama-3.1-8B-Instruct": _size(4096, 14336, 32, 32, 8, **_3_1),
    "meta-llama/Llama-3.1-70B": _size(8192, 28672, 80, 64, 8, **_3_1),
    "meta-llama/Llama-3.2-1B": _size(2048, 8192, 16, 32, 8, **_3_2),
    "meta-llama/Llama-3.2-1B-Instruct": _size(2048, 8192, 16, 32, 8, **_3_2),
    "meta-llama/Llama-3.2-3B": _size(3072, 8192, 28, 24, 8, **_3_2),
    "meta-llama/Llama-3.2-3B-Instruct": _size(3072, 8192, 28, 24, 8, **_3_2),
    "meta-llama/Llama-3.3-70B-Instruct": _size(8192, 28672, 80, 64, 8, **_3_1),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _size(4096, 14336, 32, 32, 8, **_3_1),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": _size(8192, 28672, 80, 64, 8, **_3_1),
    "01-ai/Yi-6B": _size(4096, 11008, 32, 32, 4, vocab_size=64000, rope_theta=5e6),
    "HuggingFaceTB/SmolLM2-135M": _size(576, 1536, 30, 9, 3, **_SMOL),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _size(576, 1536, 30, 9, 3, **_SMOL),
    "HuggingFaceTB/SmolLM2-360M": _size(960, 2560, 32, 15, 5, **_SMOL),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _size(960, 2560, 32, 15, 5, **_SMOL),
    "HuggingFaceTB/SmolLM2-1.7B": _size(2048, 8192, 24, 32, 32, **{**_SMOL, "rope_theta": 130000.0}),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _size(2048, 8192, 24, 32, 32, **{**_SMOL, "rope_theta": 130000.0}),
}
DROPPED = (r"rotary_emb\.inv_freq$",)
FAMILY = Family("llama", ("llama",), read, write, ROWS, DROPPED, PRESETS)
