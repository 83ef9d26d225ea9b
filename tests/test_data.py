"""Rows in, tokens and labels out; and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SHARED

from lit_gpt import data
from lit_gpt.data import PreparedSet
from lit_gpt.model import IGNORE_INDEX
from lit_gpt.prompts import alpaca
from lit_gpt.tokenizer import Tokenizer

ROW = {"instruction": "Say hello.", "input": "", "output": "Hello."}


def test_a_row_is_prompt_then_answer_then_end(stories: Path) -> None:
    tokenizer = Tokenizer(stories)
    (encoded,) = data.encode([[ROW]], tokenizer, "alpaca", 512)
    prompt = tokenizer.encode(alpaca("Say hello."))
    answer = tokenizer.encode("Hello.", bos=False)
    assert encoded.tokens.tolist() == [*prompt, *answer, tokenizer.eos_id]
    assert encoded.prompt_lengths.tolist() == [len(prompt)]
    assert prompt[0] == tokenizer.bos_id


@pytest.mark.parametrize("mask", [True, False])
def test_labels_are_the_next_tokens_of_the_answer(prepared: Path, mask: bool) -> None:
    rows = PreparedSet(prepared / "train.pt", mask_inputs=mask, max_length=512)
    tokens, labels = rows.row(0)
    prompt, answer = rows.prompt_and_answer(0)
    assert [*tokens.tolist(), answer[-1]] == [*prompt, *answer]
    asked = labels[labels != IGNORE_INDEX].tolist()
    assert asked == (answer if mask else [*prompt[1:], *answer])
    assert labels[-len(answer) :].tolist() == answer


def test_cutting_keeps_the_end_of_text(stories: Path) -> None:
    tokenizer = Tokenizer(stories)
    (whole,) = data.encode([[ROW]], tokenizer, "plain", 512)
    (cut,) = data.encode([[ROW]], tokenizer, "plain", len(whole.tokens) - 2)
    assert cut.n_truncated == 1
    assert cut.tokens.tolist() == [*whole.tokens[:-3].tolist(), tokenizer.eos_id]


def test_a_prepared_row_is_cut_again_when_trained_shorter(prepared: Path) -> None:
    whole = PreparedSet(prepared / "train.pt", mask_inputs=False, max_length=512)
    short = PreparedSet(prepared / "train.pt", mask_inputs=False, max_length=20)
    assert int(short.lengths().max()) == 20
    assert short.row(0)[0].tolist() == whole.row(0)[0][:19].tolist()
    assert int(short.row(0)[1][-1]) == int(whole.row(0)[1][-1])


def test_a_row_without_room_for_an_answer_teaches_nothing(prepared: Path) -> None:
    n_prompt = int(PreparedSet(prepared / "train.pt", mask_inputs=True, max_length=512).prompt_lengths[0])
    for room, asked in ((-3, 0), (0, 0), (1, 0), (2, 2), (3, 3)):
        rows = PreparedSet(prepared / "train.pt", mask_inputs=True, max_length=n_prompt + room)
        assert int((rows.row(0)[1] != IGNORE_INDEX).sum()) == asked
    assert rows.n_without_labels() < len(rows)


def test_padding_asks_nothing(prepared: Path) -> None:
    rows = PreparedSet(prepared / "train.pt", mask_inputs=True, max_length=512)
    padded, packed = rows.batch([0, 1, 2], packing=False), rows.batch([0, 1, 2], packing=True)
    assert padded.n_labels == packed.n_labels
    for index in range(3):
        tokens, labels = rows.row(index)
        assert torch.equal(padded.tokens[index, : len(tokens)], tokens)
        assert torch.equal(padded.labels[index, : len(labels)], labels)
        assert (padded.labels[index, len(labels) :] == IGNORE_INDEX).all()
    assert packed.lengths == tuple(len(rows.row(index)[0]) for index in range(3))


def test_the_split_is_seeded_and_loses_nothing() -> None:
    records = [{"instruction": str(n), "input": "", "output": "x"} for n in range(50)]
    train, test = data.split(records, 0.1, 42)
    assert len(test) == 5
    assert sorted(int(row["instruction"]) for row in train + test) == list(range(50))
    assert data.split(records, 0.1, 42) == (train, test)
    assert data.split(records, 0.1, 43) != (train, test)


@pytest.mark.parametrize("n", [2, 3])
def test_tiny_sets_split_into_two_parts(n: int) -> None:
    train, test = data.split([ROW] * n, 0.03865, 42)
    assert train
    assert test
    assert len(train) + len(test) == n


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no rows"),
        ("", "no rows"),
        ("[1]", "row 1: expected an object"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "row 2: 'output' is missing"),
        ('[{"instruction": "a", "output": ""}]', "row 1: 'output' is empty"),
        ('[{"instruction": "", "output": "b"}]', "row 1: 'instruction' is empty"),
        ('[{"instruction": ["a"], "output": "b"}]', "'instruction' must be text, not list"),
        ('[{"instruction": "a", "output": 5}]', "'output' must be text, not int"),
        ('[{"instruction": "a"', "no valid JSON"),
        ('{"instruction": "a", "output": "b"}\n{"instruction"', "line 2: no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
    ],
)
def test_bad_rows_are_refused_with_their_number(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        data.read_records(tmp_path / "rows.json")


def test_lines_and_lists_read_alike(tmp_path: Path) -> None:
    rows = [ROW, {"instruction": "é\u2028", "output": "ü"}]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    (tmp_path / "b.jsonl").write_text(lines, encoding="utf-8-sig")
    assert data.read_records(tmp_path / "a.json") == data.read_records(tmp_path / "b.jsonl")
    assert data.read_records(tmp_path / "a.json")[1]["input"] == ""


def test_nothing_is_written_when_a_row_is_too_long(stories: Path, tmp_path: Path) -> None:
    rows = [ROW, {"instruction": "word " * 1000, "input": "", "output": "x"}]
    with pytest.raises(ValueError, match=r"row 2: the prompt alone has .* tokens"):
        data.prepare(rows, [ROW], tmp_path, stories, mask_inputs=True, max_seq_length=None, style="alpaca")
    assert not list(tmp_path.iterdir())


def test_data_of_another_tokenizer_is_refused(prepared: Path, stories: Path, tmp_path: Path) -> None:
    meta = json.loads((prepared / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "tokenizer": "other"}))
    with pytest.raises(ValueError, match="prepare it again"):
        data.open_prepared(tmp_path, Tokenizer(stories), 512, 512)


def test_so_is_that_of_one_whose_texts_end_otherwise(prepared: Path, stories: Path, tmp_path: Path) -> None:
    """A base and its chat model may share tokenizer.json, and differ in the files beside it."""
    other = Path(shutil.copytree(stories, tmp_path / "other"))
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<unk>"}))
    (other / "special_tokens_map.json").unlink(missing_ok=True)
    assert Tokenizer(other).fingerprint == Tokenizer(stories).fingerprint
    data.open_prepared(prepared, Tokenizer(stories), 512, 512)
    with pytest.raises(ValueError, match="begin and end with other tokens"):
        data.open_prepared(prepared, Tokenizer(other), 512, 512)


def test_the_template_is_alpacas() -> None:
    file = SHARED / "instruct" / "alpaca_tiny_torchtune.json"
    if not file.is_file():
        pytest.skip(f"the golden prompts are not here: {file}")
    for row in json.loads(file.read_text()):
        assert row["text"].startswith(alpaca(row["instruction"], row["input"]))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_as_they_do_anywhere(end: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(end.join([json.dumps(ROW)] * 3).encode())
    assert data.read_records(tmp_path / "rows.jsonl") == [data.check_record(ROW, "")] * 3
