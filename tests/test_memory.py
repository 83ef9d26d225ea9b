"""The planner against real tensors, against itself, and against the figures that were published."""

import itertools
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script, run_script
from twins import make_twin

from lit_gpt import checkpoint, files, finetuning, memory, ops, optimizers, runtime
from lit_gpt.adapter import Adapter
from lit_gpt.args import TrainArgs
from lit_gpt.config import Config
from lit_gpt.data import PreparedSet
from lit_gpt.lora import LoRASettings
from lit_gpt.memory import Ledger, Setting

BF16, MIXED, FULL = (runtime.PRECISIONS[name] for name in ("bf16-true", "bf16-mixed", "32-true"))
SMALL = Config(n_layer=5, n_head=4, n_embd=128, intermediate_size=256, vocab_size=512, block_size=256)
EXPERTS = replace(SMALL, n_expert=4, n_expert_per_token=2, expert_size=128)


def test_the_ledger_counts_what_lives_together() -> None:
    with Ledger() as ledger:
        ledger.part = "a"
        first = torch.empty(1024, dtype=torch.uint8)
        view = first[10:]
        second = torch.empty(100, dtype=torch.uint8)  # takes a multiple of 512
        del second
        third = torch.empty(700, dtype=torch.uint8)
        del first
    assert ledger.peak["a"] == 1024 + 1024
    assert ledger.now["a"] == 1024 + 1024  # the view keeps its storage
    del view, third
    assert ledger.now["a"] == 0


def test_weights_are_counted_to_the_byte() -> None:
    """SmolLM2-135M: 134,515,008 parameters, its head tied to the embedding; norms are float32 under mixed precision."""
    config = Config.from_name("SmolLM2-135M-Instruct")
    parts = memory.plan_training(config, Setting(BF16, rows=(64,))).parts
    n_norms = 61 * 576
    assert parts["weights"] == pytest.approx(2 * 134_515_008, abs=70 * memory.ROUNDING)
    mixed = memory.plan_training(config, Setting(MIXED, rows=(64,))).parts
    assert mixed["weights"] - parts["weights"] == pytest.approx(2 * n_norms, abs=70 * memory.ROUNDING)
    n_factors = 30 * 8 * ((576 + 576) + (576 + 192))
    for part, per_number in (("adapter", 4), ("gradients", 4), ("optimizer", 8)):
        assert parts[part] == pytest.approx(per_number * n_factors, abs=130 * memory.ROUNDING)


def test_full_finetuning_holds_what_torch_makes() -> None:
    """Every weight trains in the precision's `trained`, which AdamW's moments are in too; generation needs no such."""
    config = Config.from_name("SmolLM2-135M-Instruct")
    for precision, size in ((BF16, 2), (MIXED, 4)):
        parts = memory.plan_training(config, Setting(precision, lora=None, rows=(64,))).parts
        parameter = torch.nn.Parameter(torch.zeros(1000, dtype=precision.trained))
        parameter.grad = torch.ones_like(parameter)
        optimizer = optimizers.resolve("adamw")([parameter], lr=1e-3, weight_decay=0.0)
        optimizer.step()
        moments = [optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
        state = sum(moment.nbytes for moment in moments) / len(parameter)
        for part, per_number in (("weights", size), ("gradients", size), ("optimizer", state)):
            assert parts[part] == pytest.approx(per_number * 134_515_008, rel=1e-3), part
        alone = memory.plan_inference(config, Setting(precision, lora=None, rows=(64,))).parts
        assert alone["weights"] == pytest.approx(2 * 134_515_008, rel=2e-3)


def test_quantized_weights_take_their_bits() -> None:
    config = Config.from_name("Llama-2-7b-hf")
    linear, rest = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096 + 65 * 4096
    for kind, bits in (("bnb.nf4", 4.5), ("bnb.nf4-dq", 4 + 8 / 64 + 32 / 64 / 256), ("bnb.int8", 8)):
        weights = memory.plan_inference(config, Setting(BF16, kind, None, (16,))).parts["weights"]
        assert weights == pytest.approx(linear * bits / 8 + 2 * rest, rel=1e-3)


WIDE = replace(Config.from_name("SmolLM2-135M-Instruct"), n_layer=12)  # shallow, its way back takes most


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (SMALL, Setting(MIXED, rows=(100, 80))),
        (SMALL, Setting(BF16, "bnb.nf4", rows=(100,), activation_checkpointing=True)),
        (SMALL, Setting(FULL, lora=None, rows=(60, 60), device="cpu")),
        (SMALL, Setting(BF16, lora=LoRASettings(targets=("query", "mlp", "head")), rows=(100,))),
        (WIDE, Setting(MIXED, lora=None, rows=(512,), device="cpu")),
        (WIDE, Setting(BF16, lora=None, rows=(512,), device="cpu")),
    ],
    ids=["lora", "qlora", "full", "all", "large vocabulary", "large vocabulary, narrow"],
)
def test_shallow_models_tell_of_deep_ones(config: Config, setting: Setting) -> None:
    quick, whole = memory.plan_training(config, setting), max(memory._training(config, setting), key=Counter.total)
    for part, size in whole.items():
        if size:
            assert quick.parts[part] == pytest.approx(size, rel=0.01)


def test_lists_of_layers_that_are_all_alike_are_drawn_out_too() -> None:
    """Qwen2's config may say that windows begin with a layer which is not there."""
    setting = Setting(BF16, rows=(40,))
    alike = replace(SMALL, sliding_window=16, sliding_layers=[False] * 5, rope_layers=[True] * 5)
    assert memory.plan_training(alike, setting) == memory.plan_training(SMALL, setting)


@pytest.mark.parametrize("name", "mixtral qwen3-moe gemma2 falcon-7b gpt2 phi3-longrope stablelm-parallel".split())
def test_families_of_every_kind_are_planned(name: str, tmp_path: Path) -> None:
    make_twin(name, tmp_path)
    config, setting = checkpoint.load_config(tmp_path), Setting(BF16, rows=(40,), device="cpu")
    n_parameters = sum(meta.numel() for meta in checkpoint.parameter_metas(checkpoint.hollow(config)).values())
    for plan in (memory.plan_training(config, setting), memory.plan_inference(config, setting, 10)):
        assert plan.parts["weights"] == pytest.approx(2 * n_parameters, rel=0.2)


def test_a_program_that_grows_while_it_plans_is_not_drawn_out_with_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = itertools.count(10**9, 10**8)
    monkeypatch.setattr(memory.runtime, "resident_bytes", lambda: next(sizes))
    plan = memory.plan_training(replace(SMALL, n_layer=40), Setting(FULL, rows=(100,), device="cpu"))
    assert plan.parts["program"] <= next(sizes) + memory.MOST_CPU_HOLES


@pytest.mark.parametrize("config", [SMALL, EXPERTS], ids=["dense", "experts"])
def test_a_real_step_on_this_machine_holds_what_was_planned(config: Config) -> None:
    """The same ledger around real tensors, which nobody has told what the plan said."""
    from lit_gpt import lora
    from lit_gpt.model import GPT

    torch.manual_seed(0)  # which experts get how many
    setting = Setting(FULL, rows=(100, 80), device="cpu")
    planned = memory.plan_training(config, setting).parts
    with Ledger(config.vocab_size) as ledger:
        ledger.part = "model"
        model = GPT(config)
        lora.attach(model, setting.lora or LoRASettings())
        ledger.part = "activations"
        ledger.peak.clear()
        tokens = torch.randint(config.vocab_size, (1, 178))
        model(tokens, labels=tokens, where=torch.arange(178), lengths=(99, 79)).backward()
    real = sum(size for part, size in ledger.peak.items() if part != "model")
    assert planned["activations"] + planned.get("logits", 0) == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("trained", [True, False])
def test_one_piece_of_logits_is_there_at_a_time(trained: bool) -> None:
    """And one gradient of the head's weight, where that trains."""
    peaks = []
    for n in (32, 128):
        head, x = torch.nn.Linear(64, 512, bias=False), torch.randn(n, 64, requires_grad=True)
        parameters, labels = list(head.parameters()) if trained else [], torch.zeros(n, dtype=torch.long)
        with Ledger(512) as ledger:
            ledger.part, ledger.weight_shapes = "activations", {(512, 64)}
            ops.head_loss(head, parameters, x, labels, chunk=32)
        peaks.append((ledger.peak["logits"], ledger.peak["workspace"]))
    assert peaks[0] == peaks[1]
    assert peaks[0][0] > 0


def test_remedies_lower_the_peak_each_on_top_of_the_last() -> None:
    config = Config.from_name("Llama-2-7b-hf")
    setting = Setting(BF16, rows=(512, 512))
    peaks = [memory.plan_training(config, setting).total]
    flags = []
    for flag, tried in memory.remedies(setting):
        flags.append(flag)
        peaks.append(memory.plan_training(config, tried).total)
    assert flags == [
        "--train.micro_batch_size",
        "--activation_checkpointing",
        "--quantize",
        "--train.max_seq_length",
    ]
    assert all(after < before for before, after in itertools.pairwise(peaks))
    told = memory.advice(config, setting, 8e9)
    assert told.startswith(
        "--train.micro_batch_size 1 --activation_checkpointing true --quantize bnb.nf4 would take 4."
    )
    assert "take a smaller model" in memory.advice(config, replace(setting, rows=(64,)), 1e9)


def test_full_finetuning_is_told_of_smaller_optimizers_and_precisions() -> None:
    config, setting = Config.from_name("pythia-70m"), Setting(MIXED, lora=None, rows=(64,))
    tried = dict(memory.remedies(setting))
    assert list(tried) == ["--activation_checkpointing", "--optimizer", "--precision"]
    last = memory.plan_training(config, tried["--precision"])
    told = memory.advice(config, setting, last.total)
    assert told.startswith("--activation_checkpointing true --optimizer adamw-8bit --precision bf16-true would take")
    assert "finetune/lora.py, or take a smaller model" in memory.advice(config, setting, last.total - 1)
    assert list(dict(memory.remedies(Setting(FULL, rows=(64,))))) == [
        "--activation_checkpointing",
        "--precision",
        "--quantize",
    ]


def test_the_script_says_which_flags_fit(tmp_path: Path) -> None:
    done = run_script("scripts/estimate_memory", "--model_name", "Llama-2-7b-hf", "--memory_limit", "24GB")
    assert "does not fit: --train.micro_batch_size 2 would take" in done.stdout
    assert "weights      13.48 GB" in done.stdout
    fits = run_script(
        *("scripts/estimate_memory", "--model_name", "pythia-14m", "--memory_limit", "24GB"), "--quantize", "bnb.nf4"
    )
    assert "24GB: training fits" in fits.stdout
    for flags, message in (
        (("--model_name", "no-such"), "no preset is named"),
        ((), "either --checkpoint_dir or --model_name"),
        (("--model_name", "pythia-14m", "--memory_limit", "much"), "a size such as 24GB"),
        (("--model_name", "pythia-14m", "--micro_batch_size", "0"), "the micro-batch size must be at least 1"),
        (("--model_name", "pythia-14m", "--max_seq_length", "1"), "the length 2"),
        (("--model_name", "pythia-14m", "--full", "true", "--quantize", "bnb.nf4"), "cannot be trained: plan LoRA"),
        (("--model_name", "SmolLM2-135M", "--quantize", "bnb.nf4+head"), "no head of its own to quantize"),
    ):
        refused = run_script("scripts/estimate_memory", *flags, check=False)
        assert refused.returncode == 1
        assert message in refused.stderr


@pytest.mark.slow
def test_published_figures_are_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training within 5 %, inference within 10 %, of every figure in benchmarks/published_memory.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from published_memory import LONGEST, PROMPT, PUBLISHED, original

    for name, precision, quantize, batch, *figures in PUBLISHED:
        for published, trains, limit in zip(figures, (True, False), (0.05, 0.10), strict=True):
            if published is not None:
                length = LONGEST[name] if trains else PROMPT
                predicted = original(Config.from_name(name), precision, quantize, length, batch=batch, trains=trains)
                assert predicted == pytest.approx(published, rel=limit), (name, precision, quantize, batch, trains)
    sys.modules.pop("published_memory")


def test_inference_is_planned_for_a_cpu_too() -> None:
    """Whose bodies in C read numbers, which a plan's tensors lack."""
    config = Config(n_layer=2, n_head=4, n_embd=32, block_size=256, vocab_size=100)
    setting = memory.Setting(runtime.PRECISIONS["32-true"], lora=None, rows=(64,), device="cpu")
    assert memory.plan_inference(config, setting, 10).total > 0


def no_memory(*_: object, **__: object) -> None:
    raise MemoryError


def little_memory(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that a run on `stories` fills to more than half."""
    planned = memory.plan_training(checkpoint.load_config(stories), Setting(FULL, rows=(100,) * 4, device="cpu")).total
    monkeypatch.setattr(finetuning, "memory_limit_bytes", lambda device: 1.5 * planned)


@pytest.mark.parametrize("moment", [(checkpoint, "load_model"), (finetuning, "rehearse"), (finetuning, "fit")])
def test_a_run_that_finds_no_memory_says_what_would_fit(
    moment: tuple, stories: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the model is loaded, at the rehearsal, which there is where memory may be short, and later."""
    little_memory(stories, monkeypatch)
    monkeypatch.setattr(*moment, no_memory)
    with pytest.raises(ValueError, match=r"out of memory: .* GB were planned .* would take .*; see tutorials/oom.md"):
        load_script("finetune/lora").main(prepared, stories, tmp_path / "out", train=TrainArgs(max_steps=1))


@pytest.mark.parametrize("packing", [True, False])
def test_rows_are_planned_as_they_are_laid(
    packing: bool,
    stories: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    plan, planned = memory.plan_training, []
    monkeypatch.setattr(memory, "plan_training", lambda config, how: (planned.append(how), plan(config, how))[1])
    train = TrainArgs(global_batch_size=4, micro_batch_size=4, max_steps=1, packing=packing)
    how = {"precision": "32-true", "quantize": "bnb.nf4", "train": train}
    load_script("finetune/lora").main(prepared, stories, tmp_path / "out", **how)
    data = PreparedSet(prepared / "train.pt", mask_inputs=True, max_length=512)
    batch = data.batch(data.longest(4), packing=packing)
    assert sum(planned[0].rows) - 4 == batch.tokens.numel()  # a row's last token is only a label
    # The model's 260,032 and LoRA's 8,960, though 4 bits are two to a byte.
    assert "training 8,960 of 268,992 parameters" in capsys.readouterr().err


def test_a_rehearsal_is_where_memory_may_be_short_and_changes_nothing(
    stories: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearse, rehearsed = finetuning.rehearse, []
    monkeypatch.setattr(finetuning, "rehearse", lambda *how: (rehearsed.append(how[2].tokens.numel()), rehearse(*how)))
    adapters = []
    for out in ("with plenty", "with little"):
        train = TrainArgs(global_batch_size=4, micro_batch_size=2, max_steps=2)
        load_script("finetune/lora").main(prepared, stories, tmp_path / out, train=train)
        adapters.append(Adapter.load(tmp_path / out / files.ADAPTER).state)
        little_memory(stories, monkeypatch)
    torch.testing.assert_close(*adapters, rtol=0, atol=0)
    longest = PreparedSet(prepared / "train.pt", mask_inputs=True, max_length=512).n_longest(2)
    assert rehearsed == [longest - 2]  # a row's last token is only a label
