"""The disk: strict loading with complete complaints, atomic saving, and files from strangers."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import STORIES
from safetensors.torch import load_file, save_file
from twins import make_twin

from lit_gpt import checkpoint, files
from lit_gpt.adapter import Adapter
from lit_gpt.config import Config
from lit_gpt.lora import LoRASettings
from lit_gpt.model import GPT
from lit_gpt.sources import FolderSource


def copy(folder: Path) -> Path:
    folder.mkdir()
    for file in STORIES.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def states(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_model(folder, torch.float32).state_dict()


def test_loading_does_not_wait_for_torchs_compiler() -> None:
    """Whose import takes longer than that of torch."""
    code = (
        "import sys; from pathlib import Path; import torch; from lit_gpt import checkpoint; "
        "checkpoint.load_model(Path(sys.argv[1]), torch.float32); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, STORIES], check=True)


@pytest.mark.parametrize("layout", ["one file", "shards", "bin", "converted", "converted in bfloat16"])
def test_every_layout_gives_the_same_model(tmp_path: Path, layout: str) -> None:
    expected = states(STORIES)
    folder = copy(tmp_path / "m")
    theirs = load_file(STORIES / "model.safetensors")
    if layout == "shards":
        (folder / "model.safetensors").unlink()
        transformers.LlamaForCausalLM.from_pretrained(STORIES).save_pretrained(folder, max_shard_size="300KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    elif layout == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(theirs, folder / "pytorch_model.bin")
        torch.save({"a": 1}, folder / "training_args.bin")  # as trainers leave them
    elif layout.startswith("converted"):
        dtype = torch.bfloat16 if "bfloat16" in layout else None
        checkpoint.convert(FolderSource(folder), checkpoint.load_config(folder), folder, dtype)
        (folder / "model.safetensors").unlink()
        (folder / "config.json").unlink()
        expected = {name: tensor.to(dtype or tensor.dtype).float() for name, tensor in expected.items()}
    got = states(folder)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert checkpoint.fingerprint(folder) == checkpoint.fingerprint(STORIES)


def test_another_base_has_another_fingerprint(tmp_path: Path) -> None:
    folder = copy(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"].mul_(1.5)
    save_file(tensors, folder / "model.safetensors")
    assert checkpoint.fingerprint(folder) != checkpoint.fingerprint(STORIES)


def test_one_error_lists_all_that_does_not_fit(tmp_path: Path) -> None:
    folder = copy(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 3)
    tensors["model.surprise"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"missing: .*2\.mlp\.up_proj.*unexpected: model\.surprise.*wrong shape: .*q_proj"
    ):
        checkpoint.load_model(folder, torch.float32)


@pytest.mark.parametrize("name", ["model.safetensors", "lit_model.pth"])
@pytest.mark.parametrize("sixteenth", [0.0001, 0.05, *range(1, 16, 2)])
def test_a_cut_file_is_named(tmp_path: Path, sixteenth: float, name: str) -> None:
    folder = copy(tmp_path / "m")
    if name == "lit_model.pth":
        checkpoint.convert(FolderSource(folder), checkpoint.load_config(folder), folder)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * sixteenth / 16)])
    with pytest.raises(ValueError, match=f"{name} is broken or incomplete"):
        checkpoint.load_model(folder, torch.float32)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = copy(tmp_path / "m")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"00001-of-00002.safetensors, model-00002.* missing; run scripts/download"):
        checkpoint.load_model(folder, torch.float32)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd"])
def test_an_index_cannot_point_outside(tmp_path: Path, name: str) -> None:
    folder = copy(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="outside the folder"):
        checkpoint.load_model(folder, torch.float32)


class Bomb:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", ["lit_model.pth", "pytorch_model.bin", "adapter.pth"])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_loading_never_runs_code(tmp_path: Path, name: str, how: str) -> None:
    folder = copy(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    bomb = {"model": Bomb(tmp_path / "hit")}
    if how == "torch":
        torch.save(bomb, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(bomb))
    load = Adapter.load if name == "adapter.pth" else checkpoint.fingerprint
    with pytest.raises(ValueError, match=r"was not loaded|is broken"):
        load(folder / name if name == "adapter.pth" else folder)
    assert not (tmp_path / "hit").exists()


def test_an_unknown_architecture_is_named_with_the_known_ones(tmp_path: Path) -> None:
    folder = copy(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match=r"unknown model_type 'mamba'; known are .*gpt_neox.*llama"):
        checkpoint.load_config(folder)


HEADS = json.dumps({**json.loads((STORIES / "config.json").read_text()), "num_attention_heads": "8"})


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model_type": "llama"}', '{"model_type": "llama", "hidden_size": "x"}', HEADS]
)
def test_a_broken_config_is_one_clear_error(tmp_path: Path, text: str) -> None:
    folder = copy(tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=str(folder)):
        checkpoint.load_config(folder)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    files.save(tmp_path / "a.pth", {"x": torch.ones(3)})

    def fail(path: Path) -> None:
        with files.atomically(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(tmp_path / "a.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    assert torch.equal(files.load_dict(tmp_path / "a.pth")["x"], torch.ones(3))


def test_streamed_files_are_ordinary_ones(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 2, 2).half()}
    metas = {name: tensor.to("meta") for name, tensor in state.items()}
    files.save_streamed(tmp_path / "a.pth", metas, reversed(state.items()))
    for mmap in (True, False):
        got = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap)
        assert list(got) == list(state)
        assert all(torch.equal(got[name], state[name]) for name in state)


def adapter_for(folder: Path, path: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    told = {"base_name": "m", "prompt_style": "alpaca", "precision": "32-true", "quantize": None, "step": 1}
    Adapter(state or {}, LoRASettings(), base_fingerprint=checkpoint.fingerprint(folder), **told).save(path)  # type: ignore[arg-type]


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    make_twin("llama", tmp_path / "other")
    adapter_for(tmp_path / "other", tmp_path / "adapter.pth")
    adapter = Adapter.load(tmp_path / "adapter.pth")
    assert adapter.settings == LoRASettings()
    with pytest.raises(ValueError, match="was trained on 'm'.* holds other weights"):
        adapter.attach(checkpoint.load_model(STORIES, torch.float32), STORIES, tmp_path / "adapter.pth")


def test_a_model_file_is_no_adapter(tmp_path: Path) -> None:
    files.save(tmp_path / "a.pth", {"x": torch.ones(3)})
    with pytest.raises(ValueError, match=r"is no LoRA adapter written by finetune/lora\.py"):
        Adapter.load(tmp_path / "a.pth")


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"tie_embeddings": True, "head_bias": True}, {"learned_positions": True}], ids=str)
def test_a_model_that_gets_its_weights_block_by_block_is_the_same(tmp_path: Path, changes: dict) -> None:
    torch.manual_seed(0)
    sizes = {"block_size": 16, "vocab_size": 96, "n_layer": 2, "n_head": 4, "n_embd": 64, "family": "llama"}
    model = GPT(Config(**sizes | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    files.save(tmp_path / files.LIT_MODEL, {name: p.detach() for name, p in model.named_parameters()})
    checkpoint.save_config(tmp_path, model.config)
    tokens, ran = torch.randint(0, 96, (1, 7)), []
    by_block = checkpoint.load_by_block(tmp_path, torch.float32, lambda: ran.append(1))
    for _ in range(2):
        torch.testing.assert_close(by_block(tokens), model(tokens))
        assert all(parameter.is_meta for parameter in by_block.parameters())
    assert len(ran) == 4
