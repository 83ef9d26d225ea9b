"""Mixtral: Mistral with a mixture of experts in every block."""

from dataclasses import replace

from lit_gpt.config import Config
from lit_gpt.families import mistral
from lit_gpt.families.table import Family, HFConfig, require, rows, without

ROWS = without(mistral.FAMILY.rows, ".mlp.") + rows(
    ("model.layers.{i}.block_sparse_moe.gate.weight", "transformer.h.{i}.mlp.router.weight"),
    ("model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight", "transformer.h.{i}.mlp.experts.{e}.gate.weight"),
    ("model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight", "transformer.h.{i}.mlp.experts.{e}.up.weight"),
    ("model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight", "transformer.h.{i}.mlp.experts.{e}.proj.weight"),
)


def read(hf: HFConfig) -> Config:
    experts = {"n_expert": require(hf, "num_local_experts"), "n_expert_per_token": require(hf, "num_experts_per_tok")}
    return replace(mistral.read({"sliding_window": None, "rms_norm_eps": 1e-5, **hf}), family="mixtral", **experts)


def write(config: Config) -> HFConfig:
    return {
        **mistral.write(config),
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": config.n_expert,
        "num_experts_per_tok": config.n_expert_per_token,
    }


_8X7B = {
    **mistral.PRESETS["mistralai/Mistral-7B-v0.1"],
    "rope_theta": 1e6,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
PRESETS: dict[str, HFConfig] = {
    "mistralai/Mixtral-8x7B-v0.1": _8X7B,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _8X7B,
}
FAMILY = Family("mixtral", ("mixtral",), read, write, ROWS, mistral.FAMILY.dropped, PRESETS)
