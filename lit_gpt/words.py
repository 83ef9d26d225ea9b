"""Ids of many texts, each distinct word encoded once: a data set holds its words tens of times over.

A text is cut before each space that follows something other than a space. That is exact wherever no token of a BPE
vocabulary reaches across such a place: merges never cross it, and the normalizers and pre-tokenizers that are known
here see nothing beyond it. A few texts of each call are encoded whole too; a tokenizer that differs goes without.
"""

import json
import re
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from os.path import commonprefix
from typing import Any

SPACE, BYTE_LEVEL_SPACE = "\u2581", "\u0120"  # as sentencepiece's and byte-level vocabularies write it
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # expressions that take no space behind a word: Llama 3's, Qwen's, Falcon's
    rf"{LETTERS}|\p{{N}}{{1,3}}{REST}",
    rf"{LETTERS}|\p{{N}}{REST}",
    "[0-9][0-9][0-9]",
}
CUT = re.compile(rf"(?<=[^\s{SPACE}])(?= )")
UNEVEN = re.compile(rf" (?<![^\s{SPACE}] )")  # a space that is no place to cut; the literal first is found fast
N_KEPT = 1 << 19  # distinct words, some 100 MB
LONGEST = 64  # characters of a word; longer ones hardly come twice, as in writing without spaces
N_CHECKED = 8  # texts of a call that are encoded both ways
Encode = Callable[[Sequence[str]], list[bytes]]


class Words:
    """A memory of words in front of `whole`, which encodes texts in the library.

    Ids are the bytes of int32 numbers, which join faster than lists. `added` are the ids of tokens that the library
    looks for before it sees words: a text that holds one goes there as it is, and so does every text unless `trusted`.
    """

    def __init__(self, whole: Encode, added: set[int], trusted: bool):
        self.whole, self.added, self.trusted = whole, added, trusted
        # Of words that hold an added token there is None.
        self.first: dict[str, bytes | None] = {}  # a text's first word, or what all texts of a call begin with
        self.later: dict[str, bytes | None] = {}  # any other, without the space before it

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """What `whole` gives."""
        if not self.trusted:
            return self.whole(texts)
        ids = self._by_word(texts)
        some = range(0, len(texts), -(-len(texts) // N_CHECKED))
        self.trusted = self.whole([texts[i] for i in some]) == [ids[i] for i in some]
        return ids if self.trusted else self.whole(texts)

    def _by_word(self, texts: Sequence[str]) -> list[bytes]:
        # Whole words that all begin with, such as a prompt style's opening.
        begin = " ".join(_cut(commonprefix(texts))[:-1])  # noqa: RUF071 characters are what is compared
        later = [_cut(text[len(begin) + 1 :] if begin else text) for text in texts]
        first = [begin or words.pop(0) for words in later]
        self._learn(set(first), self.first, "")
        self._learn(set(chain.from_iterable(later)), self.later, "a")
        if begin and begin not in self.first:  # it may be long
            self.first[begin] = self._plain(*self.whole([begin]))
        joined = [self._joined(*words) for words in zip(first, later, strict=True)]
        special = iter(self.whole([text for text, ids in zip(texts, joined, strict=True) if ids is None]))
        return [next(special) if ids is None else ids for ids in joined]

    def _joined(self, first: str, later: list[str]) -> bytes | None:
        """The ids of a text; None if it holds an added token, or a word too long to be known."""
        try:
            return self.first[first] + b"".join(map(self.later.__getitem__, later))  # type: ignore
        except (KeyError, TypeError):
            return None

    def _learn(self, words: set[str], known: dict[str, bytes | None], before: str) -> None:
        """Encode the new ones, each behind the word `before` if there is one: a text's first is encoded otherwise."""
        if len(known) + len(words) > N_KEPT:
            known.clear()
        new = [word for word in words - known.keys() if len(word) <= LONGEST]
        skip = len(*self.whole([before]))
        for word, ids in zip(new, self.whole([f"{before} {word}" if before else word for word in new]), strict=True):
            known[word] = self._plain(ids[skip:])

    def _plain(self, ids: bytes) -> bytes | None:
        return ids if self.added.isdisjoint(array("i", ids)) else None


def _cut(text: str) -> list[str]:
    """The words; all but the first lack the space that they begin with."""
    if UNEVEN.search(text) is None:
        return text.split(" ")
    first, *later = CUT.split(text)
    return [first, *(word[1:] for word in later)]


def may_cut(file: str) -> bool:
    """Whether what a tokenizer.json says lets its texts be cut into words."""
    from tokenizers.decoders import ByteLevel

    said = json.loads(file)
    model, parts = said["model"], [*_parts(said["normalizer"]), *_parts(said["pre_tokenizer"])]
    marked = model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or marked or not all(map(_is_local, parts)):
        return False
    kinds = {part["type"] for part in parts}
    in_bytes, replaced = "ByteLevel" in kinds, bool(kinds & {"Prepend", "Replace", "Metaspace"})
    space = BYTE_LEVEL_SPACE if in_bytes else SPACE if replaced else " "
    if (in_bytes and replaced) or space not in model["vocab"]:  # a space that is no token may become part of another
        return False
    added = said["added_tokens"]
    if any(token["single_word"] and token["content"][:1].isspace() for token in added):  # it looks at what is before
        return False
    tokens = chain(model["vocab"], (token["content"] for token in added))
    if not in_bytes:
        return not any(CUT.search(token.replace(SPACE, " ")) for token in tokens)
    read = ByteLevel().decode
    return not any(CUT.search(read([token])) for token in tokens if BYTE_LEVEL_SPACE in token[1:] or " " in token[1:])


def _parts(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer, or those that it is a sequence of."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [inner for each in part.get("normalizers") or part.get("pretokenizers") or () for inner in _parts(each)]


def _is_local(part: dict[str, Any]) -> bool:
    """Whether this sees nothing beyond a word, and writes a space as it is or as `SPACE`."""
    match part["type"]:
        case "NFC" | "ByteLevel" | "Digits" | "Punctuation":
            return True
        case "Prepend":
            return bool(part["prepend"] == SPACE)
        case "Replace":
            return part["pattern"] == {"String": " "} and part["content"] == SPACE
        case "Metaspace":
            return bool(part["replacement"] == SPACE)
        case "Split":
            return part["pattern"].get("Regex") in SPLITS and part["behavior"] == "Isolated" and not part["invert"]
    return False
