"""Files from strangers: whatever is in them, a reader gives its result or one ValueError that names the file.

No traceback of another kind, no hang, no memory beyond twice the file. Each reader is given files that are good but for
a few changes: `make fuzz` tries tens of thousands, the tests that run every time a few hundred.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import ROWS, STORIES
from fuzzing import (
    byte_edits,
    change_record,
    json_edits,
    read_safetensors,
    spoil_bytes,
    spoil_json,
    to_json,
    to_safetensors,
    watched,
)
from hypothesis import HealthCheck, Phase, given, settings
from safetensors.torch import load_file, save_file
from test_gguf import write_gguf

from lit_gpt import checkpoint, cli, data, files, lora, sources
from lit_gpt.adapter import Adapter
from lit_gpt.args import EvalArgs, TrainArgs
from lit_gpt.config import Config
from lit_gpt.finetuning import plain, to_yaml
from lit_gpt.interop.gguf import open_gguf
from lit_gpt.lora import LoRASettings
from lit_gpt.tokenizer import Tokenizer

FEW, MANY = 40, int(os.environ.get("FUZZ", 1000))  # examples for each reader, of six files or so
TINY = Config(n_layer=2, n_head=2, n_embd=16, vocab_size=512, block_size=64, intermediate_size=24)


def tiny_folder(folder: Path) -> Path:
    """A checkpoint of a few kilobytes, so that what is read of it weighs nothing."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((STORIES / name).read_bytes())
    model = checkpoint.hollow(TINY).to_empty(device="cpu")
    state = {name: torch.ones(p.shape) for name, p in checkpoint.parameter_metas(model).items()}
    files.save(folder / files.LIT_MODEL, state)
    checkpoint.save_config(folder, TINY)
    return folder


def hf_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for file in STORIES.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = list(load_file(STORIES / "model.safetensors").items())
    for number, part in enumerate((tensors[:20], tensors[20:]), start=1):
        save_file({n: t[:2].contiguous() for n, t in part}, folder / f"m-{number}.safetensors")
    names = {name: f"m-{1 if index < 20 else 2}.safetensors" for index, (name, _) in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def adapter(folder: Path) -> None:
    model, told = checkpoint.load_model(folder, torch.float32), ("m", "", "alpaca", "32-true", None, 1)
    lora.attach(model, LoRASettings(r=2))
    Adapter(lora.adapter_state(model), LoRASettings(r=2), *told).save(folder / files.ADAPTER)


def read_adapter(folder: Path) -> None:
    read = Adapter.load(folder / files.ADAPTER)
    model = checkpoint.hollow(TINY)
    lora.check_fit(model, read.settings, read.state, folder)
    lora.attach(model.to_empty(device="cpu"), read.settings)
    lora.load_adapter_state(model, read.state, folder)


def quantized(folder: Path) -> None:
    checkpoint.save_quantized(folder, "bnb.int8", lambda done, total: None)


def read_quantized(folder: Path) -> None:
    checkpoint.load_model(folder, torch.float32, quantize="bnb.int8")


def prepared(folder: Path) -> None:
    (folder / "rows.json").write_text(json.dumps(ROWS))
    rows = data.read_records(folder / "rows.json")
    limits: dict[str, Any] = {"mask_inputs": True, "max_seq_length": 64, "style": "plain"}
    data.prepare(rows[2:], rows[:2], folder, folder, **limits)


def read_prepared(folder: Path) -> None:
    train, test, _ = data.open_prepared(folder, Tokenizer(folder), 64, TINY.vocab_size)
    for part in (train, test):
        batch = part.batch(list(range(min(len(part), 100))), packing=True)
        assert 0 <= batch.tokens.min() <= batch.tokens.max() < TINY.vocab_size


def read_rows(folder: Path) -> None:
    rows = data.read_records(folder / "rows.json")
    Tokenizer(STORIES).encode_batch([row["instruction"] + row["output"] for row in rows[:50]])


def read_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    tokenizer.decode(tokenizer.encode("Once upon a time é 😀"))
    assert all(index >= 0 for index in tokenizer.stop_ids)


def read_gguf(folder: Path) -> None:
    with open_gguf(folder / "m.gguf") as source:
        source.write_tokenizer(folder)
        checkpoint.Weights(source, source.config)
        for name in list(source.metas)[:4]:
            source.read(name)


TRAIN, EVAL = TrainArgs(), EvalArgs()


def script(
    checkpoint_dir: Path = Path("x"),
    precision: str | None = None,
    seed: int = 1,
    lora_query: bool = True,
    train: TrainArgs = TRAIN,
    eval: EvalArgs = EVAL,
) -> None:
    """A script that does nothing with its flags."""


def read_hyperparameters(folder: Path) -> None:
    path = folder / files.HYPERPARAMETERS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", "--config", str(path)])
        said: list[str] = []
        patch.setattr("sys.stderr", type("Heard", (), {"write": lambda _, text: said.append(text), "flush": id})())
        with pytest.raises(SystemExit) as stop:
            cli.run(script)
    if stop.value.code:
        raise ValueError("".join(said))


SETTINGS = {"checkpoint_dir": "x", "precision": None, "seed": 1, "lora_query": True}


class Reader(NamedTuple):
    """A kind of file: how a good folder is made, which file of it is spoilt, and how it is read."""

    make: Callable[[Path], Any]
    file: str
    read: Callable[[Path], Any]
    structure: str = "json"  # a key of BY_PARTS; "" for a file that is bytes alone
    share: float = 1.0  # of the examples: less for those that are slow to read


def with_tiny(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: make(tiny_folder(folder))


def lines(folder: Path) -> None:
    (folder / "rows.json").write_text("\n".join(json.dumps(row) for row in ROWS))


READERS = {
    "rows": Reader(with_tiny(prepared), "rows.json", read_rows),
    "row lines": Reader(with_tiny(lines), "rows.json", read_rows, ""),
    "lit config": Reader(tiny_folder, files.LIT_CONFIG, lambda f: checkpoint.Weights.from_folder(f)),
    "lit model": Reader(tiny_folder, files.LIT_MODEL, lambda f: checkpoint.load_model(f, torch.float32), "pickle"),
    "config": Reader(hf_folder, files.HF_CONFIG, checkpoint.load_config),
    "index": Reader(hf_folder, "model.safetensors.index.json", sources.FolderSource),
    "safetensors": Reader(hf_folder, "m-1.safetensors", sources.FolderSource, "safetensors"),
    "tokenizer": Reader(hf_folder, "tokenizer.json", read_tokenizer),
    "tokenizer config": Reader(hf_folder, "tokenizer_config.json", read_tokenizer),
    "generation config": Reader(hf_folder, "generation_config.json", read_tokenizer),
    "adapter": Reader(with_tiny(adapter), files.ADAPTER, read_adapter, "pickle"),
    "quantized weights": Reader(with_tiny(quantized), files.quantized_name("bnb.int8"), read_quantized, "pickle"),
    "prepared set": Reader(with_tiny(prepared), data.TRAIN, read_prepared, "pickle"),
    "prepared set's tokens": Reader(with_tiny(prepared), data.TRAIN, read_prepared, "numbers"),
    "prepared meta": Reader(with_tiny(prepared), data.META, read_prepared),
    "gguf": Reader(lambda f: (f.mkdir(), write_gguf(f / "m.gguf")), "m.gguf", read_gguf, "gguf"),
    "hyperparameters": Reader(
        lambda f: (
            f.mkdir(),
            (f / files.HYPERPARAMETERS).write_text(to_yaml(plain({**SETTINGS, "train": TRAIN, "eval": EVAL}))),
        ),
        files.HYPERPARAMETERS,
        read_hyperparameters,
        "yaml",
        share=0.2,
    ),
}


def of_gguf(good: bytes, edits: Any, parts: Any) -> bytes:
    end = good.rindex(b"ffn_down.weight") + 60  # of the header: what follows are numbers
    return spoil_bytes(good[:end], edits) + good[end:]


def of_safetensors(good: bytes, edits: Any, parts: Any) -> bytes:
    header, rest = read_safetensors(good)
    return to_safetensors(spoil_json(header, parts), rest)


BY_PARTS: dict[str, Callable[[bytes, Any, Any], bytes]] = {  # how a file is spoilt that is more than bytes
    "json": lambda good, edits, parts: to_json(spoil_json(json.loads(good), parts)),
    "yaml": lambda good, edits, parts: to_json(spoil_json(yaml.safe_load(good), parts)),
    "gguf": of_gguf,
    "safetensors": of_safetensors,
    "pickle": lambda good, edits, parts: change_record(good, lambda record: spoil_bytes(record, edits)),
    "numbers": lambda good, edits, parts: change_record(
        good, lambda record: spoil_bytes(record, edits), f"data/{len(parts) % 3}"
    ),
}


def refusal(read: Callable[[Path], Any], folder: Path) -> str | None:
    """What a reader says against a folder; whatever else than a ValueError it raises is a failure."""
    try:
        read(folder)
    except ValueError as error:
        return str(error)
    return None


def fuzz(reader: Reader, folder: Path, n_examples: int) -> None:
    """An example is several files: with one change more each, of its bytes and, where it has any, of its parts."""
    reader.make(folder)
    path = folder / reader.file
    good = path.read_bytes()
    reader.read(folder)  # a good file is read; and what is imported on first use is there
    ways = [lambda good, edits, parts: spoil_bytes(good, edits), *filter(None, [BY_PARTS.get(reader.structure)])]

    @settings(
        max_examples=max(1, round(n_examples * reader.share)),
        deadline=None,
        database=None,
        derandomize=n_examples == FEW,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(byte_edits, json_edits)
    def every_file_is_read_or_refused(edits: Any, parts: Any) -> None:
        for n in range(1, max(len(edits), len(parts)) + 1):
            for way in ways:
                path.write_bytes(way(good, edits[:n], parts[:n]))
                with watched(path.stat().st_size):
                    told = refusal(reader.read, folder)
                assert told is None or str(folder) in told

    every_file_is_read_or_refused()


@pytest.mark.parametrize("name", READERS)
def test_a_few_spoilt_files(name: str, tmp_path: Path) -> None:
    fuzz(READERS[name], tmp_path / "m", FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_spoilt_files(name: str, tmp_path: Path) -> None:
    fuzz(READERS[name], tmp_path / "m", MANY)
