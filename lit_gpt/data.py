"""Records in, (tokens, labels) out: reading, tokenising, the prepared set on disk, batches.

A prepared set is a folder with `train.pt`, `test.pt` and `meta.json`. A `.pt` holds three flat tensors, so that it
opens at once at any size: `tokens` (all rows end to end), `offsets` (n_rows + 1) and `prompt_lengths` (n_rows).
"""

import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lit_gpt import checkpoint, files
from lit_gpt.model import IGNORE_INDEX
from lit_gpt.prompts import Style, get_style
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.workers import shared_out

TRAIN, TEST, META = "train.pt", "test.pt", "meta.json"
AT_ONCE = 4096  # rows that a process tokenises at a time
ID_BYTES = 4  # of an int32
Record = dict[str, str]


# --- records ---------------------------------------------------------------------------------------------------------


def read_records(path: Path) -> list[Record]:
    """Rows with `instruction`, `input` (may be absent) and `output`, from a JSON list or JSON lines.

    Raises ValueError with the row's number for anything else.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error
    rows: Iterable[Any]
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no valid JSON: {error}") from error
    else:
        rows = _json_lines(path, text)
    records = [check_record(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]
    if not records:
        raise ValueError(f"{path} holds no rows")
    return records


def _json_lines(path: Path, text: str) -> Iterator[Any]:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: no valid JSON: {error}") from error


def check_record(row: Any, where: str) -> Record:
    """The three fields of a row as text. Raises ValueError that says what is wrong at `where`."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with instruction, input and output, not {type(row).__name__}")
    record: dict[str, Any] = {key: row.get(key) for key in ("instruction", "input", "output")}
    if record["input"] is None:  # absent, or null
        record["input"] = ""
    for key, value in record.items():
        if not isinstance(value, str):
            problem = "is missing" if value is None else f"must be text, not {type(value).__name__}"
            raise ValueError(f"{where}: {key!r} {problem}")
        if not files.is_text(value):
            raise ValueError(f"{where}: {key!r} holds half of a character (a lone surrogate, such as \\ud83d)")
    if not record["instruction"].strip() and not record["input"].strip():
        raise ValueError(f"{where}: 'instruction' is empty")
    if not record["output"].strip():
        raise ValueError(f"{where}: 'output' is empty, so there is nothing to learn; remove the row")
    return record


def split(records: Sequence[Record], test_fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """A seeded random split, the same rows as the original's; at least one row on each side."""
    if not 0 < test_fraction < 1:
        raise ValueError(f"--test_split_fraction must lie between 0 and 1, not {test_fraction}")
    if len(records) < 2:
        raise ValueError("at least two rows are needed: one to train on and one to test with")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(records), generator=generator).tolist()
    n_train = len(records) - math.floor(len(records) * test_fraction)
    n_train = min(max(n_train, 1), len(records) - 1)
    return [records[i] for i in order[:n_train]], [records[i] for i in order[n_train:]]


# --- the prepared set ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """Tokenised rows, end to end."""

    tokens: torch.Tensor  # (all tokens,) int32
    offsets: torch.Tensor  # (n_rows + 1,) int64
    prompt_lengths: torch.Tensor  # (n_rows,) int32
    n_truncated: int = 0


def encode(
    sets: Sequence[Sequence[Record]],
    tokenizer: Tokenizer,
    style: str,
    max_length: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Encoded]:
    """Tokenise every prompt, and every answer followed by the end-of-text token, thousands in one call.

    A row longer than `max_length` keeps its end-of-text token and loses the end of its answer; one whose prompt leaves
    no room for an answer is refused by ValueError with its number. `progress` hears the rows done and those to do.
    """
    places = [(number, start) for number, records in enumerate(sets) for start in range(0, len(records), AT_ONCE)]
    parts: list[list[_Some]] = [[] for _ in sets]
    done, total = 0, sum(map(len, sets))
    some = partial(_encode_some, sets, tokenizer, get_style(style), max_length)
    for (number, _), part in zip(places, shared_out(some, places), strict=True):
        parts[number].append(part)
        done += len(part.lengths)
        progress(done, total)
    return [
        Encoded(
            torch.cat([torch.frombuffer(part.tokens, dtype=torch.int32) for part in each]),
            torch.tensor([0, *chain.from_iterable(part.lengths for part in each)]).cumsum(0),
            torch.tensor([*chain.from_iterable(part.prompt_lengths for part in each)], dtype=torch.int32),
            sum(part.n_truncated for part in each),
        )
        for each in parts
    ]


@dataclass
class _Some:
    """Some rows, as a process tells them to another."""

    tokens: bytearray  # of int32
    lengths: list[int]
    prompt_lengths: list[int]
    n_truncated: int


def _encode_some(
    sets: Sequence[Sequence[Record]], tokenizer: Tokenizer, render: Style, max_length: int, place: tuple[int, int]
) -> _Some:
    """Of a set the `AT_ONCE` rows from a place on."""
    number, start = place
    tokens, lengths, prompt_lengths, n_truncated = bytearray(), [], [], 0
    part = sets[number][start : start + AT_ONCE]
    prompts = tokenizer.encode_packed([render(record["instruction"], record["input"]) for record in part])
    answers = tokenizer.encode_packed([record["output"] for record in part], bos=False, eos=True)
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=start + 1):
        n_prompt, n_answer = len(prompt) // ID_BYTES, len(answer) // ID_BYTES
        if n_prompt + n_answer > max_length:
            if n_prompt + 2 > max_length:
                begins = part[number - start - 1]["instruction"][:60]
                raise ValueError(
                    f"row {number}: the prompt alone has {n_prompt} tokens and {max_length} are allowed; "
                    f"shorten it or raise --max_seq_length (it begins {begins!r})"
                )
            n_truncated += 1
            n_answer = max_length - n_prompt
            answer = answer[: (n_answer - 1) * ID_BYTES] + answer[-ID_BYTES:]
        tokens += prompt
        tokens += answer
        lengths.append(n_prompt + n_answer)
        prompt_lengths.append(n_prompt)
    return _Some(tokens, lengths, prompt_lengths, n_truncated)


def prepare(
    train: Sequence[Record],
    test: Sequence[Record],
    destination: Path,
    checkpoint_dir: Path,
    *,
    mask_inputs: bool,
    max_seq_length: int | None,
    style: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Tokenise both parts for the model in `checkpoint_dir` and write the prepared set; returns its meta data.

    Nothing is written unless every row is good. `progress` hears the rows done and those to do.
    """
    config = checkpoint.load_config(checkpoint_dir)
    tokenizer = Tokenizer(checkpoint_dir)
    max_length = min(max_seq_length or config.block_size, config.block_size)
    encoded = encode([train, test], tokenizer, style, max_length, progress)
    parts = dict(zip((TRAIN, TEST), encoded, strict=True))
    meta: dict[str, Any] = {
        "prompt_style": style,
        "mask_inputs": mask_inputs,
        "max_seq_length": max_length,
        "checkpoint": config.name,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": config.vocab_size,
        "ends": [tokenizer.first_id, tokenizer.eos_id],  # of each row: other files than the tokenizer's say them
    }
    for name, part in parts.items():
        lengths = part.offsets.diff()
        meta[name] = {
            "rows": len(lengths),
            "tokens": len(part.tokens),
            "longest": int(lengths.max()),
            "truncated": part.n_truncated,
        }
        state = {"tokens": part.tokens, "offsets": part.offsets, "prompt_lengths": part.prompt_lengths}
        files.save(destination / name, state)
    files.save_text(destination / META, json.dumps(meta, indent=2) + "\n")
    return meta


def summary(meta: dict[str, Any], destination: Path) -> str:
    """What a prepare script says when it is done."""
    lines = [f"wrote {destination} ({META}, {TRAIN}, {TEST})"]
    for name, part in ((TRAIN, "training"), (TEST, "validation")):
        counts = meta[name]
        lines.append(
            f"  {counts['rows']:,} {part} rows, {counts['tokens']:,} tokens, the longest {counts['longest']:,}"
            + (f"; {counts['truncated']:,} cut to {meta['max_seq_length']:,}" if counts["truncated"] else "")
        )
    trained = "the answers" if meta["mask_inputs"] else "prompts and answers"
    return "\n".join([*lines, f"  prompt style {meta['prompt_style']}; the loss is taken on {trained}"])


# --- rows and batches ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Rows as the model wants them: `labels[t]` is the token that follows `tokens[t]`, or IGNORE_INDEX."""

    tokens: torch.Tensor  # (B, T), or (1, all tokens) if packed
    labels: torch.Tensor
    lengths: tuple[int, ...] | None  # of the rows laid end to end; None if padded

    @cached_property
    def where(self) -> torch.Tensor:
        """The labelled ones of all positions (n_labels,), row after row."""
        return (self.labels != IGNORE_INDEX).flatten().nonzero()[:, 0]

    @property
    def n_labels(self) -> int:
        return len(self.where)

    def unlabelled(self) -> "Batch":
        """The same tokens with nothing asked of them."""
        return Batch(self.tokens, torch.full_like(self.labels, IGNORE_INDEX), self.lengths)


def _problem(state: dict[str, Any]) -> str | None:
    """What in a prepared set would fail, or read beyond the tokens, in the middle of a run."""
    for name, dtype in (("tokens", torch.int32), ("offsets", torch.int64), ("prompt_lengths", torch.int32)):
        tensor = state.get(name)
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tensor.ndim != 1:
            return f"{name} is no flat tensor of {dtype}"
    tokens, offsets, prompt_lengths = state["tokens"], state["offsets"], state["prompt_lengths"]
    if len(prompt_lengths) == 0 or len(offsets) != len(prompt_lengths) + 1:
        return f"{len(offsets)} offsets for {len(prompt_lengths)} rows"
    lengths = offsets.diff()
    if offsets[0] != 0 or offsets[-1] != len(tokens) or lengths.min() < 2:
        return "its offsets do not rise from 0 to the number of tokens"
    if prompt_lengths.min() < 1 or (prompt_lengths >= lengths).any():
        return "a row has no prompt or no answer"
    return None


class PreparedSet:
    """Rows of one `.pt` of a prepared set, mapped from the disk."""

    def __init__(self, path: Path, *, mask_inputs: bool, max_length: int, vocab_size: int = 2**31):
        """Rows longer than `max_length` are cut but keep their last token. ValueError for another kind of file."""
        state = files.load_dict(path, mmap=True)
        if problem := _problem(state):
            raise ValueError(
                f"{path} is no prepared set of this project ({problem}); run scripts/prepare_alpaca.py again"
            )
        self.tokens, self.offsets = state["tokens"], state["offsets"]
        self.prompt_lengths = state["prompt_lengths"]
        self.path, self.mask_inputs, self.max_length, self.vocab_size = path, mask_inputs, max_length, vocab_size

    def fingerprint(self) -> str:
        """Tells two sets apart: their tokens, rows and prompts, and what is learned of them.

        The file's own checksums are taken for its parts, so that a large set is not read for it.
        """
        with zipfile.ZipFile(self.path) as archive:
            parts = [(Path(part.filename).parts[1:], part.CRC, part.file_size) for part in archive.infolist()]
        return hashlib.sha256(repr((self.mask_inputs, sorted(parts))).encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def lengths(self, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Tokens of these rows, or of all (n_rows,), after cutting."""
        if rows is None:
            return self.offsets.diff().clamp(max=self.max_length)
        at = torch.tensor(rows, dtype=torch.long)
        return (self.offsets[at + 1] - self.offsets[at]).clamp(max=self.max_length)

    def longest(self, n: int) -> list[int]:
        """The n longest rows."""
        return self.lengths().topk(min(n, len(self))).indices.tolist()

    @cache  # noqa: B019 - a set lives as long as its run
    def n_longest(self, n: int) -> int:
        """Tokens of the n longest rows together."""
        return int(self.lengths(self.longest(n)).sum())

    def n_tokens(self, rows: Sequence[int]) -> int:
        """Tokens that training on these rows reads: all but each row's last."""
        return int(self.lengths(rows).sum()) - len(rows)

    def n_without_labels(self, first: int | None = None) -> int:
        """Rows whose prompt leaves no room for an answer: an end-of-text token alone would teach to say nothing.

        Of all, or of the `first` so many.
        """
        return int((self.prompt_lengths[:first] + 2 > self.max_length).sum()) if self.mask_inputs else 0

    def row(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and labels of a row, (T,) each: all but the last token, and what follows each.

        Raises ValueError for a token that the model has no embedding of; looking at all at the start would read them.
        """
        row = self.tokens[self.offsets[index] : self.offsets[index + 1]].long()
        if row.min() < 0 or row.max() >= self.vocab_size:
            raise ValueError(
                f"{self.path}, row {index + 1}: its tokens lie between {int(row.min())} and {int(row.max())}, and the "
                f"model has {self.vocab_size} embeddings; prepare the data again"
            )
        if len(row) > self.max_length:
            row = torch.cat((row[: self.max_length - 1], row[-1:]))
        labels = row[1:].clone()
        if self.mask_inputs:
            n_prompt = int(self.prompt_lengths[index])
            labels[: n_prompt - 1 if n_prompt + 2 <= self.max_length else len(labels)] = IGNORE_INDEX
        return row[:-1], labels

    def prompt_and_answer(self, index: int) -> tuple[list[int], list[int]]:
        """The two parts of a row."""
        row = self.tokens[self.offsets[index] : self.offsets[index + 1]].tolist()
        n_prompt = int(self.prompt_lengths[index])
        return row[:n_prompt], row[n_prompt:]

    def batch(self, indices: Sequence[int], *, packing: bool) -> Batch:
        """The rows laid end to end, or padded on the right, where no token can see the padding."""
        rows = [self.row(index) for index in indices]
        tokens, labels = [row[0] for row in rows], [row[1] for row in rows]
        if packing:
            return Batch(torch.cat(tokens)[None], torch.cat(labels)[None], tuple(len(row) for row in tokens))
        pad = torch.nn.utils.rnn.pad_sequence
        return Batch(pad(tokens, True, 0), pad(labels, True, IGNORE_INDEX), None)


META_TYPES = {"checkpoint": str, "tokenizer": str, "prompt_style": str, "mask_inputs": bool, "max_seq_length": int}


def open_prepared(
    data_dir: Path, tokenizer: Tokenizer, max_length: int, vocab_size: int
) -> tuple[PreparedSet, PreparedSet, dict[str, Any]]:
    """The two parts of a prepared set and its meta data, for a model of `vocab_size` embeddings.

    Raises ValueError if it was made for another tokenizer, or is no prepared set.
    """
    if not (data_dir / META).is_file():
        raise ValueError(
            f"{data_dir} holds no prepared data ({META} is missing); run scripts/prepare_alpaca.py or "
            f"scripts/prepare_json.py with --destination_path {data_dir}"
        )
    meta = files.read_json(data_dir / META)
    types = {**META_TYPES, TRAIN: dict, TEST: dict}
    wrong = [key for key, kind in types.items() if key in meta and not isinstance(meta[key], kind)]
    wrong = wrong or [part for part in (TRAIN, TEST) if not isinstance(meta.get(part, {}).get("truncated", 0), int)]
    if wrong:
        raise ValueError(f"{data_dir / META}: {', '.join(wrong)} is not what this project writes; prepare it again")
    if meta.get("tokenizer") != tokenizer.fingerprint:
        raise ValueError(
            f"{data_dir} was prepared with the tokenizer of {meta.get('checkpoint')!r}, which is not this model's; "
            "prepare it again with this --checkpoint_dir"
        )
    if (ends := [tokenizer.first_id, tokenizer.eos_id]) != meta.get("ends", ends):
        raise ValueError(
            f"{data_dir} was prepared for {meta.get('checkpoint')!r}, whose rows begin and end with other tokens than "
            f"this model's (here {ends}, or none); prepare it again with this --checkpoint_dir"
        )
    if missing := sorted(set(types) - set(meta)):
        raise ValueError(f"{data_dir / META} has no {', '.join(missing)}; prepare it again")
    how = {"mask_inputs": meta["mask_inputs"], "max_length": max_length, "vocab_size": vocab_size}
    return PreparedSet(data_dir / TRAIN, **how), PreparedSet(data_dir / TEST, **how), meta
