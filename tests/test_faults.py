"""Faults on purpose: kills at random moments, full and read-only disks, and a soak; `make test-faults` runs them.

The kills are real ones. Runs are forked from a process that has imported everything already, which saves minutes.
"""

import contextlib
import csv
import json
import multiprocessing
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, ROWS, load_script, run_script

from lit_gpt import files
from lit_gpt.args import EvalArgs, TrainArgs

pytestmark = pytest.mark.slow
N_TRIALS = 60


def finetune(out: Path, stories: Path, prepared: Path, resume: str, log: Path | None = None) -> None:
    """A short run that saves at every step."""
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    load_script("finetune/lora").main(
        data_dir=prepared,
        checkpoint_dir=stories,
        out_dir=out,
        precision="32-true",
        lora_mlp=True,
        lora_dropout=0.1,
        train=TrainArgs(learning_rate=1e-2, global_batch_size=4, micro_batch_size=2, epochs=4, save_interval=1),
        eval=EvalArgs(interval=4, max_new_tokens=2),
        resume=resume,
    )


def assert_same_end(out: Path, expected: Path) -> None:
    """The same weights and metrics, bit by bit, and the same files."""
    tables = []
    for folder in (out, expected):
        with open(folder / files.METRICS, newline="") as file:
            lines = csv.DictReader(file)
            tables.append([{key: value for key, value in row.items() if key != "tokens_per_s"} for row in lines])
    assert tables[0] == tables[1]
    for path in [*expected.glob("lit_model*.pth")]:
        states = [files.load_dict(folder / path.name) for folder in (out, expected)]
        weights, others = (state.get("model", state) for state in states)
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[name], others[name]) for name in others)
    names = [{path.name for path in folder.iterdir() if "-ckpt" not in path.name} for folder in (out, expected)]
    assert names[0] == names[1]


class Forge:
    """Starts runs as processes of their own, without importing torch anew."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "lightning_fabric", "lit_gpt.finetuning", "conftest"])

    def start(self, *arguments: object) -> multiprocessing.process.BaseProcess:
        process = self.context.Process(target=finetune, args=arguments)
        process.start()
        return process


@pytest.fixture(scope="module")
def forge() -> Forge:
    return Forge()


@pytest.fixture(scope="module")
def whole(forge: Forge, stories: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The run that nobody disturbed, and the seconds that it took."""
    for _ in range(2):  # the first one warms up
        folder = tmp_path_factory.mktemp("whole")
        started = time.monotonic()
        process = forge.start(folder / "out", stories, prepared, "false", folder / "log")
        process.join()
        assert process.exitcode == 0, (folder / "log").read_text()
    return folder / "out", time.monotonic() - started


KILLS: list[tuple[bool, int]] = []  # whether each kill hit, and how many files it left half-written


@pytest.mark.parametrize("trial", range(N_TRIALS))
def test_a_run_that_is_killed_at_a_random_moment_ends_the_same(
    trial: int, forge: Forge, whole: tuple[Path, float], stories: Path, prepared: Path, tmp_path: Path
) -> None:
    """Every other time in the middle of writing: as soon as a temporary file is seen, or a moment later."""
    rng, (expected, seconds) = random.Random(trial), whole
    out, log = tmp_path / "out", tmp_path / "log"
    for _ in range(1 + trial % 3):
        process = forge.start(out, stories, prepared, "auto", log)
        moment = time.monotonic() + rng.uniform(0, 0.9 * seconds)
        while time.monotonic() < moment and process.is_alive():
            time.sleep(0.001)
        while trial % 2 and process.is_alive() and not (out.exists() and any(out.glob(".*.tmp"))):
            pass
        time.sleep(rng.uniform(0, 0.003) if trial % 4 == 1 else 0)
        process.kill()
        process.join()
        KILLS.append((process.exitcode == -signal.SIGKILL, len(list(out.glob(".*.tmp")))))
        for path in out.glob("*.pth"):
            files.load_dict(path)  # whatever has its name is whole
    process = forge.start(out, stories, prepared, "auto", log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert_same_end(out, expected)
    assert not list(out.glob(".*"))


def test_the_kills_were_many_and_some_in_the_middle_of_writing() -> None:
    hits, torn = sum(hit for hit, _ in KILLS), sum(count for _, count in KILLS)
    print(f"{hits} kills in {N_TRIALS} runs; {torn} left a file half-written")
    if len(KILLS) >= N_TRIALS:  # not where single trials were asked for
        assert hits >= 50
        assert torn >= 5


# --- disks -----------------------------------------------------------------------------------------------------------


def command(out: Path, stories: Path, prepared: Path, *more: object, script: str = "lora") -> list[str]:
    flags = [
        *("--data_dir", prepared, "--checkpoint_dir", stories, "--out_dir", out, "--precision", "32-true"),
        *("--train.learning_rate", 0.01, "--train.global_batch_size", 4, "--train.micro_batch_size", 2),
        *("--train.epochs", 4, "--train.save_interval", 1, "--eval.max_new_tokens", 0, *more),
    ]
    return [sys.executable, str(ROOT / "finetune" / f"{script}.py"), *map(str, flags)]


def run(words: list[str], **how: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300, **how)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root can mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


@pytest.mark.parametrize(("script", "size"), [("lora", "1m"), ("full", "6m")])
def test_a_full_disk_costs_no_checkpoint_and_the_message_helps(
    script: str, size: str, disk: Path, stories: Path, prepared: Path, tmp_path: Path
) -> None:
    remount(disk, f"size={size}")
    out = disk / "out"
    full = command(out, stories, prepared, "--train.keep_last", 0, script=script)
    done = run(full)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    states = files.numbered(out, files.state_name)
    assert f"could not be saved in {out}: [Errno 28] No space left on device" in done.stderr
    assert f"The last good checkpoint is {states[max(states)]}; make room and continue:" in done.stderr
    assert not list(out.glob(".*"))
    for path in out.glob("*.pth"):
        files.load_dict(path)

    remount(disk, "size=100m")
    again = shlex.split(done.stderr.strip().rpartition("continue: ")[2])
    assert again == [*full, "--resume", "true"]
    done = run(again)
    assert done.returncode == 0, done.stderr
    assert f"continuing after step {max(states)} of 16" in done.stderr
    run(command(tmp_path / "whole", stories, prepared, script=script), check=True)
    assert_same_end(out, tmp_path / "whole")


def test_whatever_is_written_a_full_disk_is_an_oserror_and_the_old_file_stays(disk: Path) -> None:
    metas = {"weight": torch.empty(1000, 1000, device="meta")}
    writers: dict[str, Callable[[Path], None]] = {
        "text": lambda path: files.save_text(path, "a" * 10**6),
        "dict": lambda path: files.save(path, {"weight": torch.ones(10**6)}),
        "streamed": lambda path: files.save_streamed(path, metas, [("weight", torch.ones(1000, 1000))]),
    }
    for room in (0, 512, 4096, 8192, 65536):
        for name, write in writers.items():
            (disk / name).write_text("old")
            (disk / "pad").write_bytes(bytes(2**20 - 3 * 4096 - room))
            with pytest.raises(OSError, match=r"space"):
                write(disk / name)
            assert (disk / name).read_text() == "old"
            (disk / "pad").unlink()
            assert sorted(path.name for path in disk.iterdir()) == sorted([*writers][: [*writers].index(name) + 1])
        for name in writers:
            (disk / name).unlink()


def test_a_limit_to_the_size_of_files(stories: Path, prepared: Path, tmp_path: Path) -> None:
    """What can be injected without a disk: each write beyond 100 kB fails."""
    words = command(tmp_path, stories, prepared, "--lora_mlp", "true")
    limits = (100_000, resource.RLIM_INFINITY)
    done = run(words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    assert done.returncode == 1
    assert "step 1 could not be saved" in done.stderr
    assert "File too large. Nothing had been saved before; make room" in done.stderr
    assert not list(tmp_path.glob("*.pth")) + list(tmp_path.glob(".*"))
    assert run([*words, "--resume", "auto"]).returncode == 0


def test_a_read_only_folder_is_refused_before_anything_slow(disk: Path, stories: Path, prepared: Path) -> None:
    remount(disk, "ro")
    done = run(command(disk / "out", stories, prepared))
    assert done.returncode == 1
    assert (
        done.stderr == f"error: {disk / 'out'} cannot be written to (Read-only file system); name another --out_dir\n"
    )


# --- signals and late failures ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of which a step, or a validation, takes seconds."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "rows.json").write_text(json.dumps(ROWS * 200))
    run_script(
        "scripts/prepare_json",
        *("--json_path", folder / "rows.json", "--destination_path", folder, "--checkpoint_dir", stories),
        *("--test_split_fraction", "0.5"),
    )
    return folder


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.001)


def test_a_second_interrupt_ends_at_once(stories: Path, large: Path, tmp_path: Path) -> None:
    words = command(tmp_path, stories, large, "--train.global_batch_size", 1800)
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        wait_for(tmp_path / "metrics.csv", process)
        time.sleep(0.5)  # within the first step
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert any("Ctrl-C again ends at once" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == -signal.SIGINT
    assert not files.numbered(tmp_path, files.state_name)


def test_killed_in_the_final_validation_the_adapter_is_there(stories: Path, large: Path, tmp_path: Path) -> None:
    out, flags = tmp_path / "out", ("--train.max_steps", 4, "--eval.max_iters", 1000)
    with subprocess.Popen(command(out, stories, large, *flags), stderr=subprocess.PIPE, cwd=ROOT) as process:
        wait_for(out / files.ADAPTER, process)
        process.kill()
    assert not (out / files.REPORT).exists()
    run(command(tmp_path / "whole", stories, large, *flags), check=True)
    adapters = [files.load_dict(folder / files.ADAPTER)["model"] for folder in (out, tmp_path / "whole")]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[1])
    done = run(command(out, stories, large, *flags, "--resume", "true"))
    assert "continuing after step 4 of 4" in done.stderr
    assert_same_end(out, tmp_path / "whole")
    reports = [json.loads((folder / files.REPORT).read_text()) for folder in (out, tmp_path / "whole")]
    assert reports[0]["val_loss"] == reports[1]["val_loss"]


# --- for long --------------------------------------------------------------------------------------------------------


def test_two_thousand_steps_leave_memory_and_files_as_they_were(stories: Path, prepared: Path, tmp_path: Path) -> None:
    """Sampled from outside, over the steps from 500 on: the memory's slope, and the number of open files."""
    words = command(tmp_path, stories, prepared, "--train.epochs", 500, "--train.save_interval", 100)
    samples = []
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        wait_for(tmp_path / "metrics.csv", process)
        while process.poll() is None:
            time.sleep(0.2)
            with contextlib.suppress(OSError, IndexError):  # it may have ended
                step = (tmp_path / "metrics.csv").read_text().count("\n") - 1
                status = Path(f"/proc/{process.pid}/status").read_text()
                kilobytes = int(status.split("RssAnon:")[1].split()[0])  # pages of mapped files come and go
                fds = [os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
                open_files = sum(str(tmp_path) not in target for target in fds)  # but what is just being written
                samples.append((step, kilobytes / 1e3, open_files))
        assert process.returncode == 0
    steady = torch.tensor([sample for sample in samples if 500 <= sample[0] < 2000], dtype=torch.float64)
    step, megabytes, n_files = steady.T
    slope = float(torch.linalg.lstsq(torch.stack((step, torch.ones_like(step)), 1), megabytes[:, None]).solution[0])
    least, most = float(megabytes.min()), float(megabytes.max())
    print(f"{len(steady)} samples; {least:.1f} to {most:.1f} MB, {1000 * slope:+.2f} MB per 1,000 steps")
    assert len(steady) > 20
    assert n_files.min() == n_files.max()
    assert 1000 * slope < 2.0
    assert most - least < 5.0
