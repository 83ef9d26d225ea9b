"""Folders in bitsandbytes' 4 bits, made by transformers, against bitsandbytes' own numbers and transformers' logits."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ROOT, STORIES, load_script, run_script
from safetensors.torch import load_file, save_file
from torch import nn
from twins import make_twin

from lit_gpt import checkpoint, files, quantization
from lit_gpt.adapter import Adapter
from lit_gpt.args import EvalArgs, TrainArgs
from lit_gpt.inference import Assistant
from lit_gpt.interop.bnb import FourBitSource
from lit_gpt.model import Linear
from lit_gpt.quantization import Linear4bit

bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional
MADE = {  # a twin, how it is quantized, and the dtype that it is quantized from; every row a whole number of blocks
    "nf4": ("llama-grouped", "nf4", False, torch.float32),
    "fp4": ("llama", "fp4", False, torch.float16),
    "dq": ("llama", "nf4", True, torch.bfloat16),
    "tied": ("llama-one-group-tied", "nf4", True, torch.float16),
    "fused": ("phi3", "nf4", False, torch.bfloat16),
    "fused-dq": ("phi3", "fp4", True, torch.float32),
    "interleaved": ("neox", "nf4", True, torch.bfloat16),
    "experts": ("mixtral", "nf4", False, torch.float32),
}


def quantized(source: Path, folder: Path, levels: str, double: bool, dtype: torch.dtype, **more: Any) -> Path:
    """What transformers saves of the model in `source`, quantized."""
    told = {"bnb_4bit_quant_type": levels, "bnb_4bit_use_double_quant": double, **more}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, **told),
        device_map="cpu",
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each line of `MADE`."""
    folder = tmp_path_factory.mktemp("made")
    for name, (twin, levels, double, dtype) in MADE.items():
        make_twin(twin, folder / "full" / name, intermediate_size=128)
        quantized(folder / "full" / name, folder / name, levels, double, dtype)
    return folder


def theirs(folder: Path) -> transformers.PreTrainedModel:
    """Transformers' model of a folder, in float32 but for its 4-bit weights, and without the CPU's rounding kernel."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32).eval()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():  # the others have stayed in the file's precision
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


@pytest.mark.parametrize("name", MADE)
def test_weights_are_bitsandbytes_own_and_logits_transformers(name: str, made: Path) -> None:
    tensors, source = load_file(made / name / "model.safetensors"), checkpoint.open_folder(made / name)
    assert isinstance(source, FourBitSource)
    assert len(source.states) == sum(key.endswith(".quant_map") for key in tensors)
    for weight in source.states:
        parts = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{weight}.")}
        state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        expected = functional.dequantize_4bit(tensors[weight], state)
        assert source.metas[weight].dtype == expected.dtype == MADE[name][3]
        assert torch.equal(source.read(weight).to(expected.dtype), expected)
    tokens = torch.randint(0, 101, (2, 20))
    with torch.no_grad():
        ours, logits = checkpoint.load_model(made / name, torch.float32)(tokens), theirs(made / name)(tokens).logits
    torch.testing.assert_close(ours, logits, atol=2e-5 * float(logits.std()), rtol=0)


@pytest.mark.parametrize("name", MADE)
def test_layers_stay_in_4_bits_with_the_very_numbers(name: str, made: Path) -> None:
    model, weights = checkpoint.load_model(made / name, torch.bfloat16), checkpoint.Weights.from_folder(made / name)
    layers = {owner: module for owner, module in model.named_modules() if isinstance(module, nn.Linear)}
    twin, levels, double, _ = MADE[name]
    for owner, tensor in ((name.removesuffix(".weight"), tensor) for name, tensor in weights):
        if owner not in layers:
            continue
        layer = layers[owner]
        if owner == "lm_head" or (".mlp." in owner and twin == "mixtral"):  # transformers leaves them alone
            assert type(layer) is Linear
            continue
        assert isinstance(layer, Linear4bit)
        assert torch.equal(layer.dense(torch.float32), tensor)
        fused = twin in ("phi3", "neox") and owner.endswith((".q", ".k", ".v", ".gate", ".up"))
        assert layer.kind == f"bnb.{levels}{'-dq' if double and not fused else ''}"


@pytest.mark.parametrize("name", ["nf4", "fp4", "fused", "interleaved"])
def test_quantizing_what_was_dequantized_gives_the_same_bits(name: str, made: Path) -> None:
    """The largest number of a block is its scale exactly, and each is one of the levels; of fp4's, two mean zero."""
    n_layers = 0
    for owner, layer in checkpoint.Weights.from_folder(made / name).layers(None):
        if isinstance(layer, Linear4bit):
            again = quantization.quantize(layer.dense(torch.float32), f"bnb.{layer.levels}")
            assert torch.equal(again.dense(torch.float32), layer.dense(torch.float32)), owner
            assert torch.equal(again.weight, layer.weight) or layer.levels == "fp4", owner
            assert torch.equal(again.get_buffer("absmax"), layer.scales()), owner
            n_layers += 1
    assert n_layers > 10


def test_a_kind_that_is_asked_for_replaces_the_folders(made: Path) -> None:
    stored, again, other = (
        checkpoint.load_model(made / "nf4", torch.float32, quantize=kind).get_submodule("transformer.h.1.mlp.up")
        for kind in (None, "bnb.nf4", "bnb.int8")
    )
    assert torch.equal(stored.weight, again.weight)
    assert isinstance(other, quantization.Linear8bit)
    error = other.dense(torch.float32) - stored.dense(torch.float32)
    assert 0 < error.norm() < 0.01 * stored.dense(torch.float32).norm()


@pytest.mark.parametrize("name", ["tied", "fused"])
def test_a_converted_folder_is_a_plain_one(name: str, made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(made / name, folder)
    before = checkpoint.fingerprint(folder)
    said = run_script("scripts/convert_hf_checkpoint", "--checkpoint_dir", folder).stdout
    assert "4-bit weights are in full now" in said
    state = files.load_dict(folder / files.LIT_MODEL)
    assert {tensor.dtype for tensor in state.values()} == {MADE[name][3]}
    expected = dict(checkpoint.Weights.from_folder(made / name))
    for has_lit_config in (True, False):  # config.json still tells of a quantization that this file does not have
        model = checkpoint.load_model(folder, MADE[name][3])
        assert not any(isinstance(module, Linear4bit) for module in model.modules())
        got = model.state_dict()
        assert all(torch.equal(got[key], expected[key].to(MADE[name][3])) for key in expected)
        assert checkpoint.fingerprint(folder) == before
        if has_lit_config:
            (folder / files.LIT_CONFIG).unlink()


def by_hand(folder: Path, target: Path, block: int, storage: torch.dtype = torch.uint8) -> None:
    """Every matrix but the embedding in 4 bits, in transformers' layout."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    for name in [name for name, tensor in tensors.items() if tensor.ndim == 2 and "embed" not in name]:
        codes, state = functional.quantize_4bit(tensors[name], blocksize=block, quant_type="nf4", quant_storage=storage)
        tensors[name] = codes
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in state.as_dict(packed=True).items()}
    save_file(tensors, target / "model.safetensors")


@pytest.mark.parametrize("twin", ["llama", "phi3", "mixtral"])
@pytest.mark.parametrize(("block", "storage"), [(32, torch.uint8), (128, torch.bfloat16)])
def test_blocks_and_bytes_of_other_sizes(twin: str, block: int, storage: torch.dtype, tmp_path: Path) -> None:
    """Rows that are no whole blocks too, and everything quantized: a head, a router and its experts."""
    make_twin(twin, tmp_path / "full")  # rows of 64 and 96 numbers
    by_hand(tmp_path / "full", tmp_path / "m", block, storage)
    weights = dict(checkpoint.Weights.from_folder(tmp_path / "full"))
    model = checkpoint.load_model(tmp_path / "m", torch.float32)
    n_layers = 0
    for owner, module in model.named_modules():
        if isinstance(module, nn.Linear):
            exact = weights[f"{owner}.weight"]
            got = module.dense(torch.float32) if isinstance(module, Linear4bit) else module.weight
            assert (got - exact).norm() < 0.15 * exact.norm()
            if twin != "phi3":  # there a layer may be a part of one that was quantized
                rounded = functional.quantize_4bit(exact, blocksize=block, quant_type="nf4")
                assert torch.equal(module.weight, rounded[0])
                assert torch.equal(module.get_buffer("absmax"), rounded[1].absmax)
                n_layers += 1
    assert n_layers or twin == "phi3"
    assert model(torch.randint(0, 101, (1, 8))).isfinite().all()
    # What a kind that is asked for leaves alone is in full: the weights that are kept of it know of no other layers.
    before = checkpoint.load_model(tmp_path / "m", torch.float32, quantize="bnb.nf4")
    checkpoint.save_quantized(tmp_path / "m", "bnb.nf4", lambda done, total: None)
    after = checkpoint.load_model(tmp_path / "m", torch.float32, quantize="bnb.nf4")
    kinds = [{name: type(module) for name, module in model.named_modules()} for model in (before, after)]
    assert kinds[0] == kinds[1]
    assert kinds[0]["lm_head"] is Linear
    assert before.get_submodule("transformer.h.0.attn.q").block == 64


def test_transposed_weights_are_not_taken_for_upright_ones(tmp_path: Path) -> None:
    """GPT-2's full weights lie the other way round than its quantized ones."""
    make_twin("gpt2", tmp_path / "full")
    quantized(tmp_path / "full", tmp_path / "m", "nf4", False, torch.float32)
    with pytest.raises(ValueError, match="wrong shape: transformer.h.0.attn.c_attn.weight"):
        checkpoint.load_model(tmp_path / "m", torch.float32)


DAMAGE = {
    "not JSON": lambda tensors, name, state: tensors.update({state: torch.tensor([123], dtype=torch.uint8)}),
    "no scales": lambda tensors, name, state: tensors.pop(f"{name}.absmax"),
    "too few scales": lambda tensors, name, state: tensors.update({f"{name}.absmax": tensors[f"{name}.absmax"][:-1]}),
    "too few codes": lambda tensors, name, state: tensors.update({name: tensors[name][:-8].clone()}),
    "block of 0": lambda tensors, name, state: tensors.update(
        {state: torch.tensor(list(b'{"shape": [64, 64], "blocksize": 0, "dtype": "bfloat16"}'), dtype=torch.uint8)}
    ),
    "a shape of words": lambda tensors, name, state: tensors.update(
        {state: torch.tensor(list(b'{"shape": ["a", "b"], "blocksize": 64, "dtype": "bfloat16"}'), dtype=torch.uint8)}
    ),
    "another map": lambda tensors, name, state: tensors[f"{name}.nested_quant_map"].mul_(2),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_description_that_does_not_fit_is_named(damage: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "dq", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    DAMAGE[damage](tensors, name, f"{name}.quant_state.bitsandbytes__nf4")
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.weight.quant_state.* does not describe"):
        checkpoint.load_model(tmp_path / "m", torch.float32)


@pytest.fixture(scope="module")
def tiny_stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stories model in 4 bits, with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints") / "stories-4bit"
    shutil.copytree(STORIES, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    return quantized(STORIES, folder, "nf4", True, torch.bfloat16)


def test_an_adapter_trains_on_it_and_merges(tiny_stories: Path, prepared: Path, tmp_path: Path) -> None:
    load_script("finetune/lora").main(
        data_dir=prepared,
        checkpoint_dir=tiny_stories,
        out_dir=tmp_path / "out",
        precision="bf16-mixed",
        train=TrainArgs(learning_rate=1e-2, global_batch_size=4, max_steps=8),
        eval=EvalArgs(max_new_tokens=0),
    )
    rows = (tmp_path / "out" / "metrics.csv").read_text().splitlines()
    losses = [float(row.split(",")[4]) for row in rows[1:]]
    assert losses[-1] < losses[0] - 0.5
    lora_path, merged_dir = tmp_path / "out" / files.ADAPTER, tmp_path / "merged"
    assert Adapter.load(lora_path).quantize is None  # the folder itself says what the base is
    merge = load_script("scripts/merge_lora").main
    assert merge(lora_path=lora_path, checkpoint_dir=tiny_stories, out_dir=merged_dir, precision="32-true") == 0
    merged = checkpoint.load_model(merged_dir, torch.float32)
    assert not any(isinstance(module, Linear4bit) for module in merged.modules())
    seen = dict(checkpoint.Weights.from_folder(tiny_stories))["transformer.h.0.attn.k.weight"]
    assert torch.equal(merged.transformer.h[0].attn.k.weight, seen)  # a layer without an update
    unmerged = Assistant(tiny_stories, "32-true", lora_path).model
    tokens = torch.randint(0, 512, (1, 30))
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens), unmerged(tokens), atol=1e-4, rtol=0)


def test_full_finetuning_says_what_to_do(tiny_stories: Path, prepared: Path, tmp_path: Path) -> None:
    flags = ("--checkpoint_dir", tiny_stories, "--data_dir", prepared, "--out_dir", tmp_path)
    done = run_script("finetune/full", *flags, check=False)
    assert done.returncode == 1
    assert "weights in 4 bits, which cannot be trained: train an adapter with finetune/lora.py" in done.stderr


REFUSED = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "new-method": {"quant_method": "new-method"},
    "bitsandbytes 8-bit": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
    "unnamed": {"bits": 4},
}


@pytest.mark.parametrize("method", REFUSED)
@pytest.mark.parametrize("script", ["generate/base", "scripts/convert_hf_checkpoint"])
def test_other_methods_are_refused_by_name(method: str, script: str, tmp_path: Path) -> None:
    shutil.copytree(STORIES, tmp_path / "m")
    config = files.read_json(STORIES / "config.json") | {"quantization_config": REFUSED[method]}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    main = load_script(script).main
    with pytest.raises(ValueError, match=rf"quantized already.* not read here: {method} \(.*use --quantize bnb.nf4"):
        main(checkpoint_dir=tmp_path / "m")


def test_without_bitsandbytes_it_says_how_to_install_it(made: Path, stories: Path) -> None:
    code = "import sys, runpy; sys.modules['bitsandbytes'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    for script, flags, asked_by in (
        ("generate/base", ("--checkpoint_dir", str(stories), "--quantize", "bnb.nf4"), "--quantize needs"),
        ("scripts/convert_hf_checkpoint", ("--checkpoint_dir", str(made / "nf4")), "and reading them needs"),
    ):
        command = [sys.executable, "-c", code, str(ROOT / f"{script}.py"), *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 1
        assert f"{asked_by} bitsandbytes: pip install 'lit-gpt[quantize]'" in done.stderr
        assert "Traceback" not in done.stderr
