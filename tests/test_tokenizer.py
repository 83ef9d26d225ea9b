"""Our tokenizer against the libraries' own, and pieces against the whole."""

import json
from pathlib import Path

import pytest
from conftest import SHARED, STORIES
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.tokenizer import Tokenizer

REAL = sorted(SHARED.glob("tokenizers/*/tokenizer.json"))
TEXTS = ["", " ", "Hello", " Hello  world\n\n1 2345", "naïve 😀 日本語\t\x00 x", "a" * 3000, "</s> <|endoftext|> <bos>"]
VECTORS = {"gpt-2": "gpt-2", "falcon-7b": "falcon", "llama-2": "llama-spm", "llama-3": "llama-bpe", "qwen": "qwen2"}


def plain(folder: Path, target: Path) -> Path:
    """The folder with its sentencepiece model alone."""
    target.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        if (folder / name).is_file():
            (target / name).write_bytes((folder / name).read_bytes())
    return target


@pytest.mark.skipif(not REAL, reason=f"the real tokenizers are not here: {SHARED}")
@pytest.mark.parametrize("file", REAL, ids=lambda file: file.parent.name)
def test_ids_and_text_equal_the_librarys(file: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(file), clean_up_tokenization_spaces=False)
    ours = Tokenizer(file.parent)
    rows = json.loads((SHARED / "instruct" / "user_oriented_instructions.alpaca.json").read_text())
    texts = TEXTS + [row["input"] + row["output"] for row in rows[:60]]
    expected = [theirs.encode(text, add_special_tokens=False) for text in texts]
    assert ours.encode_batch(texts, bos=False) == expected
    for ids in expected:
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
        assert "".join(ours.decode_stream(ids)) == ours.decode(ids)


@pytest.mark.skipif(not REAL, reason=f"the real tokenizers are not here: {SHARED}")
@pytest.mark.parametrize("file", REAL, ids=lambda file: file.parent.name)
def test_sequences_begin_and_end_as_transformers_do(file: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(file.parent), Tokenizer(file.parent)
    ids = theirs("Hello")["input_ids"]  # one word, on which AutoTokenizer's rebuilt tokenizers agree with their files
    assert ours.encode("Hello") == ids
    if theirs.eos_token_id is not None and (file.parent / "tokenizer_config.json").is_file():
        assert ours.eos_id == theirs.eos_token_id
        assert ours.bos_id == theirs.bos_token_id


@pytest.mark.skipif(not REAL, reason=f"the real tokenizers are not here: {SHARED}")
@pytest.mark.parametrize("name", VECTORS)
def test_ids_equal_llama_cpps_vectors(name: str) -> None:
    folder = SHARED / "tokenizers" / "vectors"
    texts = (folder / f"{VECTORS[name]}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (folder / f"{VECTORS[name]}.out").read_text().splitlines()
    ours = Tokenizer(SHARED / "tokenizers" / name)
    # What one text ends with and the next begins with is the separator's newline.
    wrong = [
        t for t, line in zip(texts, lines, strict=False) if ours.encode(t, bos=False) != [int(i) for i in line.split()]
    ]
    assert len(texts) > 40
    assert not wrong


@pytest.mark.skipif(not REAL, reason=f"the real tokenizers are not here: {SHARED}")
@pytest.mark.parametrize("name", ["llama-2", "mistral-7b-v0.1"])
def test_sentencepiece_alone_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    fast = Tokenizer(SHARED / "tokenizers" / name)
    piece = Tokenizer(plain(SHARED / "tokenizers" / name, tmp_path / "sp"))
    rows = json.loads((SHARED / "instruct" / "alpaca_en_demo.json").read_text())
    texts = [row["instruction"] + "\n" + row["output"] for row in rows[:300]]
    assert piece.encode_batch(texts) == fast.encode_batch(texts)
    assert (piece.bos_id, piece.eos_id, piece.use_bos) == (fast.bos_id, fast.eos_id, fast.use_bos)
    for ids in piece.encode_batch(texts[:50]):
        assert piece.decode(ids) == fast.decode(ids)
        assert "".join(piece.decode_stream(ids)) == piece.decode(ids)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 511), max_size=40))
def test_pieces_are_the_whole_for_any_ids(ids: list[int]) -> None:
    tokenizer = Tokenizer(STORIES)
    assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)
    kept = tokenizer.decode_stream(ids, skip_special=False)
    assert "".join(kept) == tokenizer.decode(ids, skip_special=False)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_bytes_survive(text: str) -> None:
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode(text, bos=False)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_stream(ids)) == text


def byte_level() -> Path:
    """A byte-level BPE tokenizer with BOS set by its post-processor, made once."""
    from tempfile import gettempdir

    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    folder = Path(gettempdir()) / "lit_gpt_test_byte_level"
    if not (folder / "tokenizer.json").is_file():
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
        library.train_from_iterator(["hello world, how are you"] * 5, trainer)
        library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        library.enable_truncation(5)
        library.enable_padding(length=9)
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
        library.save(str(folder / "tokenizer.json"))
    return folder


def test_bos_follows_the_post_processor_and_the_config(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_level())
    text = "hello world, how are you, hello world"
    ids = tokenizer.encode(text, bos=False)
    assert len(ids) > 9, "the file's truncation and padding must not act"
    assert tokenizer.encode(text) == [0, *ids]
    assert tokenizer.encode(text, bos=False, eos=True) == [*ids, 1]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((byte_level() / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": False}))
    assert Tokenizer(tmp_path).encode(text) == ids


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_broken_files_are_named(tmp_path: Path, name: str, text: str) -> None:
    for file in STORIES.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=name):
        Tokenizer(tmp_path)


def test_no_tokenizer_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scripts/download.py"):
        Tokenizer(tmp_path)
