"""Qwen3, dense and mixture of experts: queries and keys are normalised per head."""

from dataclasses import replace

from lit_gpt.config import Config
from lit_gpt.families import llama
from lit_gpt.families.table import Family, HFConfig, read_sliding, require, rows, write_sliding

ROWS = llama.ROWS + rows(
    ("model.layers.{i}.self_attn.q_norm.weight", "transformer.h.{i}.attn.norm_q.weight"),
    ("model.layers.{i}.self_attn.k_norm.weight", "transformer.h.{i}.attn.norm_k.weight"),
    ("model.layers.{i}.mlp.gate.weight", "transformer.h.{i}.mlp.router.weight"),
    ("model.layers.{i}.mlp.experts.{e}.gate_proj.weight", "transformer.h.{i}.mlp.experts.{e}.gate.weight"),
    ("model.layers.{i}.mlp.experts.{e}.up_proj.weight", "transformer.h.{i}.mlp.experts.{e}.up.weight"),
    ("model.layers.{i}.mlp.experts.{e}.down_proj.weight", "transformer.h.{i}.mlp.experts.{e}.proj.weight"),
)


def read(hf: HFConfig) -> Config:
    config = replace(llama.read({"head_dim": 128, **hf}), family="qwen3", qk_norm="head")
    config = replace(config, **read_sliding(hf, config.n_layer, on=bool(hf.get("use_sliding_window", False))))
    if hf.get("model_type") != "qwen3_moe":
        return config
    dense, every = hf.get("mlp_only_layers") or [], hf.get("decoder_sparse_step") or 1
    sparse = [i not in dense and (i + 1) % every == 0 for i in range(config.n_layer)]
    return replace(
        config,
        n_expert=require(hf, "num_experts", "num_local_experts"),
        n_expert_per_token=require(hf, "num_experts_per_tok"),
        expert_size=require(hf, "moe_intermediate_size"),
        expert_norm_topk=bool(hf.get("norm_topk_prob", False)),
        moe_layers=None if all(sparse) else sparse,
    )


def write(config: Config) -> HFConfig:
    dense = {
        **llama.write(config),
        **write_sliding(config),
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
    }
    if not config.n_expert:
        return dense
    return {
        **dense,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": config.n_expert,
        "num_experts_per_tok": config.n_expert_per_token,
        "moe_intermediate_size": config.expert_size,
        "norm_topk_prob": config.expert_norm_topk,
        "mlp_only_layers": [i for i in range(config.n_layer) if not config.has_experts(i)],
        "decoder_sparse_step": 1,
    }


def _size(hidden: int, inner: int, layers: int, heads: int, tied: bool = False, **more: object) -> HFConfig:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_theta": 1e6,
        "tie_word_embeddings": tied,
        **more,
    }


_MOE: HFConfig = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "model_type": "qwen3_moe"}
_SIZES = {
    "0.6B": _size(1024, 3072, 28, 16, True),
    "1.7B": _size(2048, 6144, 28, 16, True),
    "4B": _size(2560, 9728, 36, 32, True),
    "8B": _size(4096, 12288, 36, 32),
    "14B": _size(5120, 17408, 40, 40),
    "32B": _size(5120, 25600, 64, 64),
    "30B-A3B": _size(2048, 6144, 48, 32, num_key_value_heads=4, moe_intermediate_size=768, **_MOE),
}
PRESETS: dict[str, HFConfig] = {f"Qwen/Qwen3-{size}": shape for size, shape in _SIZES.items()}
FAMILY = Family("qwen3", ("qwen3", "qwen3_moe"), read, write, ROWS, llama.DROPPED, PRESETS)
