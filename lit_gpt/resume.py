"""Exact resume: what a training state holds, which one a run continues from, and who may write into its folder."""

import contextlib
import errno
import fcntl
import json
import os
import random
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, NoReturn

import torch
from torch.utils._pytree import tree_map_only

from lit_gpt import files
from lit_gpt.report import Metrics, say
from lit_gpt.training import Run

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch.nn import Module
    from torch.optim import Optimizer

VERSION = 1  # of what a training state holds
# Settings that no weight and no later loss depends on; what the folders hold is compared instead of their names.
HARMLESS = (
    *("out_dir", "data_dir", "checkpoint_dir", "activation_checkpointing", "eval."),
    *(f"train.{name}" for name in ("save_interval", "keep_last", "keep_best", "log_interval", "on_nan")),
)


# --- the state -------------------------------------------------------------------------------------------------------


def snapshot(fabric: "Fabric", model: "Module", optimizer: "Optimizer") -> dict[str, Any]:
    """All that later steps depend on, besides the loop's own figures; every process has to take part."""
    return {
        "version": VERSION,
        "weights": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
        "optimizer": optimizer.state_dict(),
        "scaler": fabric.strategy.precision.state_dict(),
        "random": _of_every_process(fabric, _random_states(fabric)),
    }


def restore(state: Mapping[str, Any], fabric: "Fabric", model: "Module", optimizer: "Optimizer") -> None:
    """Put a snapshot back, as the last thing before the loop. Raises ValueError if it is of another model."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes, saved = ({n: tuple(t.shape) for n, t in named.items()} for named in (trained, state["weights"]))
    if shapes != saved:
        names = [name for name in {**shapes, **saved} if shapes.get(name) != saved.get(name)]
        raise ValueError(f"the saved state is of another model, which differs in {', '.join(sorted(names)[:6])}")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["weights"][name])
    groups, saved_groups = (state["param_groups"] for state in (optimizer.state_dict(), state["optimizer"]))
    if [group.keys() for group in groups] != [group.keys() for group in saved_groups]:
        raise ValueError("the saved state is of another --optimizer, and its moments are of no use to this one")
    # Copied: what stays mapped would keep the file's space on the disk after the file is gone.
    optimizer.load_state_dict(tree_map_only(torch.Tensor, torch.clone, state["optimizer"]))
    fabric.strategy.precision.load_state_dict(state["scaler"])
    if fabric.global_rank < len(state["random"]):
        _set_random_states(fabric, state["random"][fabric.global_rank])


def _random_states(fabric: "Fabric") -> dict[str, Any]:
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(fabric.device)
    return states


def _set_random_states(fabric: "Fabric", states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"].clone())
    if fabric.device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].clone(), fabric.device)


def _of_every_process(fabric: "Fabric", value: Any) -> list[Any]:
    values = [value] * fabric.world_size
    if fabric.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


# --- which one -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A training state to continue from, and what has to be said about it."""

    path: Path
    state: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def metrics(self) -> str:
        """What the run had written of metrics.csv then; less if the file has been cut since."""
        path, size = self.path.with_name(files.METRICS), self.state["metrics_bytes"]
        text = path.read_bytes()[:size] if path.is_file() else b""
        if len(text) < size:
            say(f"warning: {path} is shorter than it was: rows are missing")
        return text.decode()


def choose(wanted: bool | str | None, out_dir: Path) -> Found | None:
    """The state that `--resume` means for a run into `out_dir`; None begins one.

    Ends the process where the run is finished. Raises ValueError where there is nothing to continue from, or where an
    unfinished run would be lost that nobody spoke of.
    """
    word = "" if wanted is None else str(wanted).lower()
    folder = out_dir if word in ("", "true", "auto", "false") else Path(str(wanted))
    if folder != out_dir and not folder.exists():
        raise ValueError(f"--resume {wanted} is not there; give true, auto, false, a run's folder or one of its states")
    own = out_dir.resolve() in (folder.resolve(), folder.resolve().parent)
    if (begun := files.numbered(out_dir, files.state_name)) and not (word and own):
        raise ValueError(
            f"{out_dir} holds an unfinished run, saved at step {max(begun)}: continue it with --resume true, "
            "replace it with --resume false, or name another --out_dir"
        )
    if word in ("", "false"):
        return None
    if (found := find(folder)) is not None:
        return found
    if (folder / files.REPORT).is_file():
        say(f"the run in {folder} is finished: there is nothing to do")
        sys.exit(0)
    if word == "auto":
        return None
    raise ValueError(f"{folder} holds no training state to continue; --resume auto begins anew where there is none")


def find(where: Path) -> Found | None:
    """The newest whole training state of a folder, or the file itself; None if there is no such file.

    Raises ValueError if none of those that there are is whole.
    """
    candidates = [where] if where.is_file() else list(files.numbered(where, files.state_name).values())
    problems: list[str] = []
    for path in reversed(candidates):
        try:
            found = Found(path, files.load_sealed(path), problems)
            if found.state.get("version") != VERSION:
                raise ValueError(f"{path} was written by another version of this project, whose states are not read")
        except ValueError as error:
            problems.append(f"warning: {error}")
            continue
        if problems:
            steps = f"steps {found.state['run']['step'] + 1} to {max(files.numbered(where, files.state_name))}"
            problems.append(f"going on from {path.name}; {steps} are lost and taken again")
        return found
    if problems:
        raise ValueError("; ".join(problem.removeprefix("warning: ") for problem in problems))
    return None


def clear_states(folder: Path) -> None:
    """Remove the training states of a run that is finished, or given up."""
    for path in files.numbered(folder, files.state_name).values():
        path.unlink()


def prune(folder: Path, numbers: Mapping[Any, int], keep: int) -> None:
    """Keep the last `keep` files of each kind, of those up to its number; later ones are of a future given up."""
    for name, number in numbers.items():
        found = files.numbered(folder, name)
        before = [other for other in found if other <= number]
        for other in {*found} - {*(before[-keep:] if keep else before)}:
            found[other].unlink()


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings whose change would change what is learned, one text for each."""
    old, new = flat(saved), flat(now)
    return [
        f"--{name} is {new.get(name)} and was {old.get(name)}"
        for name in {**old, **new}
        if not name.startswith(HARMLESS) and old.get(name) != new.get(name)
    ]


def environment(fabric: "Fabric") -> dict[str, Any]:
    """What rounding depends on besides the settings."""
    cuda = fabric.device.type == "cuda"
    device = torch.cuda.get_device_name(fabric.device) if cuda else torch.backends.cpu.get_cpu_capability()
    return {"torch": str(torch.__version__), "device": device, "threads": torch.get_num_threads()}


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Grouped settings by their flags' names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {before + key: value}
    return found


def command() -> str:
    """This process's command as it was typed, but one that continues."""
    words, kept = iter(sys.orig_argv), []
    for word in words:
        if word == "--resume":
            next(words, None)
        elif not word.startswith("--resume="):
            kept.append(word)
    return f"{shlex.join(kept)} --resume true"


# --- on the way ------------------------------------------------------------------------------------------------------


class Keeper:
    """Writes what a run leaves on its way, and has the last word where it has to end early."""

    def __init__(
        self,
        fabric: "Fabric",
        model: "Module",
        optimizer: "Optimizer",
        folder: Path,
        weights: Callable[[Path, Run], None],
        n_steps: int,
        keep_last: int,
    ):
        """`weights(path, run)` writes what is trained, by itself."""
        self.fabric, self.model, self.optimizer = fabric, model, optimizer
        self.folder, self.weights, self.n_steps, self.keep_last = folder, weights, n_steps, keep_last

    def save(self, run: Run, told: Mapping[str, Any], metrics: Metrics) -> None:
        """The training state, then the weights by themselves; then what is too old goes."""
        state = snapshot(self.fabric, self.model, self.optimizer)

        def write() -> None:
            state.update(told, run=asdict(run), metrics_bytes=metrics.flush())
            files.save(self.folder / files.state_name(run.step), state, sealed=True)
            if run.step < self.n_steps:
                self.weights(self.folder / files.periodic_name(run.iteration), run)
            prune(self.folder, {files.state_name: run.step, files.periodic_name: run.iteration}, self.keep_last)

        self._written(run, write)

    def write(self, run: Run, name: str) -> None:
        """The weights, as a file of that name."""
        self._written(run, lambda: self.weights(self.folder / name, run))

    def _written(self, run: Run, write: Callable[[], None]) -> None:
        """Let the first process write; all go on together, or stop if it could not."""
        problem = ""
        if self.fabric.is_global_zero:
            try:
                write()
            except OSError as error:
                problem = f"step {run.step} could not be saved in {self.folder}: {error}"
        if problem := self.fabric.broadcast(problem):
            self.stop(problem, "make room")

    def stop(self, problem: str, remedy: str, flags: str = "") -> NoReturn:
        """Raise ValueError with what is wrong, what is left and what to do."""
        if not self.fabric.is_global_zero:
            sys.exit(0)  # another status, and Fabric kills the first process before it can say anything
        states = files.numbered(self.folder, files.state_name)
        if not states:
            raise ValueError(f"{problem}. Nothing had been saved before; {remedy}")
        last = states[max(states)]
        raise ValueError(f"{problem}. The last good checkpoint is {last}; {remedy} and continue: {command()}{flags}")

    def leave(self, run: Run, signals: "Signals") -> NoReturn:
        """End after a signal, with the status that shells give to it."""
        if not self.fabric.is_global_zero:
            sys.exit(0)
        say(f"stopped after step {run.step} of {self.n_steps} and saved it in {self.folder}; continue with:", command())
        assert signals.received is not None
        sys.exit(128 + signals.received)


# --- signals ---------------------------------------------------------------------------------------------------------


class Signals:
    """While it is entered, SIGINT and SIGTERM only ask to end; a second SIGINT ends at once."""

    def __init__(self, *, spoken: bool = True) -> None:
        """`spoken` says that it was heard."""
        self.received: int | None = None
        self.spoken = spoken

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.spoken:  # not by print, which may be what was interrupted
            os.write(2, b"\nfinishing the step and saving; Ctrl-C again ends at once\n")

    def anywhere(self, fabric: "Fabric") -> bool:
        """Whether any process was asked to end; the answer is the same in all of them."""
        if fabric.world_size == 1:
            return self.received is not None
        asked = torch.tensor(self.received or 0, device=fabric.device)
        self.received = int(fabric.all_reduce(asked, reduce_op="max")) or None  # type: ignore[arg-type]
        return self.received is not None


# --- one run to a folder ---------------------------------------------------------------------------------------------


class Lock:
    """The right to write into a folder, held until `release` or the end of the process, however it ends.

    The system keeps it (flock), so that a file left by a process that was killed holds nobody up; the file's text only
    tells who has it.
    """

    def __init__(self, folder: Path):
        """Raises ValueError that names the holder if there is one, or says that nothing can be written."""
        self.path = folder / files.LOCK
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._taken()
            self._file.truncate(0)
            self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
            self._file.flush()
        except OSError as error:
            raise ValueError(f"{folder} cannot be written to ({error.strerror}); name another --out_dir") from error

    def _taken(self) -> IO[str]:
        while True:
            file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as it is held
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ValueError(
                    f"{self.path.parent} is being written to by another run: {_holder(file.read())}"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                return file  # a disk that knows no locks: it is left to the user
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    return file
            file.close()  # its holder removed it in between: this is no longer the folder's

    def release(self) -> None:
        if not self._file.closed:
            self.path.unlink(missing_ok=True)
            self._file.close()


def _holder(text: str) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        told = json.loads(text)
        return f"process {told['pid']} on {told['host']}"
    return "a process that has just begun"


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left half-written; only for the holder of the folder's lock."""
    for path in folder.glob(".*.tmp"):
        path.unlink()
