"""What a hostile file could try, each thing by name; `test_fuzz.py` tries what nobody thought of."""

import hashlib
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import STORIES
from fuzzing import change_record, read_safetensors, to_safetensors, watched
from safetensors.torch import save_file
from test_checkpoint import Bomb, copy
from test_fuzz import READERS, TINY, adapter, prepared, quantized, read_quantized, script, tiny_folder
from test_gguf import write_gguf

from lit_gpt import checkpoint, cli, data, files, lora, merging, resume
from lit_gpt.adapter import Adapter
from lit_gpt.config import ROPE_NEEDS, Activation, Config
from lit_gpt.interop.gguf import open_gguf
from lit_gpt.lora import LoRASettings
from lit_gpt.sources import FolderSource
from lit_gpt.tokenizer import Tokenizer

GIB = 2**30


def refused(read: Callable[[], Any], name: str, message: str, n_bytes: int = 0) -> None:
    """The reader says what is wrong and with which file, having taken no memory to speak of."""
    with watched(n_bytes), pytest.raises(ValueError, match=message) as told:
        read()
    assert name in str(told.value)


# --- pickles and archives --------------------------------------------------------------------------------------------


def load(folder: Path) -> object:
    return checkpoint.load_model(folder, torch.float32)


def load_adapter(folder: Path) -> object:
    return Adapter.load(folder / files.ADAPTER)


def load_prepared(folder: Path) -> object:
    return data.PreparedSet(folder / data.TRAIN, mask_inputs=True, max_length=64)


QUANTIZED, STATE = files.quantized_name("bnb.int8"), files.state_name(7)
PICKLES = {
    files.LIT_MODEL: load,
    "pytorch_model.bin": load,
    files.ADAPTER: load_adapter,
    data.TRAIN: load_prepared,
    QUANTIZED: read_quantized,
    STATE: resume.find,
}


def seal(path: Path) -> None:
    """Whoever makes a training state makes its checksum too."""
    if path.name == STATE:
        content = path.read_bytes()
        path.write_bytes(content + hashlib.sha256(content).digest())


class Greedy:
    """Unpickled, it asks for as much memory as it likes; torch's own list of harmless names has it."""

    def __init__(self, n_bytes: int):
        self.n_bytes = n_bytes

    def __reduce__(self) -> tuple:
        return bytearray, (self.n_bytes,)


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("how", ["torch", "pickle"])
@pytest.mark.parametrize("what", ["code", "memory"])
def test_pickles_run_no_code_and_take_no_memory(tmp_path: Path, name: str, how: str, what: str) -> None:
    folder = tiny_folder(tmp_path / "m")
    if name == "pytorch_model.bin":
        (folder / files.LIT_MODEL).unlink()
    bomb = {"model": Bomb(tmp_path / "hit") if what == "code" else Greedy(GIB)}
    if how == "torch":
        torch.save(bomb, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(bomb, protocol=2))
    seal(folder / name)
    refused(lambda: PICKLES[name](folder), name, "was not loaded: it (holds objects|is a bare pickle)")
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize("name", PICKLES)
def test_packed_archives_are_not_unpacked(tmp_path: Path, name: str) -> None:
    folder = tiny_folder(tmp_path / "m")
    if name == "pytorch_model.bin":
        (folder / files.LIT_MODEL).unlink()
    torch.save({"x": torch.zeros(5_000_000)}, folder / name)
    packed = change_record((folder / name).read_bytes(), lambda record: record, packing=zipfile.ZIP_DEFLATED)
    (folder / name).write_bytes(packed)
    seal(folder / name)
    assert (folder / name).stat().st_size < 200_000
    refused(lambda: PICKLES[name](folder), name, "was not loaded: its records are packed")


def test_names_in_another_case_are_not_passed_over(tmp_path: Path) -> None:
    """torch would find either; so there must be one alone."""
    torch.save({"x": torch.zeros(3)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth", "a") as archive:
        archive.writestr("a/Data.PKL", pickle.dumps(Greedy(GIB), protocol=2))
    refused(lambda: files.load_dict(tmp_path / "a.pth"), "a.pth", "records are packed, or overlap")


def test_every_dtype_of_weights_is_read(tmp_path: Path) -> None:
    kinds = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 bool".split()
    state = {kind: torch.ones(3).to(getattr(torch, kind)) for kind in kinds}
    torch.save(
        {**state, "parameter": torch.nn.Parameter(torch.ones(2)), "size": state["bool"].shape}, tmp_path / "a.pth"
    )
    got = files.load_dict(tmp_path / "a.pth", mmap=True)
    assert all(torch.equal(got[kind].float(), torch.ones(3)) and got[kind].dtype == state[kind].dtype for kind in kinds)


def test_a_few_numbers_cannot_claim_to_be_many(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1).expand(GIB, 8)}, tmp_path / "a.pth")
    refused(lambda: files.load_dict(tmp_path / "a.pth"), "a.pth", "claims tensors of 34,359,738,368")
    weight = torch.zeros(100, 100)
    torch.save({"wte": weight, "lm_head": weight}, tmp_path / "tied.pth")
    assert len(files.load_dict(tmp_path / "tied.pth")) == 2


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_links_do_not_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = copy(tmp_path / "m")
    secret = (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(secret)
    reads = [checkpoint.fingerprint, Tokenizer, lambda f: files.copy_companions(f, tmp_path / "copied")]
    for read in reads[:1] if name == "model.safetensors" else reads[1:2] if name == "tokenizer.json" else reads[2:]:
        refused(lambda read=read: read(folder), name, "is a link that leads out of its folder", 2**20)
    (folder / name).unlink()
    (folder / name).symlink_to(secret.rename(folder / "kept"))  # within it they may
    assert checkpoint.fingerprint(folder) == checkpoint.fingerprint(STORIES)


def test_the_hubs_own_cache_is_read_with_its_links(tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--stories"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in STORIES.iterdir():
        (blobs / f"hash-of-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    assert checkpoint.fingerprint(snapshot) == checkpoint.fingerprint(STORIES)
    Tokenizer(snapshot)
    files.copy_companions(snapshot, tmp_path / "copied")
    assert not (tmp_path / "copied" / "config.json").is_symlink()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../x.safetensors"}}, "outside the folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside the folder"),
        ({"weight_map": {"a": "x\0.safetensors"}}, "outside the folder"),
        ({"weight_map": {"a": ".."}}, r"files that are no \*\.safetensors"),
        ({"weight_map": {"a": "config.json"}}, r"files that are no \*\.safetensors"),
        ({"weight_map": {"a": 1}}, "no weight_map"),
        ({"weight_map": ["a"]}, "no weight_map"),
        ({}, "no weight_map"),
    ],
)
def test_indices_name_files_of_their_folder(tmp_path: Path, index: Any, message: str) -> None:
    folder = copy(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: FolderSource(folder), "model.safetensors.index.json", message)


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def changed(good: bytes) -> bytes:
        told, rest = read_safetensors(good)
        change(told)
        return to_safetensors(told, rest)

    return changed


@pytest.mark.parametrize(
    "spoil",
    [
        lambda good: struct.pack("<Q", 2**62) + good[8:],
        lambda good: struct.pack("<Q", 90_000_000) + good[8:],
        lambda good: b"",
        header(lambda told: told["a"].update(shape=[2**40, 2**40])),
        header(lambda told: told["a"].update(shape=[2**64 - 1, 0])),
        header(lambda told: told["a"].update(shape=[-1])),
        header(lambda told: told["a"].update(data_offsets=[0, 2**50])),
        header(lambda told: told["b"].update(data_offsets=[0, 24])),  # a's bytes too
        header(lambda told: told["a"].update(dtype="F7")),
        header(lambda told: told.pop("a")),
    ],
)
def test_safetensors_headers_are_checked(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(6)}, path)
    path.write_bytes(spoil(path.read_bytes()))
    refused(lambda: FolderSource(tmp_path), "m.safetensors", "broken or incomplete|impossible shape")


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "n_layer must lie between 1 and 1,000"),
        ({"num_hidden_layers": -1}, "n_layer must lie"),
        ({"num_hidden_layers": "5"}, "n_layer must be a whole number, not '5'"),
        ({"num_hidden_layers": True}, "n_layer must be a whole number"),
        ({"num_hidden_layers": 900}, r"900 layers and \d+ tensors"),
        ({"hidden_size": 0}, "n_embd must lie"),
        ({"hidden_size": 2**40}, "n_embd must lie"),
        ({"hidden_size": 65}, "n_embd 65 is no multiple of n_head 8"),
        ({"num_attention_heads": 7, "hidden_size": 70}, "no multiple of n_query_groups"),
        ({"num_key_value_heads": -2}, "n_query_groups must lie"),
        ({"vocab_size": 10**12}, "vocab_size must lie"),
        ({"max_position_embeddings": 0}, "block_size must lie"),
        ({"intermediate_size": 2**50}, "intermediate_size must lie"),
        ({"rms_norm_eps": float("nan")}, "norm_eps must be a number"),
        ({"rms_norm_eps": "small"}, "norm_eps must be a number"),
        ({"rope_theta": "10000"}, "rope_theta must be int or float, not str"),
        ({"rope_theta": float("inf")}, "rope_base must be a number"),
        ({"rope_scaling": [1]}, "rope_scaling must be dict, not list"),
        ({"rope_scaling": {"rope_type": "linear"}}, "of the type linear has no factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor cannot be 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "factor cannot be 'x'"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "makes no sense"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0]}}, "rope_scaling"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be bool, not str"),
        ({"hidden_act": ["silu"]}, "hidden_act must be str, not list"),
        ({"model_type": ["llama"]}, "model_type must be str"),
        ({"head_dim": 3, "hidden_size": 64}, "has no pairs"),
        (
            {"model_type": "mixtral", "num_local_experts": 10**6, "num_experts_per_tok": 1},
            "layers of|lie",
        ),
        ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 9}, "9 of 4 experts"),
    ],
)
def test_sizes_that_make_no_model_are_refused_before_memory_is_taken(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = copy(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    refused(lambda: checkpoint.Weights.from_folder(folder), str(folder), message, 2**20)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"num_hidden_layers": ' + "9" * 5000 + "}",
        "\xff",
        '{"a": 1',
        "null",
        "[]",
        "",
    ],
)
@pytest.mark.parametrize("name", ["config.json", "lit_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_json_that_is_none_is_refused_by_name(tmp_path: Path, name: str, text: str) -> None:
    folder = copy(tmp_path / "m")
    (folder / name).write_bytes(text.encode("latin-1"))
    read = Tokenizer if "tokenizer" in name else checkpoint.load_config
    refused(lambda: read(folder), name, "valid JSON|cannot be read|is broken|no JSON object", 2**20)


def test_the_tables_of_the_config_are_those_of_the_model() -> None:
    from typing import get_args

    from lit_gpt import config, model, ops, rope

    hints = config._hints()
    assert set(get_args(hints["norm"])) == set(model.NORMS)
    assert {*get_args(hints["mlp"]), "moe"} == set(model.MLPS)
    assert set(get_args(Activation)) == set(ops.ACTIVATIONS)
    assert {*ROPE_NEEDS, "default"} == set(rope.SCALINGS)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tokenizer_config.json", "bos_token", 5),
        ("tokenizer_config.json", "add_bos_token", "yes"),
        ("tokenizer_config.json", "added_tokens_decoder", []),
        ("tokenizer_config.json", "chat_template", {"a": 1}),
        ("generation_config.json", "eos_token_id", "2"),
        ("config.json", "bos_token_id", 1.5),
    ],
)
def test_settings_of_the_wrong_type_are_named(tmp_path: Path, name: str, key: str, value: Any) -> None:
    folder = copy(tmp_path / "m")
    settings = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**settings, key: value}))
    refused(lambda: Tokenizer(folder), str(folder / name), f"{key} must be", 2**20)


def test_ids_beyond_the_vocabulary_are_no_ids(tmp_path: Path) -> None:
    folder = copy(tmp_path / "m")
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 10**6, -1], "pad_token_id": -1}))
    tokenizer = Tokenizer(folder)
    assert tokenizer.stop_ids == {2}
    assert tokenizer.pad_id is None


# --- adapters, prepared sets, quantized weights, flags ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["lora"].update(r=10**9), r"no factor of rank 1000000000"),
        (lambda content: content["lora"].update(r="2"), "LoRA's r cannot be of the type str"),
        (lambda content: content["lora"].update(alpha=float("nan")), "lora_alpha must be a number"),
        (lambda content: content["lora"].update(targets=[["query"]]), "no LoRA adapter"),
        (lambda content: content["lora"].update(unknown=1), "no LoRA adapter"),
        (lambda content: content.update(lora=[]), "no LoRA adapter"),
        (lambda content: content.update(model=[1]), "a.pth|adapter"),
        (lambda content: content["model"].update({"transformer.wte.weight": torch.zeros(2, 2)}), "no factor"),
        (lambda content: content["model"].update({5: torch.zeros(2, 2)}), "5 is no factor"),
        (lambda content: content["model"].update({"x.lora_A": "text"}), "no factor"),
        (lambda content: content.update(step="1"), "step cannot be of the type str"),
        (lambda content: content.update(quantize=4), "quantize cannot be of the type int"),
    ],
)
def test_adapters_are_checked(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    adapter(tiny_folder(tmp_path / "m"))
    path = tmp_path / "m" / files.ADAPTER
    content = files.load_dict(path)
    change(content)
    files.save(path, content)
    refused(lambda: Adapter.load(path), files.ADAPTER, message)


def test_factors_are_held_against_the_model_before_there_is_memory_for_them(tmp_path: Path) -> None:
    """A long thin factor is a small file, and would ask for as long a one in every wide layer."""
    folder = tiny_folder(tmp_path / "m")
    state = {"transformer.h.0.attn.q.lora_A": torch.zeros(10**6, 1), "x.lora_B": torch.zeros(1, 10**6)}
    told = ("m", checkpoint.fingerprint(folder), "alpaca", "32-true", None, 1)
    hostile = Adapter(state, LoRASettings(r=10**6), *told)
    model = checkpoint.load_model(folder, torch.float32)
    refused(lambda: hostile.attach(model, folder, Path("a.pth")), "a.pth", "does not fit this model")
    with pytest.raises(ValueError, match="does not fit this model"):
        merging.merge_folder(folder, hostile, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": torch.tensor([0, 5, 3])}, "3 offsets for"),
        ({"tokens": torch.zeros(3)}, r"tokens is no flat tensor of torch\.int32"),
        ({"tokens": "text"}, "tokens is no flat tensor"),
        ({"prompt_lengths": torch.zeros(0, dtype=torch.int32)}, "offsets for 0 rows"),
        ({}, "offsets is no flat tensor"),
    ],
)
def test_prepared_sets_of_other_shapes_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    prepared(tiny_folder(tmp_path / "m"))
    state = {**files.load_dict(tmp_path / "m" / data.TRAIN), **change}
    files.save(tmp_path / "m" / data.TRAIN, state if change else {"tokens": state["tokens"]})
    refused(lambda: load_prepared(tmp_path / "m"), data.TRAIN, message)


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("offsets", 1, 10**9, "offsets do not rise"),
        ("offsets", 1, 0, "offsets do not rise"),
        ("offsets", 0, -1, "offsets do not rise"),
        ("offsets", -1, 10**12, "offsets do not rise"),
        ("prompt_lengths", 0, 10**6, "no prompt or no answer"),
        ("prompt_lengths", 0, -5, "no prompt or no answer"),
        ("tokens", 3, -1, "row 1: its tokens lie between -1 and"),
        ("tokens", 3, 512, "512, and the model has 512 embeddings"),
    ],
)
def test_prepared_sets_stay_within_their_tokens(tmp_path: Path, name: str, at: int, value: int, message: str) -> None:
    folder = tiny_folder(tmp_path / "m")
    prepared(folder)
    state = files.load_dict(folder / data.TRAIN)
    state[name][at] = value
    files.save(folder / data.TRAIN, state)

    def read() -> None:
        data.open_prepared(folder, Tokenizer(folder), 64, TINY.vocab_size)[0].row(0)

    refused(read, data.TRAIN, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.update({"transformer.h.0.attn.q.weight": torch.zeros(1, 1)}), r"attn\.q\.weight"),
        (lambda weights: weights.pop("transformer.h.0.attn.q.scale"), r"attn\.q\.scale"),
        (lambda weights: weights.update({"training": torch.zeros(1)}), "training"),
        (lambda weights: weights.update({"transformer.ln_f.weight": torch.zeros(9)}), r"ln_f\.weight"),
        (lambda weights: weights.update({"transformer.ln_f.weight": 1}), "holds no quantized weights"),
    ],
)
def test_kept_quantized_weights_must_fit(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    folder = tiny_folder(tmp_path / "m")
    quantized(folder)
    content = files.load_dict(folder / QUANTIZED)
    change(content["weights"])
    files.save(folder / QUANTIZED, content)
    refused(lambda: read_quantized(folder), QUANTIZED, message)


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, "aliases"),
        ("seed: !!python/object/apply:os.mkdir [hit]\n", "could not determine a constructor"),
        ("seed: " + "[" * 100_000, "nesting"),
        ("seed: " + "9" * 5000, "4300 digits"),
        ("seed: .nan\n", "seed"),
        ("train: null\n", "a group of settings"),
        ("train: [1]\n", "a group of settings"),
        ("train: {epochs: -1}\n", "epochs must be at least 1"),
        ("\xff", "utf-8"),
    ],
)
def test_files_of_flags_are_read_safely(
    tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / files.HYPERPARAMETERS
    path.write_bytes(text.encode("latin-1"))
    monkeypatch.setattr(sys, "argv", ["script", f"--config={path}"])
    with watched(len(text)), pytest.raises(SystemExit) as stop:
        cli.run(script)
    said = capsys.readouterr().err
    assert stop.value.code
    assert message in said
    assert str(path) in said
    assert os.listdir(tmp_path) == [files.HYPERPARAMETERS]


@pytest.mark.parametrize(
    "told", ["DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error", ""]
)
def test_a_lack_of_memory_is_one_line(
    told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def large() -> None:
        raise RuntimeError(f"[enforce fail at alloc_cpu.cpp:127] err == 0. {told}") if told else MemoryError

    monkeypatch.setattr(sys, "argv", ["large.py"])
    with pytest.raises(SystemExit) as stop:
        cli.run(large)
    assert stop.value.code == 1
    tried = " (tried to allocate 8 bytes)" if told else ""
    assert capsys.readouterr().err == f"error: out of memory{tried}; see tutorials/oom.md for what takes less\n"


def test_a_traceback_is_kept_for_what_is_our_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(seed: int = 1) -> None:
        """A script with a mistake in it."""
        len(seed)  # type: ignore[arg-type]

    monkeypatch.setattr(sys, "argv", ["script", "--seed", "2"])
    with pytest.raises(TypeError, match="has no len"):
        cli.run(broken)


# --- GGUF ------------------------------------------------------------------------------------------------------------


def gguf_bytes(n_tensors: int, n_pairs: int, *parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_pairs) + b"".join(parts)


def gguf_text(text: str, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode()


def gguf_tensor(name: str, shape: tuple[int, ...], offset: int, kind: int = 0) -> bytes:
    return gguf_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gguf_bytes(2**63, 0), "beyond its end"),
        (gguf_bytes(0, 2**63), "beyond its end"),
        (gguf_bytes(0, 1, gguf_text("a", 2**62)), "beyond its end"),
        (gguf_bytes(0, 1, gguf_text("a"), struct.pack("<IIQ", 9, 4, 2**60)), "beyond its end"),
        (gguf_bytes(0, 1, gguf_text("a"), struct.pack("<IIQ", 9, 8, 2**60)), "beyond its end"),
        (gguf_bytes(0, 1, gguf_text("a"), struct.pack("<IIQ", 9, 9, 1)), "array of the unknown kind 9"),
        (gguf_bytes(0, 1, gguf_text("a"), struct.pack("<I", 77)), "value of the unknown kind 77"),
        (gguf_bytes(0, 2, *[gguf_text("a") + struct.pack("<II", 4, 1)] * 2), "comes twice"),
        (gguf_bytes(0, 1, gguf_text("general.alignment"), struct.pack("<II", 4, 0)), "its alignment is 0"),
        (gguf_bytes(1, 0, gguf_tensor("a", (2**40, 2**40), 0)), "beyond its end"),
        (gguf_bytes(1, 0, gguf_tensor("a", (8,), 2**62)), "beyond its end"),
        (gguf_bytes(1, 0, gguf_tensor("a", (1,) * 9, 0)), "9 axes"),
        (gguf_bytes(1, 0, gguf_tensor("a", (8,), 0, kind=99)), "unknown kind 99"),
        (gguf_bytes(1, 0, gguf_tensor("a", (0, 4), 0), bytes(64)), "cannot have the shape"),
        (gguf_bytes(1, 0, gguf_tensor("a", (33,), 0, kind=8), bytes(64)), "cannot have the shape"),
        (gguf_bytes(2, 0, gguf_tensor("a", (4,), 0), gguf_tensor("a", (4,), 32), bytes(256)), "comes twice"),
        (gguf_bytes(2, 0, gguf_tensor("a", (64,), 0), gguf_tensor("b", (64,), 32), bytes(999)), "b overlaps another"),
        (b"GGUF" + struct.pack("<I", 99), "version 99 is not known"),
    ],
)
def test_gguf_headers_are_held_against_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    refused(lambda: open_gguf(tmp_path / "m.gguf").__enter__(), "m.gguf", f"broken or incomplete.*{message}")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.block_count": 10**9}, "n_layer must lie"),
        ({"llama.attention.head_count": 0}, "n_head must lie"),
        ({"llama.embedding_length": "64"}, r"llama\.embedding_length cannot be of the type str"),
        ({"tokenizer.ggml.bos_token_id": "0"}, r"bos_token_id cannot be of the type str"),
        ({"tokenizer.ggml.tokens": [1, 2]}, r"tokenizer\.ggml\.tokens cannot be of the type ndarray"),
        ({"tokenizer.ggml.merges": ["nospace", "h e"]}, "its tokenizer cannot be rebuilt"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "its tokenizer cannot be rebuilt"),
    ],
)
def test_gguf_metadata_is_checked(tmp_path: Path, extra: dict[str, Any], message: str) -> None:
    read = READERS["gguf"].read
    write_gguf(tmp_path / "m.gguf", extra=extra)
    refused(lambda: read(tmp_path), "m.gguf", message, 2**20)


def test_our_reading_of_gguf_is_the_librarys(tmp_path: Path) -> None:
    from lit_gpt.interop import gguf_file

    path = write_gguf(tmp_path / "m.gguf", extra={"a.flag": True, "a.numbers": [1.5, 2.5], "a.negative": [-1, 2]})
    theirs = gguf.GGUFReader(path)
    values, tensors = gguf_file.read(path, gguf.GGML_QUANT_SIZES)
    for name, value in values.items():
        expected = theirs.fields[name].contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, name
    assert len(values) == len(theirs.fields) - 3  # the counts and the version, which they list as entries
    assert list(tensors) == [tensor.name for tensor in theirs.tensors]
    for expected in theirs.tensors:
        ours = tensors[expected.name]
        assert (list(ours.shape), ours.kind) == (expected.shape.tolist()[::-1], expected.tensor_type)
        assert ours.data.tobytes() == expected.data.tobytes()


def test_a_wheel_that_is_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m.gguf", b"GGUF" + bytes(50_000_000))
    refused(lambda: open_gguf(tmp_path / "x.whl").__enter__(), "x.whl", "unpacks to over 4 times its size", 60_000_000)


def test_lora_checks_its_settings() -> None:
    for settings in ({"r": True}, {"r": 1.5}, {"targets": "query"}, {"alpha": "16"}):
        with pytest.raises(ValueError, match="cannot be of the type"):
            LoRASettings(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no layer for the LoRA target 'head'"):
        lora.targeted(torch.nn.Module(), LoRASettings(targets=("head",)))


def test_the_biggest_presets_are_within_the_ranges() -> None:
    from lit_gpt.families import preset_names

    assert all(Config.from_name(name).n_layer for name in preset_names())
