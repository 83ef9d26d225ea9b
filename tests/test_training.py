"""The loop's promises: a step does not depend on how rows are spread, and the schedule is what it says."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_script
from hypothesis import given
from hypothesis import strategies as st
from twins import make_twin

from lit_gpt import attention, checkpoint, lora, runtime
from lit_gpt.args import TrainArgs
from lit_gpt.data import PreparedSet
from lit_gpt.lora import LoRASettings
from lit_gpt.training import (
    evaluate,
    learning_rate,
    micro_batches,
    pack,
    permutation,
    step_rows,
    total_steps,
    train_step,
)


@pytest.fixture(scope="module")
def fabric():
    return runtime.launch(runtime.resolve_precision("32-true", training=True))


def open_set(prepared: Path, *, mask: bool = True) -> PreparedSet:
    return PreparedSet(prepared / "train.pt", mask_inputs=mask, max_length=512)


def one_step(fabric, stories: Path, data: PreparedSet, **how: object) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and adapter after one optimizer step on the first 8 rows."""
    model = checkpoint.load_model(stories, torch.float32)
    torch.manual_seed(3)
    lora.attach(model, LoRASettings(dropout=0.0, targets=("query", "value", "mlp")))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    wrapped, optimizer = fabric.setup(model, optimizer)
    wrapped.train()
    args = TrainArgs(global_batch_size=8, **how)  # type: ignore[arg-type]
    result = train_step(fabric, wrapped, optimizer, list(micro_batches(data, range(8), args)), max_norm=0)
    return float(result.loss / result.n_labels), lora.adapter_state(model)


@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize("packing", [True, False])
def test_a_step_does_not_depend_on_micro_batches_or_padding(
    fabric, stories: Path, prepared: Path, micro_batch_size: int, packing: bool
):
    data = open_set(prepared)
    loss, state = one_step(fabric, stories, data, micro_batch_size=8, packing=False)
    other_loss, other = one_step(fabric, stories, data, micro_batch_size=micro_batch_size, packing=packing)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for name, factor in state.items():
        torch.testing.assert_close(other[name], factor, rtol=1e-4, atol=1e-7)
    assert any(factor.any() for name, factor in state.items() if name.endswith("B"))


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 150))
def test_packing_takes_each_row_once_and_leaves_no_two_groups_that_would_fit_one(lengths: list[int], capacity: int):
    groups = pack(lengths, capacity)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    sizes = [sum(lengths[place] for place in group) for group in groups]
    assert all(size <= capacity or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    assert len(sizes) < 2 or sum(sorted(sizes)[:2]) > capacity
    assert pack(lengths, capacity) == groups


@pytest.mark.parametrize(
    ("lengths", "capacity", "groups"),
    [
        ([9, 9, 1, 1], 19, [[0, 2], [1, 3]]),  # best fit alone leaves a group of nearly nothing
        ([3, 3, 2, 2, 2], 6, [[0, 1], [2, 3, 4]]),  # dealt anew, one group would have 7 and the other 5
        ([3, 3, 2, 2, 2], 7, [[0, 1], [2, 3, 4]]),
    ],
)
def test_groups_are_filled_evenly_where_that_makes_the_largest_smaller(
    lengths: list[int], capacity: int, groups: list[list[int]]
) -> None:
    assert sorted(pack(lengths, capacity)) == groups


def test_activation_checkpointing_changes_nothing(fabric, stories: Path, prepared: Path) -> None:
    """Dropout included: the second run of a block draws the same numbers."""
    states = []
    for checkpoints in (False, True):
        model = checkpoint.load_model(stories, torch.float32)
        torch.manual_seed(3)
        lora.attach(model, LoRASettings(dropout=0.3, targets=("query", "mlp")))
        if checkpoints:
            runtime.checkpoint_activations(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        wrapped, optimizer = fabric.setup(model, optimizer)
        batches = list(micro_batches(open_set(prepared), range(6), TrainArgs(micro_batch_size=3)))
        wrapped.train()
        torch.manual_seed(4)
        train_step(fabric, wrapped, optimizer, batches, max_norm=1.0)
        states.append(lora.adapter_state(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_checkpointed_blocks_look_at_no_random_state_without_a_way_back(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a GPU that records its kernels does not allow."""
    model = checkpoint.load_model(stories, torch.float32)
    runtime.checkpoint_activations(model)
    monkeypatch.setattr(torch, "get_rng_state", None)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("choice", [True, False, "auto"])
def test_compile_auto_means_long_runs_on_gpus(choice: bool | str) -> None:
    assert [runtime.wants_compile(choice, *run) for run in (("cuda", 2000), ("cuda", 1999), ("cpu", 10**6))] == (
        [True, False, False] if choice == "auto" else [choice] * 3
    )


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_compute_the_same_and_are_not_made_again_for_other_lengths(
    fabric, stories: Path, prepared: Path, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr(attention, "attend", attention.attend)  # put back afterwards
    states = []
    for compiled in (False, True):
        model = checkpoint.load_model(stories, torch.float32)
        torch.manual_seed(3)
        lora.attach(model, LoRASettings(dropout=0, targets=("query", "mlp")))
        runtime.change_blocks(model, compiled=compiled, checkpointed=compiled and checkpointed)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        wrapped, optimizer = fabric.setup(model, optimizer)
        wrapped.train()
        made = []
        for first in range(6):
            batches = list(micro_batches(open_set(prepared), range(first, 6), TrainArgs(micro_batch_size=2)))
            train_step(fabric, wrapped, optimizer, batches, max_norm=1.0)
            made.append(counters["stats"]["unique_graphs"])
        states.append(lora.adapter_state(model))
    assert made[0] > 0
    assert made[2] == made[-1]  # the first batches may show that a size was no constant
    for name, factor in states[0].items():
        torch.testing.assert_close(states[1][name], factor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 5, 16), (1, 64, 16), (2, 31, 16)])
def test_a_compiled_update_drops_the_same_on_both_ways(shape: tuple[int, ...]) -> None:
    """What was dropped is read off the input's gradient."""
    torch.manual_seed(0)
    p, layer = 0.5, lora.LoRALinear(torch.nn.Linear(16, 16), LoRASettings(r=2, dropout=0.5))
    torch.nn.init.normal_(layer.lora_B)
    torch.nn.init.zeros_(layer.base.weight)
    compiled = torch.compile(lambda x: layer(x * 1) * 1, dynamic=True)  # as between other operators
    for _ in range(3):
        x = torch.randn(shape, requires_grad=True)
        y = compiled(x)
        seed = torch.randn(y.shape)
        y.backward(seed)
        whole = seed @ (layer.lora_B @ layer.lora_A).detach() * layer.scaling / (1 - p)
        kept = x.grad != 0
        assert 0.3 < kept.float().mean() < 0.7
        torch.testing.assert_close(x.grad, whole * kept)
        with torch.no_grad():
            update = (x * kept / (1 - p)) @ (layer.lora_B @ layer.lora_A).t() * layer.scaling
        torch.testing.assert_close(y, update + layer.base.bias, rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_plain_cross_entropy_on_the_answers(fabric, stories: Path, prepared: Path):
    """Row by row, without batching, from the raw file."""
    model = checkpoint.load_model(stories, torch.float32).eval()
    raw = torch.load(prepared / "train.pt", weights_only=True)
    total, count = 0.0, 0
    for index in range(len(raw["prompt_lengths"])):
        row = raw["tokens"][raw["offsets"][index] : raw["offsets"][index + 1]].long()
        n_prompt = int(raw["prompt_lengths"][index])
        with torch.no_grad():
            logits = model(row[None])[0, n_prompt - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, row[n_prompt:], reduction="sum"))
        count += len(row) - n_prompt
    wrapped = fabric.setup_module(model)
    mean = evaluate(fabric, wrapped, open_set(prepared), TrainArgs(micro_batch_size=4), max_iters=100)
    assert mean == pytest.approx(total / count, rel=1e-5)


def test_every_row_once_per_epoch_in_an_order_of_the_seed_after_the_longest() -> None:
    args = TrainArgs(global_batch_size=4, epochs=3)
    steps = list(step_rows(10, args, seed=1, longest=7))
    assert steps[0][0] == 7
    assert [row for batch in steps[:3] for row in batch][1:] == [row for row in permutation(10, 1, 0) if row != 7]
    assert [row for batch in steps[3:] for row in batch] == permutation(10, 1, 1) + permutation(10, 1, 2)
    assert len(steps) == total_steps(10, args) == 9
    for epoch in range(3):
        assert sorted(row for batch in steps[3 * epoch : 3 * epoch + 3] for row in batch) == list(range(10))
    for first in range(10):
        assert list(step_rows(10, args, seed=1, longest=7, first=first)) == steps[first:]
    assert permutation(10, 1, 0) == permutation(10, 1, 0)
    assert permutation(10, 1, 0) != permutation(10, 1, 1)
    assert permutation(10, 1, 0) != permutation(10, 2, 0)


def test_schedule_warms_up_to_the_peak_and_ends_low() -> None:
    args = TrainArgs(learning_rate=1.0, min_lr=0.1, lr_warmup_steps=4)
    rates = [learning_rate(step, 20, args) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0.1 < rates[-1] < 0.12
    assert learning_rate(20, 20, args) == pytest.approx(0.1)


@pytest.mark.parametrize(("n_steps", "warmup"), [(1, 0), (1, 1), (3, 3), (3, 10), (5, None)])
def test_schedule_of_short_runs(n_steps: int, warmup: int | None) -> None:
    args = TrainArgs(learning_rate=1.0, lr_warmup_steps=warmup)
    assert all(0 < learning_rate(step, n_steps, args) <= 1 for step in range(n_steps))


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"micro_batch_size": 0}, {"learning_rate": float("nan")}, {"max_steps": 0}]
)
def test_wrong_arguments_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"train.{next(iter(wrong))}"):
        TrainArgs(**wrong)


@pytest.mark.parametrize(
    ("name", "rate", "flags"),
    [("stories", 0.01, ()), pytest.param("mixtral", 0.001, ("--lora_mlp", "true"), marks=pytest.mark.slow)],
)
def test_two_devices_train_as_one(
    name: str, rate: float, flags: tuple, stories: Path, prepared: Path, tmp_path: Path
) -> None:
    """Rows are spread over two processes; an epoch's last step has fewer rows than devices, and experts no token."""
    if name != "stories":
        make_twin(name, tmp_path, vocab_size=512, max_position_embeddings=256)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(stories / file, tmp_path)
        stories = tmp_path
    tables = []
    for devices in (1, 2):
        out = tmp_path / str(devices)
        run_script(
            "finetune/lora",
            *("--data_dir", prepared, "--checkpoint_dir", stories, "--out_dir", out, "--precision", "32-true"),
            *("--lora_dropout", 0, *flags, "--train.learning_rate", rate, "--train.global_batch_size", 7),
            *("--train.micro_batch_size", 2, "--train.epochs", 2, "--eval.max_new_tokens", 0, "--devices", devices),
        )
        with open(out / "metrics.csv", newline="") as file:
            tables.append(
                [{key: float(row[key]) for key in ("loss", "tokens", "grad_norm")} for row in csv.DictReader(file)]
            )
    assert len(tables[0]) == 6
    for one, two in zip(*tables, strict=True):
        assert two == pytest.approx(one, rel=1e-5)
