"""The same numbers on a GPU as on the CPU, from 4-bit codes to finished runs; skipped where there is none."""

import json
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import load_script
from twins import make_twin

from lit_gpt import attention, calibration, checkpoint, lora, memory, optimizers, quantization, runtime
from lit_gpt.adapter import Adapter
from lit_gpt.args import EvalArgs, TrainArgs
from lit_gpt.cache import KVCache
from lit_gpt.config import Config
from lit_gpt.generation import decode_step, generate_batch, prefill
from lit_gpt.lora import LoRASettings
from lit_gpt.memory import Setting
from lit_gpt.model import GPT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = torch.device("cuda", 0)
FAMILIES = "llama-grouped llama-biased neox falcon-40b mistral mixtral phi gemma2 qwen3 gpt2".split()
LENGTHS = (20, 1, 13)
KINDS = (None, *quantization.KINDS)
PRECISIONS = ("bf16-true", "bf16-mixed", "16-true", "16-mixed", "32-true", None)
FIGURES = {"interval": 0, "max_new_tokens": 8, "max_iters": 4}


def adapted(folder: Path, device: torch.device | str, dtype: torch.dtype, **how: object) -> GPT:
    """A model with random factors, the same on every device."""
    model = checkpoint.load_model(folder, dtype, device=device, **how)  # type: ignore[arg-type]
    lora.attach(model, LoRASettings(dropout=0.0))
    generator = torch.Generator().manual_seed(1)
    factors = lora.adapter_state(model).items()
    state = {name: torch.randn(factor.shape, generator=generator) * 0.05 for name, factor in factors}
    lora.load_adapter_state(model, state, "the test")
    return model


TOKENS = torch.randint(1, 101, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))
LABELS = TOKENS.roll(-1, 1)
TOGETHER = [(TOKENS, LABELS, LENGTHS)]
ALONE = [
    (tokens, labels, (n,))
    for tokens, labels, n in zip(*(x.split(LENGTHS, dim=1) for x in (TOKENS, LABELS)), LENGTHS, strict=True)
]


def loss_and_gradients(model: GPT, batches: list) -> list[torch.Tensor]:
    """Summed over batches of tokens and labels (1, T) and lengths; the gradients are the factors'."""
    device, total = model.transformer.wte.weight.device, torch.zeros(())
    for tokens, labels, lengths in batches:
        where = torch.arange(sum(lengths))
        loss = model(tokens.to(device), labels=labels.to(device), where=where.to(device), lengths=lengths)
        loss.backward()
        total += loss.detach().cpu()
    return [total, *(p.grad.cpu() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_cpus(family: str, tmp_path: Path) -> None:
    make_twin(family, tmp_path)
    models = (adapted(tmp_path, device, torch.float32) for device in (GPU, "cpu"))
    here, there = (loss_and_gradients(model, TOGETHER) for model in models)
    for mine, other in zip(here, there, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama-grouped", "mistral"])  # mistral's window is shorter than the rows
def test_rows_laid_end_to_end_give_what_each_gives_alone(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make_twin(family, tmp_path)
    together = loss_and_gradients(adapted(tmp_path, GPU, dtype), TOGETHER)
    alone = loss_and_gradients(model := adapted(tmp_path, GPU, dtype), ALONE)
    exact = loss_and_gradients(adapted(tmp_path, "cpu", torch.float32), ALONE)
    # No further from the truth than rows alone are: both round each layer's numbers.
    for mine, other, true in zip(together, alone, exact, strict=True):
        assert float((mine - true).norm()) <= 1.25 * float((other - true).norm()) + 1e-3 * float(true.norm())
    size = model.config.head_size
    assert attention.varlen_is_right(GPU, dtype, model.config.n_head, model.config.n_query_groups, size)


@pytest.mark.parametrize("shape", [(64, 64), (96, 128), (32, 172), (33, 50), (7, 63), (300, 896)])
@pytest.mark.parametrize("kind", quantization.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized_layers_are_the_cpus(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    here, there = (quantization.quantize(weight.to(device), kind) for device in (GPU, "cpu"))
    dense, expected = here.dense(torch.float32).cpu(), there.dense(torch.float32)
    # The scales' mean is rounded otherwise, and where two levels are as near, either will do.
    assert float((dense - expected).norm() / expected.norm()) < 0.01
    moved = quantization.empty(shape[1], shape[0], kind)
    for leaf, part in there.parts():
        moved.load(leaf, part.to(GPU))
    torch.testing.assert_close(moved.dense(torch.float32).cpu(), there.dense(torch.float32), rtol=1e-6, atol=1e-9)
    x = torch.randn(5, shape[1], device=GPU).to(dtype).requires_grad_()
    y = here(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    exact = here.dense(dtype).double()
    for mine, true in ((y, x.double() @ exact.t()), (x.grad, grad.double() @ exact)):
        assert float((mine.double() - true).norm() / true.norm()) < {torch.float32: 1e-6}.get(dtype, 4e-3)


def test_codes_fitted_to_rows_are_as_near_as_the_cpus(tmp_path: Path) -> None:
    make_twin("llama-grouped", tmp_path)
    rows = list(torch.randint(1, 101, (600,), generator=torch.Generator().manual_seed(3)).split(60))
    how = tmp_path, "bnb.nf4", rows, torch.float32
    (here, errors), (there, expected) = (calibration.calibrate(*how, device) for device in (GPU, "cpu"))
    assert here.keys() == there.keys()
    # Sums are rounded otherwise, so one of two codes that are as near may be the other, which all later layers see.
    for mine, other in ((errors.chosen, expected.chosen), (errors.nearest, expected.nearest)):
        assert mine == pytest.approx(other, rel=0.05)
    first, same = (layers["transformer.h.0.attn.q.weight"] for layers in (here, there))
    assert float((first.weight == same.weight).double().mean()) > 0.99


@pytest.mark.parametrize("kind", ["bnb.nf4", "bnb.nf4-dq"])
def test_a_folder_in_4_bits_answers_as_on_the_cpu(kind: str, tmp_path: Path) -> None:
    make_twin("llama-grouped", tmp_path / "full")
    rows = list(torch.randint(1, 101, (300,)).split(60))
    calibration.write(tmp_path / "full", kind, rows, tmp_path / "m", dtype=torch.float32)
    tokens, logits = torch.randint(1, 101, (1, 8)), []
    for device in (GPU, "cpu"):
        model = checkpoint.load_model(tmp_path / "m", torch.float32, device=device).eval()
        with torch.no_grad():
            # One token is another kernel's.
            logits.append([model(some.to(device)).cpu() for some in (tokens, tokens[:, :1])])
    for mine, expected in zip(*logits, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-3, rtol=1e-3)


def finetune(stories: Path, prepared: Path, out: Path, precision: str | None, kind: str | None, **more: object) -> dict:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*can be recorded")  # the answer that it shows
        load_script("finetune/lora").main(
            *(prepared, stories, out),
            precision=precision,
            quantize=kind,
            lora_dropout=0.0,
            train=TrainArgs(global_batch_size=6, micro_batch_size=3, max_steps=4, lr_warmup_steps=1),
            eval=EvalArgs(**FIGURES),  # type: ignore[arg-type]
            **more,
        )
    told: dict = json.loads((out / "report.json").read_text())
    return told


@pytest.fixture(scope="module")
def exact_run(stories: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return finetune(stories, prepared, tmp_path_factory.mktemp("exact"), "32-true", None)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_works_with_every_kind_and_precision(
    kind: str | None, precision: str | None, exact_run: dict, stories: Path, prepared: Path, tmp_path: Path
) -> None:
    told = finetune(stories, prepared, tmp_path, precision, kind)
    coarse = kind is not None and kind != "bnb.int8"
    # This model has 260,032 parameters, in which 4 bits are felt.
    for figure in ("train_loss", "val_loss"):
        assert told[figure] == pytest.approx(exact_run[figure], rel=0.1 if coarse else 0.02)
    assert Adapter.load(tmp_path / "lit_model_lora_finetuned.pth").quantize == kind


@pytest.mark.parametrize("name", [*optimizers.TORCH, *optimizers.BITSANDBYTES])
def test_every_optimizer_trains(name: str, exact_run: dict, stories: Path, prepared: Path, tmp_path: Path) -> None:
    told = finetune(stories, prepared, tmp_path, "32-true", None, optimizer=name)
    near = 0.1 if name == "sgd" else 1e-3
    assert told["val_loss"] == pytest.approx(exact_run["val_loss"], rel=near)


def test_checkpointing_changes_nothing(exact_run: dict, stories: Path, prepared: Path, tmp_path: Path) -> None:
    told = finetune(stories, prepared, tmp_path, "32-true", None, activation_checkpointing=True)
    assert told["val_loss"] == pytest.approx(exact_run["val_loss"], abs=2e-4)


@pytest.mark.parametrize("kind", [None, "bnb.nf4"])
def test_compiled_blocks_compute_the_same(
    kind: str | None, exact_run: dict, stories: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "attend", attention.attend)  # put back afterwards
    told = finetune(stories, prepared, tmp_path, "bf16-true", kind, compile=True)
    assert told["val_loss"] == pytest.approx(exact_run["val_loss"], rel=0.1 if kind else 0.02)


@pytest.mark.parametrize("family", ["llama-grouped", "mistral", "gemma2", "phi", "gpt2", "mixtral", "phi3-longrope"])
def test_prompts_are_continued_as_on_the_cpu(family: str, tmp_path: Path) -> None:
    make_twin(family, tmp_path)
    found = []
    for device in (GPU, "cpu"):
        model, seen = adapted(tmp_path, device, torch.float32).eval(), [0, 0, 0]

        def ends(row: int, token: int, seen: list[int] = seen) -> bool:
            seen[row] += 1
            return (row, seen[row]) in {(1, 6), (0, 12)}  # the batch shrinks

        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # that nothing can be recorded
            found.append(list(generate_batch(model, [[5, 9, 60], list(range(3, 13)), [1]], 24, ends=ends)))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_steps_of_quantized_layers_give_what_each_gives(kind: str | None, stories: Path) -> None:
    model = checkpoint.load_model(stories, torch.bfloat16, device=GPU, quantize=kind).eval()
    cache, plain = (KVCache(model.config.n_layer, 1, 40) for _ in range(2))
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for one in (cache, plain):
            prefill(model, [[1, 400, 300]], one, GPU)
        for token in (403, 407, 261, 378, 12, 400, 9):
            tokens = torch.tensor([[token]], device=GPU)
            mine, other = decode_step(model, tokens, cache), model(tokens, cache=plain)[:, -1]
            assert float((mine - other).float().norm() / other.float().norm()) < 0.02
    assert cache.recorded.graph is not None
    assert plain.recorded is None


@pytest.mark.parametrize("kind", ["bnb.nf4", "bnb.fp4", "bnb.nf4-dq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_token_without_the_weight(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = quantization.quantize(torch.randn(300, 896, device=GPU) * 0.02, kind)
    x = torch.randn(1, 1, 896, device=GPU).to(dtype)
    true = x.double() @ layer.dense(torch.float32).double().t()
    monkeypatch.delattr(quantization.Linear4bit, "dense")
    with torch.inference_mode():
        y = layer(x).double()
    assert float((y - true).norm() / true.norm()) < {torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 1e-2)


def measured_peak(setting: Setting) -> int:
    # Of two micro-batches: the plan is of one that finds the gradients of those before it.
    peak: int = load_script("benchmarks/gpu").measured_training(SMALL, setting, GPU, 2, micro_batches=2).peak
    return peak


SMALL = Config(n_layer=6, n_head=16, n_embd=1024, intermediate_size=2816, vocab_size=32000, block_size=2048)


@pytest.mark.parametrize(
    "setting",
    [
        Setting(runtime.PRECISIONS["bf16-true"], rows=(700, 512, 90, 20)),
        Setting(runtime.PRECISIONS["bf16-mixed"], rows=(700, 512, 90, 20)),
        Setting(runtime.PRECISIONS["32-true"], rows=(700, 512)),
        Setting(runtime.PRECISIONS["bf16-true"], "bnb.nf4", rows=(700, 512)),
        Setting(runtime.PRECISIONS["bf16-true"], "bnb.int8", rows=(700, 512)),
        Setting(runtime.PRECISIONS["bf16-true"], rows=(1500,), activation_checkpointing=True),
        Setting(runtime.PRECISIONS["bf16-mixed"], lora=None, rows=(700,)),
    ],
    ids=lambda setting: f"{setting.precision.name}-{setting.quantize}-{setting.rows}-{setting.lora is None}",
)
def test_a_step_takes_what_was_planned(setting: Setting) -> None:
    # In a process of its own: cuBLAS keeps 0.03 GB for each stream and thread that other tests used.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        peak = other.submit(measured_peak, setting).result()
    assert memory.plan_training(SMALL, setting).total == pytest.approx(peak, rel=0.05)


def test_running_out_of_memory_ends_in_advice(stories: Path, prepared: Path, tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction(held + 1e-5)
    try:
        with pytest.raises(ValueError, match="out of memory.*see tutorials/oom.md"):
            finetune(stories, prepared, tmp_path, "32-true", None)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
