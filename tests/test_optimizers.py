"""`--optimizer`: every kind trains, keeps its state as it promises, and the default is torch's own AdamW."""

import csv
from pathlib import Path

import pytest
import torch
from conftest import load_script, run_script
from torch import nn

from lit_gpt import checkpoint, optimizers
from lit_gpt.args import EvalArgs, TrainArgs

pytest.importorskip("bitsandbytes")
NAMES = ("adamw", "sgd", "adamw-8bit", "adamw-paged", "adamw-8bit-paged")


def train(
    folder: Path, optimizer_of: optimizers.Constructor, lr: float, n_steps: int = 4
) -> tuple[nn.Module, list, torch.optim.Optimizer]:
    """All weights of a small model, a few steps on one batch; the model, the losses and the optimizer."""
    model = checkpoint.load_model(folder, torch.float32)
    checkpoint.unfreeze(model)
    optimizer = optimizer_of(list(model.parameters()), lr=lr, weight_decay=0.01)
    tokens = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(n_steps):
        loss = model(tokens, labels=tokens.roll(-1, 1)) / tokens.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses, optimizer


def test_adamw_is_torchs_own(stories: Path) -> None:
    ours, _, _ = train(stories, optimizers.resolve("adamw"), 1e-3)
    theirs, _, _ = train(stories, lambda parameters, **told: torch.optim.AdamW(parameters, fused=True, **told), 1e-3)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", ["adamw-8bit", "adamw-8bit-paged", "adamw-paged"])
def test_moments_are_kept_in_as_many_bits_as_the_name_says(name: str, stories: Path) -> None:
    model, losses, optimizer = train(stories, optimizers.resolve(name), 1e-3)
    dtypes = {
        (optimizer.state[p][moment].dtype, p.numel() >= 4096)
        for p in model.parameters()
        for moment in ("state1", "state2")
    }
    large = torch.uint8 if "8bit" in name else torch.float32
    assert dtypes == {(large, True), (torch.float32, False)}  # small tensors are not worth it
    _, expected, _ = train(stories, optimizers.resolve("adamw"), 1e-3)
    assert losses == pytest.approx(expected, rel=0.02 if "8bit" in name else 1e-4)


def test_sgd_keeps_nothing(stories: Path) -> None:
    _, _, optimizer = train(stories, optimizers.resolve("sgd"), 1e-2)
    assert not any(tensor is not None for state in optimizer.state.values() for tensor in state.values())


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_finetuning_with_each_learns_without_a_warning(
    name: str, stories: Path, prepared: Path, tmp_path: Path
) -> None:
    full = "paged" in name
    load_script("finetune/full" if full else "finetune/lora").main(
        data_dir=prepared,
        checkpoint_dir=stories,
        out_dir=tmp_path,
        precision="32-true",
        optimizer=name,
        train=TrainArgs(learning_rate=1.0 if name == "sgd" else 3e-3, global_batch_size=4, max_steps=10),
        eval=EvalArgs(max_new_tokens=0),
        **({} if full else {"lora_r": 64, "lora_mlp": True}),
    )
    with open(tmp_path / "metrics.csv", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0] - 0.3
    assert f"optimizer: {name}\n" in (tmp_path / "hyperparameters.yaml").read_text()


@pytest.mark.parametrize("name", ["adamw", "sgd", "adamw-8bit"])
def test_scaled_losses_are_clipped_all_the_same(name: str, stories: Path, prepared: Path, tmp_path: Path) -> None:
    rows = {}
    for precision in ("16-mixed", "32-true"):
        load_script("finetune/lora").main(
            data_dir=prepared,
            checkpoint_dir=stories,
            out_dir=tmp_path,
            precision=precision,
            optimizer=name,
            lora_dropout=0.0,
            train=TrainArgs(learning_rate=1e-2, global_batch_size=4, max_steps=4, max_norm=0.1),
            eval=EvalArgs(max_new_tokens=0),
        )
        with open(tmp_path / "metrics.csv", newline="") as file:
            rows[precision] = [(float(row["loss"]), float(row["grad_norm"])) for row in csv.DictReader(file)]
    for (mixed, mixed_norm), (full, full_norm) in zip(*rows.values(), strict=True):
        assert mixed == pytest.approx(full, rel=0.01)
        assert mixed_norm == pytest.approx(full_norm, rel=0.05)


@pytest.mark.parametrize("script", ["lora", "full"])
def test_an_unknown_name_is_refused_with_the_known_ones(script: str, tmp_path: Path) -> None:
    done = run_script(f"finetune/{script}", "--optimizer", "adam", "--out_dir", tmp_path, check=False)
    assert done.returncode == 1
    assert f"unknown --optimizer 'adam'; known are {', '.join(NAMES)}" in done.stderr
