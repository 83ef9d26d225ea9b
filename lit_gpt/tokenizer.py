"""Text to token ids and back: `tokenizers` (tokenizer.json) and `sentencepiece` (tokenizer.model) behind one class."""

import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from lit_gpt import files
from lit_gpt.words import Words, may_cut

TOKENIZER_JSON, TOKENIZER_MODEL = "tokenizer.json", "tokenizer.model"
TOKEN, NUMBER = (str, dict), (int, list)
SETTINGS = {  # what the keys that are read here may hold, in whichever file they stand
    "added_tokens_decoder": (dict,),
    "add_bos_token": (bool,),
    "chat_template": (str, list),
    **{f"{name}_token": TOKEN for name in ("bos", "eos", "pad")},
    **{f"{name}_token_id": NUMBER for name in ("bos", "eos", "pad")},
}
MANY = 256  # texts in one call, from which on their words are worth remembering
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # one byte of a character that has no token


class Backend(Protocol):
    """What the two libraries have in common. `encode` adds no BOS or EOS; see `packed`."""

    vocab_size: int

    def encode(self, texts: Sequence[str]) -> list[bytes]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def to_id(self, token: str) -> int | None: ...
    def has(self, index: int) -> bool: ...
    @property
    def byte_ids(self) -> set[int]: ...
    @property
    def special_ids(self) -> set[int]: ...


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    `use_bos` tells whether the model's sequences begin with `bos_id`; `stop_ids` end an answer; `fingerprint` tells
    whether a prepared data set fits. Raises ValueError that names a file which is missing or broken.
    """

    def __init__(self, folder: str | Path):
        folder = files.checkpoint_folder(Path(folder))
        settings = {name: _read(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")}
        generation, config = _read(folder / "generation_config.json"), _read(folder / "config.json")
        file = next((folder / n for n in (TOKENIZER_JSON, TOKENIZER_MODEL) if (folder / n).is_file()), None)
        if file is None:
            raise ValueError(
                f"{folder} holds no tokenizer ({TOKENIZER_JSON} or {TOKENIZER_MODEL}); run scripts/download.py with "
                "--tokenizer_only true, or copy the files from the base's folder"
            )
        self.fingerprint = hashlib.sha256(files.own(file).read_bytes()).hexdigest()
        added = settings["tokenizer_config.json"].get("added_tokens_decoder") or {}
        try:
            self._backend: Backend = _Fast(file) if file.name == TOKENIZER_JSON else _SentencePiece(file, added)
        except ImportError as error:
            raise ValueError(f"{file} needs sentencepiece: pip install 'lit-gpt[sentencepiece]'") from error
        except Exception as error:  # both libraries raise bare Exceptions for a malformed file
            raise ValueError(f"{file} is broken: {error}") from error
        self.vocab_size = self._backend.vocab_size
        self.bos_id, self.eos_id, self.pad_id = (
            self._special(name, settings.values(), (generation, config)) for name in ("bos", "eos", "pad")
        )
        ends = generation.get("eos_token_id", self.eos_id)
        ends = ends if isinstance(ends, list) else [ends]
        self.stop_ids = frozenset(end for end in (*ends, self.eos_id) if self._is_id(end))
        said = settings["tokenizer_config.json"].get("add_bos_token")
        starts = self._backend.starts_with(self.bos_id) if isinstance(self._backend, _Fast) else True
        self.use_bos = self.bos_id is not None and (said if isinstance(said, bool) else starts)
        self.chat_template = _chat_template(folder, settings["tokenizer_config.json"])

    @property
    def first_id(self) -> int | None:
        """The token that the model's sequences begin with, if any."""
        return self.bos_id if self.use_bos else None

    def _special(self, name: str, settings: Iterable[dict[str, Any]], numbered: Iterable[dict[str, Any]]) -> int | None:
        for source in settings:
            token = source.get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and files.is_text(token) and (index := self._backend.to_id(token)) is not None:
                return index
            if name == "bos" and token is None and "bos_token" in source:
                return None  # said in so many words (Qwen), whatever the model's config calls its first token
        for source in numbered:
            index = source.get(f"{name}_token_id")
            index = index[0] if isinstance(index, list) and index else index
            if self._is_id(index):
                return index
        return None

    def _is_id(self, index: object) -> bool:
        """Whether this is an id that the tokenizer has: configs name -1 for none, or one beyond the vocabulary."""
        return type(index) is int and self._backend.has(index)

    def encode(self, text: str, *, bos: bool | None = None, eos: bool = False) -> list[int]:
        """Ids of a text; `bos=None` begins as the model's own sequences do."""
        return self.encode_batch([text], bos=bos, eos=eos)[0]

    def encode_batch(self, texts: Sequence[str], *, bos: bool | None = None, eos: bool = False) -> list[list[int]]:
        """Ids of many texts in one call of the library. Raises ValueError if an EOS is asked for that is not known."""
        return [array("i", ids).tolist() for ids in self.encode_packed(texts, bos=bos, eos=eos)]

    def encode_packed(self, texts: Sequence[str], *, bos: bool | None = None, eos: bool = False) -> list[bytes]:
        """As `encode_batch`, each text's ids as the bytes of int32 numbers, a tenth of what Python's numbers take."""
        if eos and self.eos_id is None:
            raise ValueError("this tokenizer has no end-of-text token; name one as eos_token in tokenizer_config.json")
        first = packed([self.bos_id] if (self.use_bos if bos is None else bos) and self.bos_id is not None else [])
        last = packed([self.eos_id] if eos and self.eos_id is not None else [])
        return [first + ids + last for ids in self._backend.encode(texts)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        special = self._backend.special_ids if skip_special else set()
        return self._backend.decode([index for index in ids if index not in special])

    def decode_stream(self, ids: Iterable[int], *, skip_special: bool = True) -> Iterator[str]:
        """Pieces of text as the ids come; put together they are what `decode` gives.

        Each new id is decoded after a few before it, since a token's text depends on its place. A piece is held back
        while its last character is not whole.
        """
        special = self._backend.special_ids if skip_special else set()
        in_bytes = self._backend.byte_ids
        window: list[int] = []  # ids whose text is out, then ids whose text is not
        n_out = 0
        for index in ids:
            if index in special:
                continue
            window.append(index)
            out, text = self._backend.decode(window[:n_out]), self._backend.decode(window)
            if text.endswith("\ufffd") or index in in_bytes or len(text) <= len(out):
                continue
            yield text[len(out) :]
            window, n_out = window[n_out:], len(window) - n_out
        if rest := self._backend.decode(window)[len(self._backend.decode(window[:n_out])) :]:
            yield rest


def packed(ids: Iterable[int]) -> bytes:
    """Ids as the bytes of int32 numbers."""
    return array("i", ids).tobytes()


class _Fast:
    """A tokenizer.json."""

    def __init__(self, file: Path):
        from tokenizers import Tokenizer as Library

        self.library = Library.from_file(str(file))
        self.library.no_truncation()
        self.library.no_padding()
        self.vocab_size = self.library.get_vocab_size(with_added_tokens=True)

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        return self._whole(texts) if len(texts) < MANY else self._words.encode(texts)

    def _whole(self, texts: Sequence[str]) -> list[bytes]:
        encodings = self.library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [packed(encoding.ids) for encoding in encodings]

    @cached_property
    def _words(self) -> Words:
        return Words(self._whole, set(self.library.get_added_tokens_decoder()), may_cut(self.library.to_str()))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.library.decode(list(ids), skip_special_tokens=False))

    def to_id(self, token: str) -> int | None:
        index: int | None = self.library.token_to_id(token)
        return index

    def has(self, index: int) -> bool:
        return 0 <= index < 2**31 and self.library.id_to_token(index) is not None

    @cached_property
    def byte_ids(self) -> set[int]:
        return {index for token, index in self.library.get_vocab().items() if BYTE_TOKEN.fullmatch(token)}

    @cached_property
    def special_ids(self) -> set[int]:
        return {index for index, token in self.library.get_added_tokens_decoder().items() if token.special}

    def starts_with(self, bos_id: int | None) -> bool:
        """Whether the file's own post-processor puts BOS first."""
        return self.library.encode("", add_special_tokens=True).ids[:1] == [bos_id]


class _SentencePiece:
    """A tokenizer.model, with the added tokens that tokenizer_config.json lists beside it."""

    def __init__(self, file: Path, added: dict[str, Any]):
        from sentencepiece import SentencePieceProcessor

        self.library = SentencePieceProcessor(model_file=str(file))
        self.added = {entry["content"]: int(index) for index, entry in added.items()}
        self.names = {index: token for token, index in self.added.items()}
        self.special = {int(index) for index, entry in added.items() if entry.get("special")}
        self.vocab_size = max([self.library.get_piece_size(), *(index + 1 for index in self.names)])
        longest_first = sorted(self.added, key=len, reverse=True)
        self.splitter = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if self.added else None

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        each = self.library.encode(list(texts)) if self.splitter is None else map(self._encode_around_added, texts)
        return [packed(ids) for ids in each]

    def _encode_around_added(self, text: str) -> list[int]:
        assert self.splitter is not None
        ids: list[int] = []
        for piece in self.splitter.split(text):
            ids += [self.added[piece]] if piece in self.added else self.library.encode(piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        n = self.library.get_piece_size()
        pieces: list[str] = []
        run: list[int] = []
        for index in ids:
            if index in self.names and (index >= n or not self.library.is_byte(index)):
                pieces += [self.library.decode(run), self.names[index]]
                run = []
            elif index < n:
                run.append(index)
        return "".join([*pieces, self.library.decode(run)])

    def to_id(self, token: str) -> int | None:
        if token in self.added:
            return self.added[token]
        index: int = self.library.piece_to_id(token)
        return index if self.library.id_to_piece(index) == token else None

    def has(self, index: int) -> bool:
        return 0 <= index < self.library.get_piece_size() or index in self.names

    @cached_property
    def byte_ids(self) -> set[int]:
        return {index for index in range(self.library.get_piece_size()) if self.library.is_byte(index)}

    @cached_property
    def special_ids(self) -> set[int]:
        n = self.library.get_piece_size()
        return self.special | {index for index in range(n) if self.library.is_control(index)}


def _read(path: Path) -> dict[str, Any]:
    """A JSON object whose settings are of the right types; empty if the file is not there."""
    if not path.is_file():
        return {}
    read = files.read_json(path)
    for key, types in SETTINGS.items():
        if read.get(key) is not None and type(read[key]) not in types:
            wanted = " or ".join(kind.__name__ for kind in types)
            raise ValueError(f"{path}: {key} must be {wanted}, not {type(read[key]).__name__}")
    return read


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    if (file := folder / "chat_template.jinja").is_file():
        return files.read_text(file)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
