"""Exact resume: what was interrupted ends as if it had not been, and what could not is refused and says why."""

import copy
import csv
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, load_script, run_script

from lit_gpt import checkpoint, files, lora, optimizers, resume, runtime
from lit_gpt.adapter import Adapter
from lit_gpt.args import EvalArgs, TrainArgs
from lit_gpt.data import PreparedSet
from lit_gpt.training import step_rows, train_step

TRAIN = {"learning_rate": 1e-2, "global_batch_size": 4, "micro_batch_size": 2, "epochs": 3, "save_interval": 3}


@pytest.fixture(autouse=True)
def _late_signals_do_no_harm() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


def rows(out: Path) -> list[dict[str, str]]:
    """metrics.csv without what a clock has measured."""
    with open(out / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in csv.DictReader(file)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    adapter = out / files.ADAPTER
    return files.load_dict(adapter)["model"] if adapter.exists() else files.load_dict(out / files.LIT_MODEL)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train(script: str, out: Path, stories: Path, prepared: Path, *, stop: int = 0, **how: Any) -> int:
    """Run a finetune script here; with `stop`, SIGTERM arrives after so many rows of metrics. Returns the status."""
    done = threading.Event()

    def interrupt() -> None:
        while not done.is_set():
            path = out / "metrics.csv"
            if path.exists() and path.read_text().count("\n") > stop:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.001)

    watcher = threading.Thread(target=interrupt)
    arguments: dict[str, Any] = {"precision": "32-true"}
    arguments |= {"lora_dropout": 0.1, "lora_mlp": True} if script == "lora" else {}
    more = {name: how.pop(name) for name in list(how) if name in TrainArgs.__dataclass_fields__}
    arguments |= {"eval": EvalArgs(interval=5, max_new_tokens=2, initial_validation=True), **how}
    if stop:
        watcher.start()
    try:
        load_script(f"finetune/{script}").main(
            data_dir=prepared, checkpoint_dir=stories, out_dir=out, train=TrainArgs(**{**TRAIN, **more}), **arguments
        )
    except SystemExit as exit:
        return int(exit.code or 0)
    finally:
        done.set()
        gc.collect()  # a job that failed holds its folder until it is gone
    return 0


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "dropout and packing": ("lora", {}),
    "4-bit base in mixed precision": ("lora", {"quantize": "bnb.nf4", "precision": "bf16-mixed"}),
    "padding, sparse rows, best kept": ("lora", {"packing": False, "log_interval": 3, "keep_best": True}),
    "scaled losses": ("lora", {"precision": "16-mixed"}),
    "every weight": ("full", {}),
    "every weight, 8-bit moments": ("full", {"optimizer": "adamw-8bit", "learning_rate": 1e-3}),
    "double quantization, bf16": ("lora", {"quantize": "bnb.nf4-dq", "precision": "bf16-true"}),
    "8-bit base": ("lora", {"quantize": "bnb.int8"}),
    "every weight in bf16, 8-bit moments": ("full", {"optimizer": "adamw-8bit", "precision": "bf16-true"}),
    "paged": ("lora", {"optimizer": "adamw-paged", "lora_r": 64}),
    "paged, 8 bits": ("lora", {"optimizer": "adamw-8bit-paged", "lora_r": 64}),
    "no moments": ("lora", {"optimizer": "sgd", "learning_rate": 1.0}),
    "checkpointed activations": ("lora", {"activation_checkpointing": True}),
    "no clipping, no decay": ("lora", {"max_norm": 0.0, "weight_decay": 0.0}),
    "one row at a time": ("lora", {"micro_batch_size": 1}),
    "skipping": ("lora", {"on_nan": "skip", "log_interval": 4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_ends_as_if_it_had_not_been(
    way: str, stories: Path, prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    script, how = WAYS[way]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(script, whole, stories, prepared, **how) == 0
    assert train(script, cut, stories, prepared, **how, stop=4) == 128 + signal.SIGTERM
    said = capfd.readouterr().err.splitlines()
    assert f"stopped after step {max(files.numbered(cut, files.state_name))} of 12" in said[-2]
    assert said[-1].endswith("--resume true")
    assert len(rows(cut)) < len(rows(whole))
    assert train(script, cut, stories, prepared, **how, resume=True) == 0
    assert same(weights(cut), weights(whole))
    assert rows(cut) == rows(whole)
    assert files.numbered(cut, files.state_name) == {}
    assert len(files.numbered(cut, files.periodic_name)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("number", "kept"), [(signal.SIGINT, "bnb.nf4"), (signal.SIGTERM, "null")])
def test_two_processes_stop_together_and_end_as_if_they_had_not(
    number: int, kept: str, stories: Path, prepared: Path, tmp_path: Path
) -> None:
    """The signal reaches only the first, as a scheduler's does."""
    flags = [
        *("--data_dir", prepared, "--checkpoint_dir", stories, "--precision", "32-true", "--devices", 2, "--resume"),
        *(
            "auto",
            "--lora_dropout",
            0.1,
            "--train.learning_rate",
            0.01,
            "--train.global_batch_size",
            7,
            "--train.epochs",
        ),
        *(30, "--train.micro_batch_size", 2, "--eval.max_new_tokens", 0, "--eval.interval", 11),
    ]
    run_script("finetune/lora", *flags, "--out_dir", tmp_path / "whole")
    cut = tmp_path / "cut"
    command = [sys.executable, str(ROOT / "finetune/lora.py"), *map(str, flags), "--out_dir", str(cut)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while not (cut / "metrics.csv").exists() or len(rows(cut)) < 5:
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number, said
    assert "stopped after step" in said
    run_script("finetune/lora", *flags, "--out_dir", cut)
    assert same(weights(cut), weights(tmp_path / "whole"))
    assert rows(cut) == rows(tmp_path / "whole")


@pytest.fixture(scope="module")
def unfinished(stories: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped; to be copied, not used."""
    out = tmp_path_factory.mktemp("unfinished") / "out"
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    assert train("lora", out, stories, prepared, stop=7, keep_last=0) == 128 + signal.SIGTERM
    signal.signal(signal.SIGTERM, before)
    return out


@pytest.fixture
def out(unfinished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unfinished, tmp_path / "out"))


@pytest.fixture(scope="module")
def whole(stories: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every run of these settings has to end with."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train("lora", out, stories, prepared)
    return out


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "rate": ({"learning_rate": 0.02}, "--train.learning_rate is 0.02 and was 0.01"),
    "rank": ({"lora_r": 4}, "--lora_r is 4 and was 8"),
    "seed and steps": ({"seed": 1, "max_steps": 9}, "--train.max_steps is 9 and was None; --seed is 1 and was 1337"),
    "precision": ({"precision": "bf16-true"}, "--precision is bf16-true and was 32-true"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_setting_that_would_change_the_result_is_refused_by_name(
    change: str, out: Path, stories: Path, prepared: Path
) -> None:
    how, message = CHANGES[change]
    before = sorted(out.iterdir())
    with pytest.raises(ValueError, match=f"saved with other settings.*: .*{message}.*--resume_override true"):
        train("lora", out, stories, prepared, resume=True, **how)
    assert {*before, out / files.LOCK} >= set(out.iterdir()) >= {*before}


def test_a_stopped_run_goes_on_exactly_whatever_else_has_moved_or_does_not_matter(
    out: Path, whole: Path, stories: Path, prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Dropout and packing are on."""
    data, base = (Path(shutil.copytree(old, tmp_path / new)) for old, new in ((prepared, "data"), (stories, "base")))
    how = {"save_interval": 5, "keep_best": True, "activation_checkpointing": True}
    assert train("lora", out, base, data, resume="auto", **how) == 0
    assert same(weights(out), weights(whole))
    assert rows(out) == rows(whole)

    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert train("lora", out, stories, prepared, resume=True) == 0
    assert "is finished: there is nothing to do" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_other_data_and_another_base_are_refused(out: Path, stories: Path, prepared: Path, tmp_path: Path) -> None:
    data, base = (Path(shutil.copytree(old, tmp_path / new)) for old, new in ((prepared, "data"), (stories, "base")))
    tokens = files.load_dict(data / "train.pt")
    files.save(data / "train.pt", {**tokens, "tokens": tokens["tokens"].flip(0)})
    with pytest.raises(ValueError, match="other settings.*: --data_dir holds another training set than it did"):
        train("lora", out, stories, data, resume=True)
    model = files.load_dict(base / files.LIT_MODEL)
    files.save(base / files.LIT_MODEL, {name: 2 * weight for name, weight in model.items()})
    with pytest.raises(ValueError, match="other settings.*: --checkpoint_dir holds another base than it did"):
        train("lora", out, base, prepared, resume=True)


def test_override_continues_with_other_settings(out: Path, stories: Path, prepared: Path) -> None:
    step = max(files.numbered(out, files.state_name))
    train("lora", out, stories, prepared, resume=True, resume_override=True, learning_rate=0.1, max_steps=10)
    rates = {int(row["step"]): float(row["learning_rate"]) for row in rows(out) if row["learning_rate"]}
    assert max(rates) == 10
    assert rates[step] <= 0.01 < rates[step + 1]


def test_override_cannot_change_what_is_trained(out: Path, stories: Path, prepared: Path) -> None:
    with pytest.raises(ValueError, match="of another model, which differs in .*lora_A"):
        train("lora", out, stories, prepared, resume=True, resume_override=True, lora_r=4)
    with pytest.raises(ValueError, match="of another --optimizer"):
        train("lora", out, stories, prepared, resume=True, resume_override=True, optimizer="sgd")


# --- which state -----------------------------------------------------------------------------------------------------


def test_a_file_cut_at_any_sixteenth_is_passed_over(out: Path) -> None:
    *_, before, newest = files.numbered(out, files.state_name).values()
    content = newest.read_bytes()
    for part in range(16):
        newest.write_bytes(content[: len(content) * part // 16])
        found = resume.find(out)
        assert found is not None
        assert found.path == before
        assert f"{newest} is damaged" in found.notes[0]
    newest.write_bytes(content)
    assert resume.find(out).path == newest  # type: ignore[union-attr]


def test_a_flipped_bit_is_found_wherever_it_is(out: Path) -> None:
    *_, newest = files.numbered(out, files.state_name).values()
    content = bytearray(newest.read_bytes())
    for index in range(0, len(content), len(content) // 200):
        content[index] ^= 1 << index % 8
        newest.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            files.load_sealed(newest)
        content[index] ^= 1 << index % 8


def test_where_the_newest_state_is_damaged_the_one_before_is_used_and_the_loss_is_said(
    out: Path, whole: Path, stories: Path, prepared: Path, capfd: pytest.CaptureFixture
) -> None:
    *_, before, newest = files.numbered(out, files.state_name)
    damaged = out / files.state_name(newest)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert train("lora", out, stories, prepared, resume=True) == 0
    said = capfd.readouterr().err
    assert f"{damaged} is damaged" in said
    assert f"going on from {files.state_name(before)}; steps {before + 1} to {newest} are lost and taken again" in said
    assert same(weights(out), weights(whole))
    assert rows(out) == rows(whole)


def test_nothing_is_begun_anew_where_all_states_are_damaged(out: Path) -> None:
    for path in files.numbered(out, files.state_name).values():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="step-000003-state.pth is damaged"):
        resume.choose("auto", out)


def test_a_state_that_holds_code_is_refused(out: Path, tmp_path: Path) -> None:
    path = out / files.state_name(99)
    files.save(path, {"settings": os.system}, sealed=True)
    with pytest.raises(ValueError, match="could run code"):
        files.load_sealed(path)


def test_one_of_the_states_may_be_named_for_another_folder_too(
    out: Path, whole: Path, stories: Path, prepared: Path, tmp_path: Path
) -> None:
    state = next(iter(files.numbered(out, files.state_name).values()))
    assert train("lora", tmp_path / "branch", stories, prepared, resume=str(state)) == 0
    assert same(weights(tmp_path / "branch"), weights(whole))
    assert rows(tmp_path / "branch") == rows(whole)


def test_what_each_value_of_the_flag_chooses(out: Path, whole: Path, tmp_path: Path) -> None:
    first, *_, newest = files.numbered(out, files.state_name).values()
    for wanted, path in {True: newest, "auto": newest, str(out): newest, str(first): first}.items():
        found = resume.choose(wanted, out)
        assert found is not None
        assert found.path == path
    assert resume.choose(False, out) is None
    for lost in (None, str(whole)):
        with pytest.raises(ValueError, match=r"unfinished run, saved at step \d+: continue it with --resume true"):
            resume.choose(lost, out)
    for finished in (True, "auto"):
        with pytest.raises(SystemExit) as exit:
            resume.choose(finished, whole)
        assert not exit.value.code
    assert resume.choose(None, whole) is None
    new = tmp_path / "new"
    assert resume.choose(None, new) is resume.choose("auto", new) is None
    with pytest.raises(ValueError, match="holds no training state to continue; --resume auto begins anew"):
        resume.choose(True, new)
    with pytest.raises(ValueError, match="--resume nowhere is not there"):
        resume.choose("nowhere", new)


def test_the_last_checkpoints_and_the_best_are_kept(stories: Path, prepared: Path, tmp_path: Path) -> None:
    how = {"save_interval": 2, "keep_last": 3, "keep_best": True, "learning_rate": 0.1}
    train("lora", tmp_path, stories, prepared, **how, eval=EvalArgs(interval=1, max_new_tokens=0))
    losses = {int(row["step"]): float(row["val_loss"]) for row in rows(tmp_path) if row["val_loss"]}
    losses[12] = json.loads((tmp_path / files.REPORT).read_text())["val_loss"]
    best = Adapter.load(tmp_path / files.BEST)
    assert best.step == min(losses, key=lambda step: losses[step]) < 12
    assert [Adapter.load(path).step for path in sorted(tmp_path.glob("iter-*"))] == [6, 8, 10]


# --- who may write ---------------------------------------------------------------------------------------------------


def test_a_second_run_into_the_folder_is_refused_and_a_stale_lock_is_not(
    stories: Path, prepared: Path, tmp_path: Path
) -> None:
    lock = resume.Lock(tmp_path)
    with pytest.raises(ValueError, match=f"written to by another run: process {os.getpid()} on {socket.gethostname()}"):
        train("lora", tmp_path, stories, prepared)
    assert [path.name for path in tmp_path.iterdir()] == [files.LOCK]
    text = lock.path.read_text()
    lock.release()
    assert not lock.path.exists()
    lock.path.write_text(text)  # as one who was killed leaves it
    resume.Lock(tmp_path).release()


# --- numbers that are none -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(stories: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A model that has no finite loss where one rare token stands, and the training rows in which it does."""
    data = PreparedSet(prepared / "train.pt", mask_inputs=True, max_length=512)
    holders: dict[int, set[int]] = {}
    for index in range(len(data)):
        for token in data.row(index)[0].tolist():
            holders.setdefault(token, set()).add(index)
    token, those = min(holders.items(), key=lambda item: (len(item[1]), item[0]))
    folder = tmp_path_factory.mktemp("poisoned")
    model = checkpoint.load_model(stories, torch.float32)
    model.config.tie_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    model.transformer.wte.weight = torch.nn.Parameter(model.transformer.wte.weight.clone(), requires_grad=False)
    model.transformer.wte.weight[token] = float("inf")
    checkpoint.save_model(folder / files.LIT_MODEL, model, stories, "alpaca")
    return folder, sorted(those)


def longest(prepared: Path) -> int:
    return int(PreparedSet(prepared / "train.pt", mask_inputs=True, max_length=512).lengths().argmax())


def test_a_loss_that_is_no_number_stops_with_step_rows_and_last_checkpoint(
    poisoned: tuple[Path, list[int]], prepared: Path, tmp_path: Path
) -> None:
    base, bad = poisoned
    args = TrainArgs(**TRAIN)
    order = list(step_rows(15, args, 1337, longest(prepared)))
    step = next(index for index, batch in enumerate(order) if {*batch} & {*bad}) + 1
    named = ", ".join(str(row + 1) for row in order[step - 1] if row in bad)
    left = f"The last good checkpoint is .*{files.state_name(step - 1)}.*--resume true --train.on_nan skip"
    message = rf"step {step}: the loss is nan; it comes from training rows? {named} of .*train.pt \(the answer begins"
    with pytest.raises(ValueError, match=message + (f".*{left}" if step > 1 else ".*Nothing had been saved")):
        train("lora", tmp_path, base, prepared, save_interval=1, eval=EvalArgs(max_new_tokens=0))
    if step > 1:
        state = files.load_sealed(tmp_path / files.state_name(step - 1))
        assert all(weight.isfinite().all() for weight in state["weights"].values())


def test_or_the_step_is_skipped(
    poisoned: tuple[Path, list[int]], prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    base, bad = poisoned
    how = {"on_nan": "skip", "global_batch_size": 2, "eval": EvalArgs(max_new_tokens=0)}
    assert train("lora", tmp_path, base, prepared, **how) == 0
    order = list(step_rows(15, TrainArgs(global_batch_size=2, epochs=3), 1337, longest(prepared)))
    expected = [step for step, batch in enumerate(order, start=1) if {*batch} & {*bad}]
    assert [int(row["step"]) for row in rows(tmp_path) if not row["loss"]] == expected
    assert all(weight.isfinite().all() for weight in weights(tmp_path).values())
    assert capfd.readouterr().err.count("; skipped") == len(expected)


def test_a_step_that_must_not_be_taken_leaves_weights_and_moments_alone(
    poisoned: tuple[Path, list[int]], prepared: Path
) -> None:
    base, bad = poisoned
    fabric = runtime.launch(runtime.resolve_precision("32-true", training=True))
    model = checkpoint.load_model(base, torch.float32)
    lora.attach(model, lora.LoRASettings())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    data = PreparedSet(prepared / "train.pt", mask_inputs=True, max_length=512)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    good, broken = (data.batch([row], packing=True) for row in (min({*range(15)} - {*bad}), bad[0]))
    train_step(fabric, wrapped, wrapped_optimizer, [good], 1.0, guarded=True)
    before = copy.deepcopy((lora.adapter_state(model), optimizer.state_dict()["state"]))
    result = train_step(fabric, wrapped, wrapped_optimizer, [good, broken], 1.0, guarded=True)
    assert not result.loss.isfinite()
    torch.testing.assert_close((lora.adapter_state(model), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    train_step(fabric, wrapped, wrapped_optimizer, [good], 1.0, guarded=True)
    assert not same(lora.adapter_state(model), before[0])


def test_a_gradient_that_overflows_when_scaled_costs_a_step_and_halves_the_scale(stories: Path, prepared: Path) -> None:
    fabric = runtime.launch(runtime.resolve_precision("16-mixed", training=True))
    model = checkpoint.load_model(stories, torch.float16, norm_dtype=torch.float32)
    lora.attach(model, lora.LoRASettings())
    optimizer = optimizers.resolve("adamw", scaled=True)(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0
    )
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    precision = fabric.strategy.precision
    precision.load_state_dict({**precision.state_dict(), "scale": 2.0**40})
    data = PreparedSet(prepared / "train.pt", mask_inputs=True, max_length=512)
    before = lora.adapter_state(model)
    result = train_step(fabric, wrapped, wrapped_optimizer, [data.batch([0], packing=True)], 1.0, guarded=True)
    assert result.loss.isfinite()
    assert not result.grad_norm.isfinite()
    assert same(lora.adapter_state(model), before)
    assert precision.state_dict()["scale"] == 2.0**39
