"""The real scripts, as a user runs them, on a real small model."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, ROWS, STORIES, load_script, run_script
from twins import make_twin

from lit_gpt import checkpoint, lora, merging, report, training
from lit_gpt.adapter import Adapter
from lit_gpt.args import EvalArgs, TrainArgs
from lit_gpt.data import PreparedSet
from lit_gpt.lora import LoRASettings

# Losses of the first five steps on this data; they change only if the arithmetic, the order or the prompt does.
GOLDEN: dict[str, list[float]] = {
    "lora": [6.0782, 3.92359, 3.39666, 2.36203, 2.33819],
    "full": [6.0782, 3.11477, 1.65088, 0.8414, 1.11638],
}


@pytest.fixture(scope="module")
def tuned(stories: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA run that has learned its 14 rows."""
    out = tmp_path_factory.mktemp("out") / "lora"
    load_script("finetune/lora").main(
        data_dir=prepared,
        checkpoint_dir=stories,
        out_dir=out,
        precision="32-true",
        lora_r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        lora_key=True,
        lora_mlp=True,
        lora_head=True,  # this model's end-of-text embedding is zero: only an adapted head can end an answer
        train=TrainArgs(learning_rate=1e-2, global_batch_size=4, micro_batch_size=2, epochs=20, save_interval=40),
        eval=EvalArgs(interval=40, max_new_tokens=8, initial_validation=True),
    )
    return out


def test_finetuning_learns_and_leaves_what_it_says(tuned: Path) -> None:
    with open(tuned / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert losses[-1] < 0.3 * losses[0]
    validated = {int(row["step"]): float(row["val_loss"]) for row in rows if row["val_loss"]}
    assert set(validated) == {0, 40}
    assert validated[40] < validated[0]
    report = json.loads((tuned / "report.json").read_text())
    assert report["steps"] == len(losses) == 80
    assert sorted(path.name for path in tuned.iterdir()) == [
        "hyperparameters.yaml",
        "iter-000080-ckpt.pth",
        "lit_model_lora_finetuned.pth",
        "metrics.csv",
        "report.json",
    ]


def test_the_adapter_tells_all_about_itself(tuned: Path, stories: Path) -> None:
    adapter = Adapter.load(tuned / "lit_model_lora_finetuned.pth")
    assert adapter.settings.r == 16
    assert adapter.settings.targets == ("query", "key", "value", "mlp", "head")
    assert adapter.base_name == "stories260K"
    assert adapter.base_fingerprint == checkpoint.fingerprint(stories)
    assert adapter.prompt_style == "alpaca"
    assert adapter.step == 80


def test_generation_needs_no_flag_repeated_and_prints_the_answer_alone(
    tuned: Path, stories: Path, tmp_path: Path
) -> None:
    question = ("--prompt", ROWS[4]["instruction"], "--temperature", 0, "--max_new_tokens", 30)
    lora = ("--lora_path", tuned / "lit_model_lora_finetuned.pth", "--checkpoint_dir", stories)
    answered = run_script("generate/lora", *question, *lora, "--precision", "32-true")
    assert answered.stdout == f"{ROWS[4]['output']}\n"
    assert "tokens/sec" in answered.stderr
    assert "Memory used" in answered.stderr

    merged = run_script("scripts/merge_lora", *lora, "--out_dir", tmp_path / "merged")
    assert "same likeliest token" in merged.stdout
    for path in stories.glob("*.json"):  # the seed's cp does no harm
        shutil.copy(path, tmp_path / "merged")
    base = run_script("generate/base", *question, "--checkpoint_dir", tmp_path / "merged", "--precision", "32-true")
    assert base.stdout == answered.stdout
    samples = run_script(
        "generate/base", "--prompt", "Once", "--num_samples", 2, "--checkpoint_dir", stories, "--max_new_tokens", 5
    )
    assert len(samples.stdout.splitlines()) == 2


def test_a_merge_that_changes_nothing_fails(stories: Path, tmp_path: Path) -> None:
    model = checkpoint.load_model(stories, torch.float32)
    lora.attach(model, LoRASettings())
    told = {"base_name": "stories260K", "base_fingerprint": checkpoint.fingerprint(stories), "step": 0}
    adapter = Adapter(
        lora.adapter_state(model), LoRASettings(), **told, prompt_style="alpaca", precision="32-true", quantize=None
    )
    adapter.save(tmp_path / "adapter.pth")
    flags = ("--lora_path", tmp_path / "adapter.pth", "--checkpoint_dir", stories, "--out_dir", tmp_path / "merged")
    done = run_script("scripts/merge_lora", *flags, check=False)
    assert done.returncode == 1
    assert "changes nothing" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_rounds_once_to_the_precision_that_is_asked_for(
    dtype: torch.dtype, stories: Path, tmp_path: Path
) -> None:
    """An update smaller than the steps of the base's bfloat16."""
    base = tmp_path / "base"
    checkpoint.convert(checkpoint.open_folder(stories), checkpoint.load_config(stories), base, torch.bfloat16)
    checkpoint.files.copy_companions(stories, base)
    model = checkpoint.load_model(base, torch.float32)
    settings = LoRASettings(r=2, targets=("query",))
    names = lora.attach(model, settings)
    state = {name: torch.randn_like(factor) * 0.01 for name, factor in lora.adapter_state(model).items()}
    adapter = Adapter(state, settings, "stories260K", checkpoint.fingerprint(base), "alpaca", "32-true", None, 0)
    merging.merge_folder(base, adapter, tmp_path / "merged", dtype)
    merged, plain = (dict(checkpoint.Weights.from_folder(folder)) for folder in (tmp_path / "merged", base))
    for name in names:
        update = state[f"{name}.lora_B"] @ state[f"{name}.lora_A"] * (16 / 2)
        assert torch.equal(merged[f"{name}.weight"], (plain[f"{name}.weight"].float() + update).to(dtype))


def test_a_merge_over_another_models_folder_leaves_nothing_of_it(stories: Path, tmp_path: Path) -> None:
    """Else one model's weights stood beside the other's tokenizer."""
    base, merged_dir = tmp_path / "base", tmp_path / "merged"
    make_twin("neox", base)
    checkpoint.files.save_text(base / "generation_config.json", "{}")
    for folder in (stories, base):
        settings = LoRASettings(targets=("query",))
        model = checkpoint.load_model(folder, torch.float32)
        lora.attach(model, settings)
        told = "a base", checkpoint.fingerprint(folder), "alpaca", "32-true", None, 0
        merging.merge_folder(folder, Adapter(lora.adapter_state(model), settings, *told), merged_dir)
    names = set(checkpoint.files.COMPANIONS)
    assert {file.name for file in merged_dir.iterdir()} & names == {file.name for file in base.iterdir()} & names
    for file in merged_dir.iterdir():
        if file.name in names:
            assert file.read_bytes() == (base / file.name).read_bytes()


@pytest.mark.parametrize(("effect", "drift"), [(float("nan"), float("nan")), (1.0, float("inf"))])
def test_a_merge_whose_logits_are_no_numbers_is_not_trusted(effect: float, drift: float) -> None:
    problem = merging.Comparison(1.0, 1.0, effect, drift).problem
    assert problem is not None
    assert "NaN" in problem


def test_an_adapted_tied_head_merges_into_a_head_of_its_own(stories: Path, prepared: Path, tmp_path: Path) -> None:
    load_script("finetune/lora").main(
        data_dir=prepared,
        checkpoint_dir=stories,
        out_dir=tmp_path / "out",
        precision="32-true",
        lora_head=True,
        train=TrainArgs(learning_rate=1e-2, global_batch_size=4, max_steps=5),
        eval=EvalArgs(max_new_tokens=0),
    )
    adapter = ("--lora_path", tmp_path / "out" / "lit_model_lora_finetuned.pth", "--checkpoint_dir", stories)
    run_script("scripts/merge_lora", *adapter, "--out_dir", tmp_path / "merged")
    merged = checkpoint.load_model(tmp_path / "merged", torch.float32)
    assert not merged.config.tie_embeddings
    base = checkpoint.load_model(stories, torch.float32)
    assert torch.equal(merged.transformer.wte.weight, base.transformer.wte.weight)
    assert not torch.equal(merged.lm_head.weight, base.lm_head.weight)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_golden_losses(
    name: str, stories: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without dropout: how it is drawn may change, the arithmetic may not."""
    # Taken when an epoch began with the first row of its permutation, not with the longest of all.
    rows = training.step_rows
    monkeypatch.setattr(
        *(training, "step_rows"),
        lambda n, args, seed, longest, first=0: rows(n, args, seed, training.permutation(n, seed, 0)[0], first),
    )
    load_script(f"finetune/{name}").main(
        **({"lora_dropout": 0.0} if name == "lora" else {}),
        data_dir=prepared,
        checkpoint_dir=stories,
        out_dir=tmp_path,
        precision="32-true",
        train=TrainArgs(learning_rate=1e-2 if name == "lora" else 1e-3, global_batch_size=4, max_steps=5),
        eval=EvalArgs(final_validation=False),
    )
    with open(tmp_path / "metrics.csv", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses == pytest.approx(GOLDEN[name], abs=1e-4)


def test_full_finetuning_leaves_a_complete_folder(stories: Path, prepared: Path, tmp_path: Path) -> None:
    load_script("finetune/full").main(
        data_dir=prepared,
        checkpoint_dir=stories,
        out_dir=tmp_path,
        precision="32-true",
        train=TrainArgs(learning_rate=3e-3, global_batch_size=4, epochs=12),
        eval=EvalArgs(interval=0, max_new_tokens=0),
    )
    flags = ("--prompt", ROWS[4]["instruction"], "--temperature", 0, "--precision", "32-true")
    assert run_script("generate/base", "--checkpoint_dir", tmp_path, *flags).stdout == f"{ROWS[4]['output']}\n"
    base, after = (dict(checkpoint.Weights.from_folder(path)) for path in (stories, tmp_path))
    assert all(not torch.equal(base[name], after[name]) for name in base)


def test_a_question_beyond_the_context_does_not_end_a_chat(
    stories: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'word ' * 600}\nOnce upon a time\n\n"))
    load_script("generate/chat").main(checkpoint_dir=stories, max_new_tokens=5, precision="32-true")
    told = capsys.readouterr()
    assert "error: the prompt has" in told.err
    assert told.out.strip()


def test_full_finetuning_does_not_write_over_its_base(stories: Path, prepared: Path) -> None:
    before = {file.name: file.read_bytes() for file in stories.iterdir()}
    with pytest.raises(ValueError, match="the base's own folder"):
        load_script("finetune/full").main(prepared, stories, stories)
    assert {file.name: file.read_bytes() for file in stories.iterdir()} == before


def test_a_prompt_beyond_the_models_context_is_no_sample(prepared: Path, tmp_path: Path) -> None:
    """The set may have been prepared for a longer one: rows are cut, and a run does not end over a sample."""
    short = Path(shutil.copytree(STORIES, tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    longest = int(PreparedSet(prepared / "test.pt", mask_inputs=True, max_length=512).prompt_lengths.max())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": longest - 1}))
    train, eval = TrainArgs(global_batch_size=4, max_steps=4), EvalArgs(interval=1, max_new_tokens=4)
    load_script("finetune/lora").main(prepared, short, tmp_path / "out", train=train, eval=eval)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["val_loss"] > 0


def test_a_validation_loss_of_nothing_is_refused(stories: Path, prepared: Path, tmp_path: Path) -> None:
    """It was 0, which no later one could be better than."""
    prompts = PreparedSet(prepared / "test.pt", mask_inputs=True, max_length=512).prompt_lengths
    rows = PreparedSet(prepared / "train.pt", mask_inputs=True, max_length=512)
    least = int(rows.prompt_lengths.min()) + 2
    args = {"train": TrainArgs(global_batch_size=4, max_steps=1, max_seq_length=least), "precision": "32-true"}
    assert least < int(prompts.min()) + 2
    with pytest.raises(ValueError, match="none of the 3 validation rows has an answer"):
        load_script("finetune/lora").main(prepared, stories, tmp_path / "out", **args)
    nothing = EvalArgs(interval=0, final_validation=False, max_new_tokens=0)
    load_script("finetune/lora").main(prepared, stories, tmp_path / "out", **args, eval=nothing)


def test_a_flags_mistake_is_not_the_config_files(tuned: Path) -> None:
    flags = ("--config", tuned / "hyperparameters.yaml", "--train.epochs", 0)
    done = run_script("finetune/lora", *flags, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --train.epochs must be at least 1, not 0 (flags were read from ")


def test_the_saved_hyperparameters_are_a_config(tuned: Path, tmp_path: Path) -> None:
    run_script("finetune/lora", "--config", tuned / "hyperparameters.yaml", "--out_dir", tmp_path)
    with open(tmp_path / "metrics.csv", newline="") as file, open(tuned / "metrics.csv", newline="") as other:
        losses, expected = ([row["loss"] for row in csv.DictReader(lines)] for lines in (file, other))
    assert losses == expected
    assert len(losses) == 81


def test_mixed_precision_trains_a_bfloat16_base(stories: Path, prepared: Path, tmp_path: Path) -> None:
    load_script("finetune/lora").main(
        data_dir=prepared,
        checkpoint_dir=stories,
        out_dir=tmp_path,
        precision="bf16-mixed",
        train=TrainArgs(learning_rate=1e-2, global_batch_size=4, max_steps=20),
        eval=EvalArgs(max_new_tokens=0),
    )
    with open(tmp_path / "metrics.csv", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0] - 0.5


def test_the_copied_prepare_script_works(stories: Path, tmp_path: Path) -> None:
    """The seed's recipe: copy prepare_alpaca.py, let it read your file, run it."""
    text = (ROOT / "scripts" / "prepare_alpaca.py").read_text()
    (tmp_path / "prepare_mydata.py").write_text(text)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "alpaca_data_cleaned_archive.json").write_text(json.dumps(ROWS))
    import subprocess
    import sys

    flags = ["--destination_path", str(tmp_path / "mine"), "--checkpoint_dir", str(stories)]
    subprocess.run([sys.executable, str(tmp_path / "prepare_mydata.py"), *flags], check=True, capture_output=True)
    meta = json.loads((tmp_path / "mine" / "meta.json").read_text())
    assert meta["train.pt"]["rows"] + meta["test.pt"]["rows"] == len(ROWS)


def test_three_rows_and_a_long_validation_row(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps(ROWS[:3]))
    (tmp_path / "test.json").write_text(json.dumps([{"instruction": "go on", "output": "and then " * 60}]))
    run_script(
        "scripts/prepare_json",
        *("--json_path", tmp_path / "train.json", "--test_json_path", tmp_path / "test.json"),
        *("--destination_path", tmp_path / "set", "--checkpoint_dir", stories),
    )
    load_script("finetune/lora").main(
        data_dir=tmp_path / "set",
        checkpoint_dir=stories,
        out_dir=tmp_path / "out",
        train=TrainArgs(epochs=2),
        eval=EvalArgs(interval=1, max_new_tokens=2),
    )
    assert json.loads((tmp_path / "out" / "report.json").read_text())["steps"] == 2


FINETUNE = ("finetune/lora", "--out_dir", "{tmp}/out", "--data_dir", "{data}", "--checkpoint_dir", "{ckpt}")
BAD = {
    "no checkpoint": ((*FINETUNE[:-1], "{tmp}/none"), "is not a folder; download a checkpoint"),
    "empty checkpoint": ((*FINETUNE[:-1], "{tmp}"), "holds neither lit_config.json nor config.json"),
    "no data": ((*FINETUNE[:3], "--data_dir", "{tmp}", *FINETUNE[5:]), "run scripts/prepare_alpaca.py"),
    "precision": ((*FINETUNE, "--precision", "7-bit"), "unknown precision '7-bit'; known are 32-true"),
    "only prompts": ((*FINETUNE, "--train.max_seq_length", "8"), "no training row has an answer within 8 tokens"),
    "no target": ((*FINETUNE, "--lora_query", "false", "--lora_value", "false"), "none is on"),
    "out_dir is a file": (
        ("finetune/lora", "--out_dir", "{data}/meta.json", *FINETUNE[3:]),
        "is a file; name a folder",
    ),
    "no tokenizer": (("generate/base", "--checkpoint_dir", "{bare}"), "holds no tokenizer"),
    "no adapter": (("generate/lora", "--lora_path", "{tmp}/a.pth", "--checkpoint_dir", "{ckpt}"), "does not exist"),
    "temperature": (("generate/base", "--checkpoint_dir", "{ckpt}", "--temperature", "-1"), "--temperature"),
    "top_p": (("generate/base", "--checkpoint_dir", "{ckpt}", "--top_p", "0"), "--top_p"),
    "long prompt": (("generate/base", "--checkpoint_dir", "{ckpt}", "--prompt", "word " * 600), "shorten the prompt"),
    "no json": (
        ("scripts/prepare_json", "--json_path", "{tmp}/x.json", "--checkpoint_dir", "{ckpt}"),
        "does not exist",
    ),
    "style": (("generate/base", "--checkpoint_dir", "{ckpt}", "--prompt_style", "x"), "unknown prompt style"),
    "merge onto base": (
        ("scripts/merge_lora", "--checkpoint_dir", "{ckpt}", "--out_dir", "{ckpt}"),
        "base's own folder",
    ),
    "gguf": (
        ("scripts/convert_gguf_checkpoint", "--gguf_path", "{ckpt}/config.json", "--checkpoint_dir", "{tmp}"),
        "no GGUF",
    ),
    "task": (
        ("eval/lm_eval_harness", "--checkpoint_dir", "{ckpt}", "--eval_tasks", "[nope]"),
        "no task is named 'nope'",
    ),
    "repository": (("scripts/download", "--repo_id", "../x"), "<organisation>/<name>"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case: str, stories: Path, prepared: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(STORIES / "model.safetensors", bare)
    shutil.copy(STORIES / "config.json", bare)
    (name, *flags), message = BAD[case]
    flags = [flag.format(tmp=tmp_path, data=prepared, ckpt=stories, bare=bare) for flag in flags]
    before = {path: path.stat().st_mtime_ns for path in [*stories.iterdir(), *prepared.iterdir()]}
    done = run_script(name, *flags, check=False)
    assert done.returncode in (1, 2), done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in [*stories.iterdir(), *prepared.iterdir()]}


def test_progress_is_said_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of four steps takes 100 s for what it has to import, the others 20 s each."""
    clock = iter([0, 100, 120, 140, 160])
    monkeypatch.setattr(report.time, "monotonic", lambda: next(clock))
    with report.Progress("loading", 4) as progress:
        for done in range(1, 5):
            progress.update(done, "fast" if done == 2 else "")
    lines = ["loading  25%", "loading  50% | fast | 0:40 left", "loading  75% | 0:20 left", "loading 100% | done"]
    assert capsys.readouterr().err.splitlines() == lines


def test_work_that_is_over_in_two_seconds_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with report.Progress("loading", 2) as progress:
        progress.update(1)
        progress.update(2)
    assert not capsys.readouterr().err
