"""SmolLM3: Llama in which every fourth layer has no positions."""

from dataclasses import replace

from lit_gpt.config import Config
from lit_gpt.families import llama
from lit_gpt.families.table import Family, HFConfig, read_sliding, write_sliding


def read(hf: HFConfig) -> Config:
    config = replace(llama.read({"tie_word_embeddings": True, **hf}), family="smollm3")
    rotated = hf.get("no_rope_layers")  # despite its name, 1 where the layer rotates
    if rotated is None:
        every = hf.get("no_rope_layer_interval") or 4
        rotated = [(i + 1) % every != 0 for i in range(config.n_layer)]
    config = replace(config, rope_layers=[bool(layer) for layer in rotated])
    return replace(config, **read_sliding(hf, config.n_layer, on=bool(hf.get("use_sliding_window", False))))


def write(config: Config) -> HFConfig:
    rotated = [int(config.rotates(i)) for i in range(config.n_layer)]
    names = {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": rotated}
    return {**llama.write(config), **names, **write_sliding(config)}


PRESETS: dict[str, HFConfig] = {
    name: {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 128256,
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_theta": 5e6,
        "tie_word_embeddings": True,
    }
    for name in ("HuggingFaceTB/SmolLM3-3B-Base", "HuggingFaceTB/SmolLM3-3B")
}
FAMILY = Family("smollm3", ("smollm3",), read, write, llama.ROWS, llama.DROPPED, PRESETS)
