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
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-grouped": ("LlamaConfig", {"num_key_value_heads": 2}),
    "llama-one-group-tied": ("LlamaConfig", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-biased": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-odd-heads": ("LlamaConfig", {"head_dim": 10, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "neox": ("GPTNeoXConfig", {"rotary_pct": 0.25}),
    "neox-sequential": ("GPTNeoXConfig", {"use_parallel_residual": False, "rotary_pct": 1.0}),
}


def make_twin(name: str, folder: Path, seed: int = 0) -> transformers.PreTrainedModel:
    """Save a random model as an HF folder and return it. Every weight is random, biases and norms too."""
    kind, changes = TWINS[name]
    config = getattr(transformers, kind)(**{**SIZES, **changes})
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
