"""Quantized layers against bitsandbytes' own numbers and a dequantise-then-matmul reference, in every shape."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import STORIES, load_script, run_script, without_pairs
from twins import make_twin

from lit_gpt import checkpoint, files, lora, products, quantization
from lit_gpt.adapter import Adapter
from lit_gpt.args import EvalArgs, TrainArgs
from lit_gpt.inference import Assistant
from lit_gpt.kernels import four_bits
from lit_gpt.lora import LoRASettings
from lit_gpt.model import Linear

pytest.importorskip("bitsandbytes")
SHAPES = [(64, 64), (96, 128), (32, 172), (33, 50), (128, 48), (7, 63), (5, 16), (300, 896)]  # (out, in)


def by_hand(weight: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The definition, a block at a time: scale by the largest, take the nearest level, scale back."""
    flat, out = weight.float().flatten(), torch.empty(weight.numel())
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        peak = block.abs().max()
        nearest = (block[:, None] / peak - levels).abs().argmin(dim=1)
        out[start : start + 64] = levels[nearest] * peak
    return out.view(weight.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_the_nearest_levels_for_every_shape(shape: tuple, levels: str, dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) * 0.02
    layer = quantization.quantize(weight, f"bnb.{levels}")
    got, expected = layer.dense(torch.float32), by_hand(weight, quantization.levels_of(levels))
    exact = weight.float()
    assert (
        (got - exact).abs() <= (expected - exact).abs() + 1e-7
    ).all()  # where two levels are as near, either will do
    assert (got != expected).float().mean() < 0.002


@pytest.mark.parametrize("shape", SHAPES[:5])
@pytest.mark.parametrize("kind", ["bnb.nf4", "bnb.fp4", "bnb.nf4-dq"])
def test_codes_and_scales_are_bitsandbytes_own(shape: tuple, kind: str) -> None:
    import bitsandbytes.functional as theirs

    weight = torch.randn(shape)
    layer = quantization.quantize(weight, kind)
    codes, state = theirs.quantize_4bit(
        weight, blocksize=64, quant_type=layer.levels, compress_statistics=kind.endswith("-dq")
    )
    assert torch.equal(layer.weight.flatten(), codes.flatten())
    assert torch.equal(layer._buffers["absmax"], state.absmax)
    if kind.endswith("-dq"):
        assert torch.equal(layer.nested_absmax, state.state2.absmax)
        assert torch.equal(layer.offset, state.offset)


@pytest.mark.parametrize("levels", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("processor")
@without_pairs
def test_codes_in_c_are_those_of_the_plain_body(
    levels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = (torch.randn(40, 896, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    weight[0, :64], weight[1, 5], weight[2, 70] = 0, float("nan"), float("inf")
    weight[3], weight[4, 7], weight[5, :2] = 1e-41, -float("inf"), torch.tensor([float("nan"), float("inf")])
    weight[6] *= 1e-37
    if not four_bits.fits(weight):
        pytest.skip("no C compiler")
    found = quantization.quantize_4bit(weight, levels)
    monkeypatch.setattr(four_bits, "fits", lambda weight: False)
    for mine, other in zip(found, quantization.quantize_4bit(weight, levels), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", quantization.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_forward_and_backward_are_dequantise_then_matmul(shape: tuple, kind: str, dtype: torch.dtype) -> None:
    layer = quantization.quantize(torch.randn(shape) * 0.02, kind)
    weight = layer.dense(dtype)
    x = torch.randn(6, shape[1], dtype=dtype, requires_grad=True)
    reference = x.detach().clone().requires_grad_()
    seed = torch.randn(6, shape[0], dtype=dtype)
    layer(x).backward(seed)
    expected = torch.nn.functional.linear(products.widened(reference), products.widened(weight)).to(dtype)
    expected.backward(seed)
    assert torch.equal(layer(x), expected)
    assert torch.equal(x.grad, reference.grad)


@pytest.mark.parametrize(
    ("kind", "limit"), [("bnb.nf4", 0.1), ("bnb.nf4-dq", 0.1), ("bnb.fp4", 0.13), ("bnb.int8", 0.01)]
)
def test_the_error_is_of_the_known_size(kind: str, limit: float) -> None:
    weight = torch.randn(256, 512)
    error = (quantization.quantize(weight, kind).dense(torch.float32) - weight).norm() / weight.norm()
    assert 0.5 * limit < error < limit


@pytest.mark.parametrize("kind", quantization.KINDS)
def test_validation_between_steps_changes_nothing(kind: str, tmp_path: Path) -> None:
    """bitsandbytes' own layers repack their weights in an eval pass, after which training is silently wrong."""
    make_twin("llama-grouped", tmp_path)
    tokens = torch.randint(0, 101, (2, 16))

    def losses(validates: bool) -> list[float]:
        model = checkpoint.load_model(tmp_path, torch.float32, quantize=kind)
        torch.manual_seed(0)
        lora.attach(model, LoRASettings(dropout=0.0, targets=("query", "mlp")))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        seen = []
        for _ in range(4):
            if validates:
                model.eval()
                with torch.no_grad():
                    model(tokens[:1, :1])
                model.train()
            loss = model(tokens, labels=tokens.roll(-1, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    with_validation = losses(True)
    assert with_validation == losses(False)
    assert with_validation[-1] < with_validation[0]


@pytest.mark.parametrize("kind", ["bnb.nf4", "bnb.nf4-dq", "bnb.fp4"])
def test_the_one_token_kernel_agrees(kind: str) -> None:
    layer = quantization.quantize(torch.randn(96, 192) * 0.02, kind)
    x = torch.randn(3, 192, dtype=torch.bfloat16)
    expected = layer(x)
    if not layer.pack():
        pytest.skip("this processor has no bfloat16 dot products")
    torch.testing.assert_close(layer(x), expected, atol=2e-3, rtol=2e-2)  # it rounds the scales to bfloat16 too


def test_packing_lays_codes_out_as_bitsandbytes_does() -> None:
    import bitsandbytes.functional as theirs

    codes, state = theirs.quantize_4bit(torch.randn(96, 192), blocksize=64, quant_type="nf4", compress_statistics=False)
    expected, _ = theirs._convert_weight_packed_for_cpu(codes, state)
    assert torch.equal(quantization.pack_rows(codes.view(96, 96)), expected)


def test_what_cannot_be_packed_stays_as_it_is() -> None:
    layer = quantization.quantize(torch.randn(33, 50), "bnb.nf4")
    x = torch.randn(1, 50, dtype=torch.bfloat16)
    expected = layer(x)
    assert not layer.pack()
    assert torch.equal(layer(x), expected)


def test_only_the_blocks_linear_layers_are_quantized(tmp_path: Path) -> None:
    make_twin("mixtral", tmp_path)
    model = checkpoint.load_model(tmp_path, torch.bfloat16, quantize="bnb.nf4")
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["lm_head"] == "Linear"
    assert kinds["transformer.h.0.mlp.router"] == "Linear"
    assert kinds["transformer.h.0.mlp.experts.3.up"] == "Linear4bit"
    assert kinds["transformer.h.0.attn.q"] == "Linear4bit"
    assert isinstance(model.transformer.wte.weight, torch.nn.Parameter)
    assert model.transformer.wte.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", quantization.KINDS)
def test_kept_weights_give_the_same_model_and_go_stale(kind: str, tmp_path: Path) -> None:
    shutil.copytree(STORIES, tmp_path / "m")
    tokens = torch.randint(0, 512, (1, 20))
    with torch.no_grad():
        fresh = checkpoint.load_model(tmp_path / "m", torch.float32, quantize=kind)(tokens)
        load_script("scripts/quantize_checkpoint").main(checkpoint_dir=tmp_path / "m", quantize=kind)
        moved = (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "moved")
        (tmp_path / "m" / "model.safetensors").symlink_to(moved)  # the same file, but nobody needs to read it
        kept = checkpoint.load_model(tmp_path / "m", torch.float32, quantize=kind)(tokens)
    assert torch.equal(kept, fresh)
    (tmp_path / "m" / "model.safetensors").unlink()
    shutil.copy(STORIES / "model.safetensors", tmp_path / "m")
    with torch.no_grad():
        again = checkpoint.load_model(tmp_path / "m", torch.float32, quantize=kind)(tokens)
    assert torch.equal(again, fresh)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-true", "32-true", None])
@pytest.mark.parametrize("kind", ["bnb.nf4-dq", "bnb.int8-training"])
def test_training_works_with_every_precision_and_the_adapter_remembers(
    kind: str, precision: str | None, prepared: Path, stories: Path, tmp_path: Path
) -> None:
    load_script("finetune/lora").main(
        data_dir=prepared,
        checkpoint_dir=stories,
        out_dir=tmp_path,
        precision=precision,
        quantize=kind,
        lora_head=True,
        train=TrainArgs(learning_rate=5e-3, global_batch_size=4, max_steps=16),
        eval=EvalArgs(max_new_tokens=2, interval=5),
    )
    adapter = Adapter.load(tmp_path / files.ADAPTER)
    assert adapter.quantize == quantization.resolve(kind)
    assert all(factor.dtype == torch.float32 and factor.isfinite().all() for factor in adapter.state.values())
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    losses = [float(row.split(",")[4]) for row in rows[1:]]
    assert losses[-1] < losses[0] - 1
    assistant = Assistant(stories, lora_path=tmp_path / files.ADAPTER)
    assert any(isinstance(m, quantization.QuantizedLinear) for m in assistant.model.modules())


@pytest.mark.parametrize("kind", ["bnb.nf4", "bnb.fp4-dq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_numbers_of_every_dtype_are_the_same_ones(kind: str, dtype: torch.dtype) -> None:
    """bitsandbytes' kernel knows no float64, and gives back whatever was in memory."""
    layer = quantization.quantize(torch.randn(64, 128), kind)
    assert torch.equal(layer.dense(dtype), layer.dense(torch.float32).to(dtype))


@pytest.mark.parametrize("kind", ["bnb.nf4", "bnb.nf4-dq"])
def test_a_layer_moves_whole(kind: str) -> None:
    """bitsandbytes reads all of it where the weight is."""
    layer = quantization.quantize(torch.randn(64, 128), kind).to("meta")
    tensors = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    assert all(tensor.is_meta for tensor in (*tensors, *layer.parameters(), *layer.buffers()))
    assert layer.code.is_meta
    assert sorted(dict(layer.parts())) == sorted(layer.layout())  # and stores no levels


def test_a_quantized_model_is_not_merged_in_place(tmp_path: Path) -> None:
    make_twin("llama", tmp_path)
    model = checkpoint.load_model(tmp_path, torch.float32, quantize="bnb.nf4")
    lora.attach(model, LoRASettings())
    with pytest.raises(ValueError, match="cannot take the update in"):
        lora.merge(model)


def test_wrong_kinds_are_named_with_the_right_ones(stories: Path) -> None:
    done = run_script("generate/base", "--checkpoint_dir", stories, "--quantize", "nf4", check=False)
    assert done.returncode == 1
    assert "unknown --quantize 'nf4'; known are bnb.nf4, bnb.nf4-dq" in done.stderr


def test_merging_into_what_training_saw_keeps_the_unmerged_loss(stories: Path, prepared: Path, tmp_path: Path) -> None:
    load_script("finetune/lora").main(
        data_dir=prepared,
        checkpoint_dir=stories,
        out_dir=tmp_path / "out",
        precision="32-true",
        quantize="bnb.nf4",
        lora_mlp=True,
        train=TrainArgs(learning_rate=1e-2, global_batch_size=4, max_steps=30),
        eval=EvalArgs(max_new_tokens=0),
    )
    flags = ("--lora_path", tmp_path / "out" / files.ADAPTER, "--checkpoint_dir", stories, "--data_dir", prepared)
    done = run_script("scripts/merge_lora", *flags, "--out_dir", tmp_path / "merged")
    losses = {
        line.rsplit("  ", 1)[0].strip(): float(line.rsplit("  ", 1)[1])
        for line in done.stdout.splitlines()
        if line.startswith(("base +", "merged into"))
    }
    assert losses["merged into the dequantized weights"] == pytest.approx(losses["base + adapter, unmerged"], abs=1e-4)
    assert losses["merged into the original weights"] != losses["base + adapter, unmerged"]
    # What the original weights differ by is no loss by rounding.
    done = run_script("scripts/merge_lora", *flags[:4], "--out_dir", tmp_path / "other", "--base", "original")
    told = dict(line.rsplit("  ", 1) for line in done.stdout.splitlines() if line.startswith("mean"))
    effect, lost = (float(value) for value in told.values())
    assert lost < 1e-3 < effect
    merged = dict(checkpoint.Weights.from_folder(tmp_path / "merged"))
    base = dict(checkpoint.Weights.from_folder(stories))
    seen = quantization.quantize(base["transformer.h.0.attn.k.weight"], "bnb.nf4").dense(torch.float32)
    assert torch.equal(merged["transformer.h.0.attn.k.weight"], seen)  # a layer without an update
    assert torch.equal(merged["transformer.wte.weight"], base["transformer.wte.weight"])


@pytest.mark.parametrize("kind", ["bnb.nf4-dq", "bnb.int8"])
def test_the_head_is_quantized_if_the_kind_says_so(kind: str, tmp_path: Path) -> None:
    make_twin("llama", tmp_path)
    plain, without, with_head = (
        checkpoint.load_model(tmp_path, torch.float32, quantize=quantize) for quantize in (None, kind, f"{kind}+head")
    )
    assert type(without.lm_head) is Linear
    expected = quantization.quantize(plain.lm_head.weight, kind)
    assert torch.equal(with_head.lm_head.dense(torch.float32), expected.dense(torch.float32))
    assert torch.equal(with_head.transformer.wte.weight, plain.transformer.wte.weight)
    tokens = torch.randint(0, 101, (2, 9))
    states = {}
    for name, model in (("without", without), ("with", with_head)):
        model.lm_head.register_forward_pre_hook(lambda module, args, name=name: states.update({name: args[0]}))
    with torch.no_grad():
        logits = with_head(tokens)
        without(tokens)
    assert torch.equal(states["with"], states["without"])  # all below the head is alike
    torch.testing.assert_close(logits, states["with"] @ expected.dense(torch.float32).T)


def test_a_quantized_head_is_kept_beside_the_checkpoint(tmp_path: Path) -> None:
    make_twin("neox", tmp_path)
    tokens = torch.randint(0, 101, (1, 9))
    fresh = checkpoint.load_model(tmp_path, torch.bfloat16, quantize="bnb.nf4+head")
    load_script("scripts/quantize_checkpoint").main(checkpoint_dir=tmp_path, quantize="bnb.nf4+head")
    kept = checkpoint.load_model(tmp_path, torch.bfloat16, quantize="bnb.nf4+head")
    assert (tmp_path / "quantized-bnb.nf4+head-v2.pth").is_file()
    assert isinstance(kept.lm_head, quantization.Linear4bit)
    with torch.no_grad():
        assert torch.equal(kept(tokens), fresh(tokens))
    assert type(checkpoint.load_model(tmp_path, torch.bfloat16, quantize="bnb.nf4").lm_head) is Linear


@pytest.mark.parametrize("lora_head", [False, True])
def test_an_adapter_remembers_that_the_head_was_quantized(
    lora_head: bool, stories: Path, prepared: Path, tmp_path: Path
) -> None:
    base = tmp_path / "untied"
    checkpoint.files.copy_companions(stories, base)
    model = checkpoint.load_model(stories, torch.float32)
    model.config.tie_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 1.1)
    checkpoint.save_model(base / files.LIT_MODEL, model, stories, "alpaca")
    load_script("finetune/lora").main(
        data_dir=prepared,
        checkpoint_dir=base,
        out_dir=tmp_path / "out",
        precision="32-true",
        quantize="bnb.nf4+head",
        lora_head=lora_head,
        train=TrainArgs(learning_rate=1e-2, global_batch_size=4, max_steps=8),
        eval=EvalArgs(max_new_tokens=0),
    )
    lora_path, merged_dir = tmp_path / "out" / files.ADAPTER, tmp_path / "merged"
    assert Adapter.load(lora_path).quantize == "bnb.nf4+head"
    unmerged = Assistant(base, "32-true", lora_path).model
    head = unmerged.lm_head.base if lora_head else unmerged.lm_head
    assert isinstance(head, quantization.Linear4bit)
    merge = load_script("scripts/merge_lora").main
    assert merge(lora_path=lora_path, checkpoint_dir=base, out_dir=merged_dir) == 0
    merged = checkpoint.load_model(merged_dir, torch.float32)
    tokens = torch.randint(0, 512, (1, 30))
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens), unmerged(tokens), atol=1e-4, rtol=0)


def test_a_tied_head_is_not_quantized_apart(stories: Path) -> None:
    """A quantized copy of the embedding would take memory instead of giving some back."""
    done = run_script("generate/base", "--checkpoint_dir", stories, "--quantize", "bnb.nf4+head", check=False)
    assert done.returncode == 1
    assert "has no head of its own to quantize" in done.stderr
    assert "use --quantize bnb.nf4\n" in done.stderr


# With and without a last block that is whole.
@pytest.mark.usefixtures("processor")
@without_pairs
@pytest.mark.parametrize("in_c", [True, False])
@pytest.mark.parametrize("shape", [(7, 63), (33, 50), (64, 96), (40, 1536)])
@pytest.mark.parametrize("kind", ["bnb.nf4", "bnb.fp4-dq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_levels_times_scales(
    in_c: bool, shape: tuple[int, int], kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In C, and as without a C compiler."""
    layer = quantization.quantize(torch.randn(shape), kind)
    if not in_c:
        monkeypatch.setattr(four_bits, "makes", lambda codes, dtype: False)
    elif not four_bits.makes(layer.weight, dtype):
        pytest.skip("no C compiler")
    pairs = layer.weight.flatten()
    codes = torch.stack((pairs >> 4, pairs & 15), dim=1).flatten()[: shape[0] * shape[1]].long()
    scales = layer.scales().repeat_interleave(layer.block)[: len(codes)]
    expected = (quantization.levels_of(layer.levels)[codes] * scales).view(shape).to(dtype)
    assert torch.equal(layer.dense(dtype), expected)
