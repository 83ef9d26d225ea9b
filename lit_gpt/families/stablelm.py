"""StableLM 2 and StableLM Zephyr 3B: Llama's shape with layer norms and a share of rotation."""

from dataclasses import replace

from lit_gpt.config import Config
from lit_gpt.families import llama
from lit_gpt.families.table import Family, HFConfig, read_rope, rows, without

ROWS = without(llama.ROWS, "norm") + rows(
    ("model.layers.{i}.input_layernorm.{p}", "transformer.h.{i}.norm_1.{p}"),
    ("model.layers.{i}.post_attention_layernorm.{p}", "transformer.h.{i}.norm_2.{p}"),
    ("model.norm.{p}", "transformer.ln_f.{p}"),
)


def read(hf: HFConfig) -> Config:
    if hf.get("qk_layernorm"):
        raise ValueError("config.json: StableLM with qk_layernorm (the 12B model) is not supported")
    parallel = bool(hf.get("use_parallel_residual", False))
    return replace(
        llama.read(hf),
        family="stablelm",
        **read_rope(hf, fraction=0.25),
        norm="layer",
        norm_bias=True,
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        parallel_residual=parallel,
        shared_norm=parallel,
        qkv_bias=bool(hf.get("use_qkv_bias", False)),
        proj_bias=False,
    )


def write(config: Config) -> HFConfig:
    return {
        **llama.write(config),
        "model_type": "stablelm",
        "architectures": ["StableLmForCausalLM"],
        "layer_norm_eps": config.norm_eps,
        "partial_rotary_factor": config.rotary_percentage,
        "use_qkv_bias": config.qkv_bias,
        "use_parallel_residual": config.parallel_residual,
    }


_3B = {
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 50304,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "partial_rotary_factor": 0.25,
}
_2_1_6B = {
    **_3B,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "vocab_size": 100352,
    "use_qkv_bias": True,
}
PRESETS: dict[str, HFConfig] = {
    "stabilityai/stablelm-3b-4e1t": _3B,
    "stabilityai/stablelm-zephyr-3b": _3B,
    "stabilityai/stablelm-2-1_6b": _2_1_6B,
    "stabilityai/stablelm-2-zephyr-1_6b": _2_1_6B,
}
FAMILY = Family("stablelm", ("stablelm",), read, write, ROWS, llama.DROPPED, PRESETS)
