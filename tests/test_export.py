"""Out to transformers and back again."""

import json
from pathlib import Path

import pytest
import torch
from conftest import STORIES, run_script
from twins import TWINS, make_twin

from lit_gpt import checkpoint
from lit_gpt.config import Config
from lit_gpt.families import FAMILIES, preset_names
from lit_gpt.sources import FolderSource


def converted(name: str, folder: Path) -> torch.nn.Module:
    """A twin with a tokenizer beside it, converted; its HF files are gone."""
    theirs = make_twin(name, folder)
    checkpoint.convert(FolderSource(folder), checkpoint.load_config(folder), folder)
    for file in (*folder.glob("*.safetensors"), folder / "config.json"):
        file.unlink()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((STORIES / file).read_bytes())
    return theirs


@pytest.mark.parametrize("name", TWINS)
def test_transformers_loads_what_we_write_and_it_comes_back_the_same(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from lit_gpt.interop import hf

    theirs = converted(name, tmp_path / "ours")
    n_shards = hf.export(tmp_path / "ours", tmp_path / "hf", max_shard_gb=1e-4)
    assert n_shards > 1
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True, dtype=torch.float32
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = torch.randint(0, 101, (2, 40))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, theirs(tokens).logits)
    before, after = (dict(checkpoint.Weights.from_folder(tmp_path / name)) for name in ("ours", "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    mine, again = (checkpoint.load_config(tmp_path / name) for name in ("ours", "hf"))
    mine.name = again.name = ""
    assert mine == again


@pytest.mark.parametrize("beside", ["model.safetensors", "model.safetensors.index.json", "lit_model.pth"])
def test_a_folder_with_weights_is_not_written_to(beside: str, stories: Path, tmp_path: Path) -> None:
    """Readers would take one model's weights or the other's, beside one tokenizer."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / beside).write_bytes(b"")
    flags = ("--checkpoint_path", stories, "--output_path", tmp_path / "hf")
    assert "holds weights" in run_script("scripts/convert_lit_checkpoint", *flags, check=False).stderr
    assert [file.name for file in (tmp_path / "hf").iterdir()] == [beside]


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0}])
def test_phi3_is_written_whatever_scales_its_rotation(scaling: dict, tmp_path: Path) -> None:
    make_twin("phi3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["original_max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_scaling": scaling, "rope_parameters": None}))
    read = checkpoint.load_config(tmp_path)
    written = FAMILIES["phi3"].write(read)
    assert read.rope_scaling
    assert FAMILIES["phi3"].read(written).rope_scaling == read.rope_scaling


def test_the_script_writes_a_complete_folder(stories: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_script("scripts/convert_lit_checkpoint", "--checkpoint_path", stories, "--output_path", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    reference = AutoModelForCausalLM.from_pretrained(STORIES)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    text = AutoTokenizer.from_pretrained(tmp_path / "hf")("Once upon")["input_ids"]
    assert text == AutoTokenizer.from_pretrained(STORIES)("Once upon")["input_ids"]
    assert run_script("scripts/validate_checkpoint", "--checkpoint_dir", tmp_path / "hf").stdout.endswith("whole\n")
    flags = ("--checkpoint_path", tmp_path / "lit_model_lora_finetuned.pth", "--output_path", tmp_path / "x")
    (tmp_path / "lit_model_lora_finetuned.pth").write_bytes(b"")
    assert "scripts/merge_lora.py first" in run_script("scripts/convert_lit_checkpoint", *flags, check=False).stderr


def test_validation_says_what_is_wrong(stories: Path, tmp_path: Path) -> None:
    assert "260,032 parameters" in run_script("scripts/validate_checkpoint", "--checkpoint_dir", stories).stdout
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((STORIES / file).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((STORIES / "model.safetensors").read_bytes()[:9000])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "tokenizer.json").write_text("{}")
    done = run_script("scripts/validate_checkpoint", "--checkpoint_dir", tmp_path, check=False)
    assert done.returncode == 1
    assert "model.safetensors is broken or incomplete" in done.stdout
    assert "tokenizer.json is broken" in done.stdout
    (tmp_path / "model.safetensors").write_bytes((STORIES / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6, "intermediate_size": 100}))
    done = run_script("scripts/validate_checkpoint", "--checkpoint_dir", tmp_path, check=False)
    assert "missing: model.layers.5" in done.stdout
    assert "wrong shape: model.layers.0.mlp.gate_proj.weight (172, 64) instead of (100, 64)" in done.stdout


CLASSES = {
    "neox": "GPTNeoX",
    "gemma3": "Gemma3Text",
    "stablelm": "StableLm",
    "gpt2": "GPT2",
    "smollm3": "SmolLM3",
    **{name: name.capitalize() for name in ("falcon", "llama", "mistral", "mixtral", "phi", "phi3", "gemma", "gemma2")},
    **{name: name.capitalize() for name in ("qwen2", "qwen3", "olmo", "olmo2", "granite")},
}


@pytest.mark.parametrize("name", CLASSES)
def test_what_a_config_leaves_out_is_transformers_default(name: str) -> None:
    """Older files omit what equals a default; only the sizes and the rotation are always there."""
    import transformers

    padded = {"pad_token_id": 0} if name in ("phi3", "smollm3") else {}
    whole = getattr(transformers, f"{CLASSES[name]}Config")(**padded).to_dict()
    read = FAMILIES[name].read
    for key in set(whole) - {"rope_parameters", "intermediate_size", "num_key_value_heads"}:
        try:
            without = read({other: value for other, value in whole.items() if other != key})
        except ValueError as error:
            assert "config.json has no" in str(error), key  # noqa: PT017 - a size is refused, not guessed
            continue
        assert without == read(whole), key


PUBLISHED = {  # trainable parameters at r = 8 on query and value
    "stablelm-base-alpha-3b": 2_097_152,
    "Llama-2-7b-hf": 4_194_304,
    "Llama-2-13b-hf": 6_553_600,
    "phi-1_5": 1_572_864,
    "falcon-40b": 12_042_240,
    "falcon-7b": 3_506_176,
    "pythia-14m": 24_576,
    "pythia-70m": 98_304,
    "pythia-160m": 294_912,
    "tiny-llama-1.1b": 1_126_400,
    "Mistral-7B-v0.1": 3_407_872,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_trainable_parameters_are_the_published_ones(name: str) -> None:
    from lit_gpt import lora

    model = checkpoint.hollow(Config.from_name(name))
    lora.attach(model, lora.LoRASettings())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == PUBLISHED[name]


SIZES = {  # billions of parameters, as the models' cards say
    "EleutherAI/pythia-12b": 11.8,
    "tiiuae/falcon-7b": 6.9,
    "tiiuae/falcon-180B": 179.5,
    "meta-llama/Llama-2-70b-hf": 69.0,
    "lmsys/vicuna-33b-v1.3": 32.5,
    "codellama/CodeLlama-34b-hf": 33.7,
    "mistralai/Mixtral-8x7B-v0.1": 46.7,
    "microsoft/phi-2": 2.78,
    "microsoft/phi-4": 14.7,
    "google/gemma-2-27b": 27.2,
    "google/gemma-3-1b-pt": 1.0,
    "Qwen/Qwen2.5-7B": 7.62,
    "Qwen/Qwen3-30B-A3B": 30.5,
    "Qwen/Qwen3-0.6B": 0.596,
    "meta-llama/Llama-3.2-1B": 1.24,
    "allenai/OLMo-2-1124-7B": 7.3,
    "openai-community/gpt2": 0.124,
    "HuggingFaceTB/SmolLM3-3B": 3.08,
    "stabilityai/stablelm-2-1_6b": 1.64,
    "ibm-granite/granite-3.3-8b-base": 8.17,
}


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_their_models_size(name: str) -> None:
    parameters = checkpoint.parameter_metas(checkpoint.hollow(Config.from_name(name)))
    assert sum(p.numel() for p in parameters.values()) / 1e9 == pytest.approx(SIZES[name], rel=0.02)


def test_every_preset_is_read_and_listed() -> None:
    listed = run_script("scripts/download").stdout.splitlines()[1:]
    assert sorted(listed) == sorted(preset_names())
    assert len(listed) == len(set(listed)) > 150
    for name in listed:
        assert Config.from_name(name).name == name.split("/")[1]
    with pytest.raises(ValueError, match="near it are .*pythia"):
        Config.from_name("pythia-161m")


def test_a_family_knows_each_of_its_names_once() -> None:
    for family in FAMILIES.values():
        for attribute in ("theirs", "ours"):
            names = [getattr(row, attribute) for row in family.rows]
            assert len(names) == len(set(names)), family.name
