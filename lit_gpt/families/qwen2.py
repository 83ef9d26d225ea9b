"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from dataclasses import replace

from lit_gpt.config import Config
from lit_gpt.families import llama
from lit_gpt.families.table import Family, HFConfig, read_sliding, write_sliding


def read(hf: HFConfig) -> Config:
    config = replace(llama.read(hf), family="qwen2", qkv_bias=True, proj_bias=False)
    return replace(config, **read_sliding(hf, config.n_layer, on=bool(hf.get("use_sliding_window", False))))


def write(config: Config) -> HFConfig:
    names = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    return {**llama.write(config), **names, **write_sliding(config)}


def _size(
    hidden: int, inner: int, layers: int, heads: int, groups: int, vocab: int = 152064, tied: bool = False
) -> HFConfig:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_theta": 1e6,
        "tie_word_embeddings": tied,
    }


_SIZES = {
    "0.5B": _size(896, 4864, 24, 14, 2, 151936, True),
    "1.5B": _size(1536, 8960, 28, 12, 2, 151936, True),
    "3B": _size(2048, 11008, 36, 16, 2, 151936, True),
    "7B": _size(3584, 18944, 28, 28, 4),
    "14B": _size(5120, 13824, 48, 40, 8),
    "32B": _size(5120, 27648, 64, 40, 8),
    "72B": _size(8192, 29568, 80, 64, 8),
}
PRESETS: dict[str, HFConfig] = {
    f"Qwen/Qwen2.5-{size}{kind}": shape for size, shape in _SIZES.items() for kind in ("", "-Instruct")
}
FAMILY = Family("qwen2", ("qwen2",), read, write, llama.ROWS, llama.DROPPED, PRESETS)
