"""Codes chosen by what layers are asked: against the textbook's way, and from the script to a merged adapter."""

import fnmatch
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import load_script, run_script
from safetensors.torch import load_file
from torch import nn
from twins import make_twin

from lit_gpt import calibration, checkpoint, files, memory, quantization, runtime, surgery
from lit_gpt.adapter import Adapter
from lit_gpt.args import EvalArgs, TrainArgs
from lit_gpt.model import GPT
from lit_gpt.quantization import Linear4bit

pytest.importorskip("bitsandbytes")
KINDS = [kind for kind in quantization.KINDS if kind != "bnb.int8"]
TWINS = ("llama-grouped", "llama-one-group-tied", "phi3", "neox", "mixtral", "gemma2", "gpt2")


def layer_and_inputs(kind: str, n_out: int, n_in: int) -> tuple[Linear4bit, torch.Tensor, torch.Tensor]:
    """A quantized layer, its weight, and inputs (200, n_in) that have much in common."""
    generator = torch.Generator().manual_seed(n_in)
    weight = torch.randn(n_out, n_in, generator=generator)
    mixed = torch.randn(n_in, n_in, generator=generator) / n_in**0.5
    inputs = torch.randn(200, n_in, generator=generator) @ (torch.eye(n_in) * 0.3 + mixed)
    layer = quantization.quantize(weight, kind)
    assert isinstance(layer, Linear4bit)
    return layer, weight, inputs


def textbook(layer: Linear4bit, weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Optimal Brain Surgeon with the inputs in the same order: the inverse of what is left is made anew each time.

    Frantar et al. 2022, arXiv:2210.17323, equation 2; float64, one row of the weight after the other.
    """
    moments = (inputs.double().t() @ inputs.double()).float().double()
    order = moments.diagonal().argsort(descending=True).tolist()
    moments += torch.eye(len(moments)) * calibration.DAMPING * moments.diagonal().mean()
    levels = quantization.levels_of(layer.levels).double()
    scales = layer.scales().repeat_interleave(layer.block)[: weight.numel()].view(weight.shape).double()
    left, chosen = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    while order:
        inverse = torch.linalg.inv(moments[order][:, order])
        now, later = order[0], order[1:]
        steps = (left[:, now, None] / scales[:, now, None] - levels).abs()
        chosen[:, now] = levels[steps.argmin(1)] * scales[:, now]
        error = (left[:, now] - chosen[:, now]) / inverse[0, 0]
        left[:, later] -= error[:, None] * inverse[0, 1:]
        order = later
    return chosen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_out", "n_in"), [(6, 64), (5, 130), (3, 7), (70, 96)])  # rows that are no whole blocks too
def test_codes_are_the_textbooks(kind: str, n_out: int, n_in: int) -> None:
    layer, weight, inputs = layer_and_inputs(kind, n_out, n_in)
    expected = textbook(layer, weight, inputs)
    calibration.choose_codes(layer, weight, inputs.t() @ inputs)
    same = torch.isclose(layer.dense(torch.float32), expected.float(), rtol=1e-5, atol=1e-7)
    # A number in the middle between two levels goes where rounding takes it, and the rest of its row from there on.
    assert same.all(dim=1).float().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_nearer_and_scales_stay(kind: str) -> None:
    layer, weight, inputs = layer_and_inputs(kind, 96, 160)
    scales, nearest = layer.scales().clone(), layer.dense(torch.float32)
    calibration.choose_codes(layer, weight, inputs.t() @ inputs)
    before, after = ((inputs @ (dense - weight).t()).norm() for dense in (nearest, layer.dense(torch.float32)))
    assert after < 0.7 * before
    assert torch.equal(layer.scales(), scales)
    assert (layer.dense(torch.float32) - weight).norm() > (nearest - weight).norm()  # it is not the numbers that are


@pytest.mark.parametrize("moments", [torch.eye(96), torch.zeros(96, 96)], ids=["apart", "none"])
def test_inputs_that_know_nothing_of_each_other_leave_the_nearest_codes(moments: torch.Tensor) -> None:
    layer, weight, _ = layer_and_inputs("bnb.nf4", 40, 96)
    codes = layer.weight.clone()
    calibration.choose_codes(layer, weight, moments)
    assert torch.equal(layer.weight, codes)


def test_a_weight_makes_up_for_what_others_lost_as_ridge_regression_tells() -> None:
    """Least squares in float64, the price being further rows that ask the weight to stay where it is."""
    _, weight, full = layer_and_inputs("bnb.nf4", 40, 96)
    inputs = full + 0.1 * full[:, torch.arange(96).roll(1)] + 0.2 * torch.randn(full.shape)
    moments = calibration.products_of(inputs, inputs)
    price = (calibration.RIDGE * moments.diagonal().mean().double()).sqrt() * torch.eye(96)
    asked = torch.cat([inputs.double(), price])
    wanted = torch.cat([(full - inputs).double() @ weight.double().t(), torch.zeros(96, 40)])
    expected = weight + torch.linalg.lstsq(asked, wanted).solution.t().float()
    found = calibration.aimed_at(weight, moments, calibration.products_of(full, inputs) - moments)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (inputs @ found.t() - full @ weight.t()).norm() < 0.8 * ((inputs - full) @ weight.t()).norm()


@pytest.mark.parametrize("twin", ["llama-grouped", "gpt2", "mixtral", "gemma2", "neox"])
def test_what_is_lost_is_taken_back(twin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's states are nearer to the full one's than where each layer only does as it was."""
    make_twin(twin, tmp_path)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 101, (60,), generator=generator) for _ in range(20)]

    def distance() -> float:
        layers, _ = calibration.calibrate(tmp_path, "bnb.nf4", rows, torch.float32)
        full, model = (checkpoint.load_model(tmp_path, torch.float32) for _ in range(2))
        for name, layer in layers.items():
            model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(layer.dense(torch.float32))
        with torch.no_grad():
            return sum(float((model.transformer(row[None]) - full.transformer(row[None])).norm()) for row in rows)

    taken_back = distance()
    monkeypatch.setattr(calibration, "aimed_at", lambda weight, moments, lost: weight)
    assert taken_back < distance()


def test_several_sets_give_the_same_share(stories: Path, prepared: Path) -> None:
    rows = calibration.open_rows(stories, [prepared], 200, seed=0)
    shared = calibration.open_rows(stories, [prepared, prepared], 400, seed=0)
    assert [row.tolist() for row in shared] == [row.tolist() for row in [*rows, *rows]]
    assert 200 <= sum(map(len, rows)) < 200 + max(map(len, rows))


@pytest.mark.parametrize("twin", TWINS)
def test_a_folder_loads_as_what_was_chosen(twin: str, tmp_path: Path) -> None:
    make_twin(twin, tmp_path / "m")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 101, (n,), generator=generator) for n in (30, 1, 25, 20)]
    layers, errors = calibration.calibrate(tmp_path / "m", "bnb.nf4-dq", rows, torch.float32)
    assert errors.chosen < errors.nearest
    calibration.write(tmp_path / "m", "bnb.nf4-dq", rows, tmp_path / "out", dtype=torch.float32)
    stored = checkpoint.load_model(tmp_path / "out", torch.float32)
    kept = {f"{name}.weight": module for name, module in stored.named_modules() if isinstance(module, Linear4bit)}
    full = checkpoint.load_model(tmp_path / "m", torch.float32)
    names = {f"{name}.weight" for name, module in full.named_modules() if quantization.quantizable(name, module)}
    assert set(kept) == set(layers) == names
    for name, layer in kept.items():
        assert layer.kind == "bnb.nf4-dq"
        assert torch.equal(layer.dense(torch.float32), layers[name].dense(torch.float32))
        full.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(layer.dense(torch.float32))
    tokens = torch.randint(1, 101, (1, 20), generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(stored(tokens), full(tokens), rtol=1e-5, atol=1e-5)
    assert checkpoint.fingerprint(tmp_path / "out") != checkpoint.fingerprint(tmp_path / "m")


@pytest.mark.parametrize(
    ("twin", "names"),
    [
        ("llama-grouped", ("mlp.proj",)),
        ("gpt2", ("attn.proj", "h.1")),
        ("mixtral", ("attn.proj", "mlp.experts.*.proj")),
    ],
)
def test_layers_that_are_skipped_stay_full_and_take_back_what_is_lost(
    twin: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    """In memory they take what is planned, and the model's states are nearer to the full one's for them."""
    make_twin(twin, tmp_path / "m")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 101, (60,), generator=generator) for _ in range(20)]
    full = checkpoint.load_model(tmp_path / "m", torch.float32)

    @torch.no_grad()
    def distance(model: GPT) -> float:
        return sum(float((model.transformer(row[None]) - full.transformer(row[None])).norm()) for row in rows)

    for folder, skip in (("all", ()), ("some", names)):
        calibration.write(tmp_path / "m", "bnb.nf4-dq", rows, tmp_path / folder, dtype=torch.float32, skip=skip)
    model = checkpoint.load_model(tmp_path / "some", torch.float32)
    linears = {name for name, module in full.named_modules() if quantization.quantizable(name, module)}
    skipped = {name for name in linears if any(fnmatch.fnmatch(f".{name}.", f"*.{part}.*") for part in names)}
    assert {name for name, module in model.named_modules() if quantization.quantizable(name, module)} == skipped

    n_skipped = sum(model.get_submodule(name).weight.numel() for name in skipped)
    assert checkpoint.kept_kind(tmp_path / "some") == ("bnb.nf4-dq", n_skipped)
    without = checkpoint.load_model(tmp_path / "all", torch.float32)
    held, held_without = (sum(tensor.nbytes for tensor in m.state_dict().values()) for m in (model, without))
    setting = memory.Setting(runtime.PRECISIONS["32-true"], "bnb.nf4-dq", None, (20,))
    planned, planned_without = (
        memory.plan_inference(model.config, replace(setting, n_skipped=n), 5).parts["weights"] for n in (n_skipped, 0)
    )
    # Of each layer the last scale's scale may be of fewer, and the offset is one more number.
    assert abs((planned - planned_without) - (held - held_without)) <= 8 * len(skipped)

    fitted = distance(model)
    assert fitted < distance(without)
    for name in skipped:
        model.get_submodule(name).weight = full.get_submodule(name).weight
    assert fitted < distance(model)  # they are not what they were


def test_experts_that_no_token_goes_to_keep_the_nearest_codes(tmp_path: Path) -> None:
    make_twin("mixtral", tmp_path)
    layers, _ = calibration.calibrate(tmp_path, "bnb.nf4", [torch.tensor([7])], torch.float32)
    nearest = checkpoint.load_model(tmp_path, torch.float32, quantize="bnb.nf4")
    same = {
        name: torch.equal(layers[f"{name}.weight"].weight, module.weight)
        for name, module in nearest.named_modules()
        if isinstance(module, Linear4bit)
    }
    assert len(same) == len(layers)
    experts = {name: equal for name, equal in same.items() if ".experts." in name}
    assert any(experts.values())
    assert not all(experts.values())


def test_from_rows_to_a_merged_adapter(
    stories: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, base, out, adapter = (tmp_path / name for name in ("full", "base", "out", f"out/{files.ADAPTER}"))
    shutil.copytree(stories, full)
    plain = {name: tensor.bfloat16() for name, tensor in files.load_dict(full / files.LIT_MODEL).items()}
    files.save(full / files.LIT_MODEL, plain)
    said = run_script(
        *("scripts/quantize_checkpoint", "--checkpoint_dir", full, "--quantize", "bnb.nf4"),
        *("--data_dir", prepared, "--out_dir", base, "--skip_modules", "[mlp.proj,h.0]"),
    ).stdout
    assert "% with the nearest codes" in said
    planned, plan = [], memory.plan_training
    monkeypatch.setattr(
        memory, "plan_training", lambda config, setting: planned.append(setting) or plan(config, setting)
    )
    figures = {"interval": 0, "max_new_tokens": 0}
    load_script("finetune/lora").main(
        data_dir=prepared,
        checkpoint_dir=base,
        out_dir=out,
        precision="32-true",
        train=TrainArgs(max_steps=3, global_batch_size=4, learning_rate=0.05, lr_warmup_steps=0),
        eval=EvalArgs(**figures),
    )
    estimate = load_script("scripts/estimate_memory").main
    for folder, kind in ((base, None), (base, "bnb.fp4"), (full, None)):
        estimate(checkpoint_dir=folder, quantize=kind)
    assert [setting.quantize for setting in planned] == ["bnb.nf4", "bnb.nf4", "bnb.fp4", None]
    _, n_skipped = checkpoint.kept_kind(base)
    assert n_skipped > 0
    assert [setting.n_skipped for setting in planned] == [n_skipped, n_skipped, 0, 0]
    found = Adapter.load(adapter)
    assert found.quantize is None
    assert found.base_fingerprint == checkpoint.fingerprint(base)
    merge = ("scripts/merge_lora", "--lora_path", adapter, "--out_dir", tmp_path / "merged", "--checkpoint_dir")
    assert run_script(*merge, full, check=False).returncode  # another base
    run_script(*merge, base)
    # Full weights for transformers, rounded to what the full model is in, as ours computes with them in that precision.
    run_script("scripts/convert_lit_checkpoint", "--checkpoint_path", base, "--output_path", tmp_path / "hf")
    merged, exported = (
        files.load_dict(tmp_path / "merged" / files.LIT_MODEL),
        load_file(tmp_path / "hf" / "model.safetensors"),
    )
    assert {tensor.dtype for tensor in (*merged.values(), *exported.values())} == {torch.bfloat16}
    tokens = torch.arange(1, 30)[None]
    model = checkpoint.load_model(base, torch.float32)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            rounded = module.dense(torch.bfloat16).float()
            surgery.put(model, name, nn.Linear(*rounded.shape[::-1], bias=False))
            model.get_submodule(name).weight = nn.Parameter(rounded)
    with torch.no_grad():
        ours = model(tokens)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.std()), rtol=0)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"quantize": "bnb.int8"}, "4-bit codes"),
        ({"quantize": "bnb.nf4+head"}, "4-bit codes"),
        ({"out_dir": None}, "go together"),
        ({"data_dir": None}, "go together"),
        ({"calibration_tokens": 0}, "at least 1"),
        ({"same": True}, "holds weights"),
        ({"skip_modules": "mlp.prj"}, r"'mlp\.prj': no layer is called so; there are h\.0 to h.*mlp\.proj"),
        ({"skip_modules": ["attn", "mlp"]}, "name fewer"),
        ({"skip_modules": "mlp.proj", "data_dir": None, "out_dir": None}, "fitted to rows"),
        ({"base": "fitted"}, "in 4 bits already"),
    ],
)
def test_what_cannot_be_is_said(flags: dict, problem: str, stories: Path, prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(stories, tmp_path / "m")
    told = {"checkpoint_dir": tmp_path / "m", "data_dir": prepared, "out_dir": tmp_path / "out", **flags}
    if told.pop("same", False):
        told["out_dir"] = tmp_path / "m"
    if told.pop("base", None):
        calibration.write(tmp_path / "m", "bnb.fp4", [torch.arange(1, 9)], tmp_path / "fitted")
        told["checkpoint_dir"] = tmp_path / "fitted"
    with pytest.raises(ValueError, match=problem):
        load_script("scripts/quantize_checkpoint").main(**told)
