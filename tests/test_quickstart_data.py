"""The shipped data is what its script makes, and its labels are what the messages say."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, load_script

from lit_gpt.prompts import alpaca

SHIPPED = ROOT / "data" / "quickstart"


def rows(name: str) -> list[dict[str, str]]:
    return json.loads((SHIPPED / f"{name}.json").read_text(encoding="utf-8"))


def test_the_script_makes_the_same_bytes(tmp_path: Path) -> None:
    load_script("scripts/make_quickstart_data").main(destination_path=tmp_path)
    for name in ("train.json", "test.json"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes()


def named(name: str) -> tuple[list[str], list[str]]:
    """The people of all rows, and their places' first words."""
    fields = [json.loads(row["output"]) for row in rows(name)]
    return [row["person"] for row in fields], [row["place"].split()[0] for row in fields]


def test_the_test_messages_are_new_and_half_of_the_names_too() -> None:
    assert not {row["input"] for row in rows("train")} & {row["input"] for row in rows("test")}
    script, train, test = load_script("scripts/make_quickstart_data"), named("train"), named("test")
    for words, trained, tested in zip((script.PEOPLE, script.NAMES), train, test, strict=True):
        assert len(set(words)) == len(words)
        strangers = [word for word in tested if word not in script.known(words)]
        assert len(strangers) == len(tested) // 2
        assert not set(strangers) & set(trained)


def test_no_name_alone_decides_the_score() -> None:
    for tested in named("test"):
        assert Counter(tested).most_common(1)[0][1] <= len(tested) // 20


def time_in(message: str) -> str:
    """The time of day that a message names, read in another way than it was written."""
    if "noon" in message.replace("afternoon", ""):
        return "12:00"
    if found := re.search(r"half past (\d+) in the (morning|afternoon)", message):
        hour, minute = int(found[1]), 30
        half = "am" if found[2] == "morning" else "pm"
    else:
        found = re.search(r"at (\d+)(?::(\d\d))?(?: ?(am|pm))?(?![\d:])", message)
        assert found, message
        hour, minute, half = int(found[1]), int(found[2] or 0), found[3]
    if half:
        hour = hour % 12 + (12 if half == "pm" else 0)
    return f"{hour:02}:{minute:02}"


@pytest.mark.parametrize("name", ["train", "test"])
def test_labels_are_what_the_message_says(name: str) -> None:
    for row in rows(name):
        fields = json.loads(row["output"])
        assert list(fields) == ["event", "person", "day", "time", "place"]
        assert fields["time"] == time_in(row["input"]), row
        for key in ("event", "person", "day", "place"):
            assert fields[key].lower() in row["input"].lower()


def test_the_task_asks_as_the_adapter_is_trained() -> None:
    import yaml

    text = (ROOT / "eval" / "tasks" / "quickstart.yaml").read_text().replace("!function ", "")
    prompt = yaml.safe_load(text)["doc_to_text"].replace("{{instruction}}", "I").replace("{{input}}", "J")
    assert prompt == alpaca("I", "J")
