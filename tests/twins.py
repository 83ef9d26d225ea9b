"""Tiny random models of transformers' own making, one per family, to compare ours with."""

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0] * 8}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2, "logits_scaling": 4.0}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}
FALCON = {"ffn_hidden_size": 96, "alibi": False}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
GEMMA = {"head_dim": 12, "num_key_value_heads": 2, "query_pre_attn_scalar": 20, "sliding_window": 8}
# family and variant -> transformers' config class, and what is not as in SIZES
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-grouped": ("Llama", {"num_key_value_heads": 2}),
    "llama-one-group-tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-odd-heads": ("Llama", {"head_dim": 10, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "llama-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-dynamic": (
        "Llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 24},
    ),
    "llama-llama3": ("Llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}}),
    "llama-yarn": (
        "Llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "neox": ("GPTNeoX", {"rotary_pct": 0.25}),
    "neox-sequential": ("GPTNeoX", {"use_parallel_residual": False, "rotary_pct": 1.0}),
    "falcon-7b": ("Falcon", {**FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon-40b": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": (
        "Falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-sequential": ("Falcon", {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 8}),
    "mistral-no-window": ("Mistral", {"num_key_value_heads": 4, "sliding_window": None}),
    "mixtral": ("Mixtral", {"num_key_value_heads": 2, **MOE}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5, "hidden_act": "gelu_new"}),
    "phi3": ("Phi3", {"num_key_value_heads": 2, "sliding_window": 9, "pad_token_id": 0}),
    "phi3-longrope": (
        "Phi3",
        {"rope_scaling": LONG, "original_max_position_embeddings": 32, "sliding_window": None, "pad_token_id": 0},
    ),
    "gemma": ("Gemma", {"head_dim": 20, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", {**GEMMA, **CAPS, "layer_types": ALTERNATING}),
    "gemma3": ("Gemma3Text", {**GEMMA, "layer_types": ALTERNATING}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2-tied-window": (
        "Qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
        | {"num_key_value_heads": 2},
    ),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 24}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "stablelm": ("StableLm", {"partial_rotary_factor": 0.25, "use_qkv_bias": True, "num_key_value_heads": 2}),
    "stablelm-parallel": ("StableLm", {"use_parallel_residual": True, "num_key_value_heads": 4}),
    "olmo": ("Olmo", {"clip_qkv": 0.5}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 2}),
    "gpt2": ("GPT2", {"n_positions": 64, "n_embd": 64, "n_head": 4, "n_layer": 3, "n_inner": 80}),
    "smollm3": ("SmolLM3", {"num_key_value_heads": 2, "no_rope_layers": [1, 0, 1], "pad_token_id": 0}),
    "granite": ("Granite", {"num_key_value_heads": 2, "tie_word_embeddings": True, **GRANITE}),
}


def make_twin(name: str, folder: Path, seed: int = 0, **more: Any) -> transformers.PreTrainedModel:
    """Save a random model as an HF folder and return it. Every weight is random, biases and norms too."""
    kind, changes = TWINS[name]
    config = getattr(transformers, f"{kind}Config")(
        **({**SIZES, **changes, **more} if kind != "GPT2" else {**changes, "vocab_size": 101})
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(3)  # far from zero, so that a wrong path shows
    model.save_pretrained(folder)
    return model
