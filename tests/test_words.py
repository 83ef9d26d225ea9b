"""Texts encoded by their words against texts encoded whole by the library."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import SHARED, STORIES

from lit_gpt import words
from lit_gpt.tokenizer import MANY, Tokenizer, packed

FILES = [STORIES / "tokenizer.json", *sorted(SHARED.glob("tokenizers/*/tokenizer.json"))]
SPACES = (" bar", " ", "  ", "\n", "\t", "\r\n", "\x1c", "\u00a0", "\u3000", "\u200b", "\u2581", "\u0120")
LETTERS = ("a", "B", "foo", "é", "e\u0301", "\u0301", "1", "23", ".", "...", "'s", "_", "日本", "😀", "\x00")
PIECES = (*SPACES, *LETTERS, "</s>", "<|endoftext|>", "<s>")


def some_texts() -> list[str]:
    """Prose, code and nonsense."""
    draw = random.Random(0)
    nonsense = ["".join(draw.choice(PIECES) for _ in range(draw.randrange(12))) for _ in range(4000)]
    code = [part for path in Path(words.__file__).parent.glob("*.py") for part in path.read_text().split("\n\n")]
    rows = json.loads((SHARED / "instruct" / "alpaca_en_demo.json").read_text()) if SHARED.is_dir() else []
    return [row["instruction"] + "\n" + row["output"] for row in rows[:300]] + code + nonsense


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_ids_are_those_of_whole_texts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, texts = Tokenizer(file.parent)._backend, some_texts()
    memory, expected = backend._words, backend._whole(texts)  # type: ignore[attr-defined]
    assert memory.trusted
    assert memory._by_word(texts) == expected
    assert memory._by_word(texts[::-1]) == expected[::-1]  # from memory
    monkeypatch.setattr(words, "N_KEPT", 10)
    assert memory.encode(texts) == expected
    assert memory.trusted
    assert len(texts) >= MANY
    assert Tokenizer(file.parent).encode_packed(texts, bos=False) == expected


@pytest.mark.parametrize(
    "opening", ["Below is a text.", "Below is a", "Below", "a  ", " a\n b", "</s> a b", "x" * 99 + " y "]
)
def test_what_all_texts_begin_with_is_encoded_once(opening: str) -> None:
    memory = Tokenizer(STORIES)._backend._words  # type: ignore[attr-defined]
    for ends in ((" one", " two three", ""), ("one", " two"), ("\n", " \n", "")):
        texts = [opening + end for end in ends]
        assert memory._by_word(texts) == memory.whole(texts)


def change(file: Path, path: Sequence[str | int], value: object) -> str:
    said = json.loads(file.read_text())
    inner = said
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(said)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "type"), "Unigram"),
        (("model", "dropout"), 0.1),
        (("model", "end_of_word_suffix"), "</w>"),
        (("model", "vocab", "of\u2581the"), 511),
        (("added_tokens",), [{"content": "of the", "id": 511, "single_word": False}]),
        (("added_tokens",), [{"content": " b", "id": 511, "single_word": True}]),
        (("model", "vocab"), {"<unk>": 0, "a": 1}),  # a space would be unknown, and join others
        (("normalizer", "normalizers", 0), {"type": "Strip"}),
        (("normalizer",), {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}),
        (("normalizer",), {"type": "Replace", "pattern": {"String": " "}, "content": "1"}),
        (("pre_tokenizer",), {"type": "Metaspace", "replacement": "_", "prepend_scheme": "never"}),
        (("pre_tokenizer",), {"type": "ByteLevel"}),  # behind sentencepiece's spaces
        (
            ("pre_tokenizer",),
            {"type": "Split", "pattern": {"Regex": "\\p{L}+ ?"}, "behavior": "Isolated", "invert": False},
        ),
        (("pre_tokenizer",), {"type": "Sequence", "pretokenizers": [{"type": "NFC"}, {"type": "Unheard"}]}),
    ],
)
def test_what_may_look_beyond_a_word_is_encoded_whole(path: Sequence[str | int], value: object) -> None:
    file = STORIES / "tokenizer.json"
    assert words.may_cut(change(file, ("truncation",), None))
    assert not words.may_cut(change(file, path, value))


def test_long_words_are_not_kept() -> None:
    memory = Tokenizer(STORIES)._backend._words  # type: ignore[attr-defined]
    texts = ["x" * n for n in (words.LONGEST, words.LONGEST + 1)]
    assert memory._by_word(texts) == memory.whole(texts)
    assert list(memory.first) == texts[:1]


def test_an_encoding_that_differs_is_noticed() -> None:
    """A library that counts the letters of the whole text, whatever its file said."""

    def whole(texts: Sequence[str]) -> list[bytes]:
        return [packed([len(text)]) for text in texts]

    memory = words.Words(whole, set(), trusted=True)
    assert memory.encode(["a bc", "d"]) == whole(["a bc", "d"])
    assert not memory.trusted
