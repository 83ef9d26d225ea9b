"""Files: every name under checkpoints/ and out/, spelled once; atomic writing, safe reading, tensors one at a time."""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, Protocol

import torch

LIT_MODEL = "lit_model.pth"
LIT_CONFIG = "lit_config.json"
HF_CONFIG = "config.json"
ADAPTER = "lit_model_lora_finetuned.pth"
FINETUNED = "lit_model_finetuned.pth"
HYPERPARAMETERS = "hyperparameters.yaml"
METRICS = "metrics.csv"
REPORT = "report.json"
BEST = "best-ckpt.pth"
LOCK = "run.lock"
PROMPT_STYLE = "prompt_style.json"
COMPANIONS = (  # what a model needs beside its weights; copied along whenever a model is written
    HF_CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
WEIGHTS = (  # where a folder's weights may lie, best first; an index beside them names the shards
    (LIT_MODEL, "no index"),
    ("*.safetensors", "model.safetensors.index.json"),
    ("*.bin", "pytorch_model.bin.index.json"),
)


def periodic_name(iteration: int) -> str:
    """Name of a checkpoint within a run; counts micro-batches."""
    return f"iter-{iteration:06d}-ckpt.pth"


def state_name(step: int) -> str:
    """Name of a training state, which a run continues from; counts optimizer steps."""
    return f"step-{step:06d}-state.pth"


def numbered(folder: Path, name: Callable[[int], str]) -> dict[int, Path]:
    """The files of a folder that `periodic_name` or `state_name` has named, by their number, in its order."""
    before, after = name(0).split("000000")
    found = [(path.name.removeprefix(before).removesuffix(after), path) for path in folder.glob(f"{before}*{after}")]
    return dict(sorted((int(number), path) for number, path in found if number.isdigit()))


def quantized_name(kind: str) -> str:
    """Name of the quantized weights that may lie beside a checkpoint; the number is the layout's version."""
    return f"quantized-{kind}-v1.pth"


# --- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder: flushed and renamed to `path` at the end, removed if the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename itself
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, state: dict[str, Any], *, sealed: bool = False) -> None:
    """`torch.save`, atomically; `sealed` with a checksum behind it, for `load_sealed`. Raises OSError."""
    with atomically(path) as temporary, open(temporary, "wb") as file:
        digest = _save_into(file, state)
        if sealed:
            file.write(digest)


def _save_into(file: IO[bytes], state: dict[str, Any]) -> bytes:
    """`torch.save` into an open file; returns the SHA-256 of what was written. An OSError comes out as itself."""
    writer = _Writer(file)
    try:
        torch.save(state, writer)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise writer.error or error from error
    return writer.digest.digest()


class _Writer:
    """Passes on what it is given, with a running checksum.

    It remembers an error, after which torch would still write the file's end, and complain of that instead.
    """

    def __init__(self, file: IO[bytes]):
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def save_text(path: Path, text: str) -> None:
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_streamed(path: Path, metas: Mapping[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write a state dict whose tensors come one at a time, in any order; `metas` tells their shapes and dtypes.

    The file is laid out by `torch.save` without data, and each tensor is then written where its record lies: the result
    is an ordinary `.pth`, and no more than one tensor is ever in memory.
    """
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        hollow = {name: torch.empty(meta.shape, dtype=meta.dtype) for name, meta in metas.items()}
    with atomically(path) as temporary:
        try:
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(hollow, temporary)
        except RuntimeError as error:  # all that torch says of a disk that is full
            raise OSError(f"{path} cannot be written, most likely for want of space ({error})") from error
        with zipfile.ZipFile(temporary) as archive:
            records = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
        waiting = {name: records[f"data/{index}"] for index, name in enumerate(hollow)}
        with open(temporary, "r+b") as file:
            for name, tensor in tensors:
                record = waiting.pop(name)
                data = tensor.detach().cpu().contiguous().to(metas[name].dtype).view(torch.uint8).flatten().numpy()
                assert data.nbytes == record.file_size, f"{name}: {data.nbytes} bytes for {record.file_size}"
                file.seek(record.header_offset + 26)  # the two lengths at the end of a zip's local header
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                file.seek(record.header_offset + 30 + name_length + extra_length)
                file.write(data.data)
        assert not waiting, f"never written: {sorted(waiting)}"


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation and config files, unless it is the same folder."""
    target.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        if (source / name).is_file() and not (target / name).exists():
            with atomically(target / name) as temporary:
                shutil.copyfile(source / name, temporary)


def fetch(url: str, path: Path) -> None:
    """Download a file. Raises ValueError that says what to do where there is no network."""
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=60) as answer, atomically(path) as temporary, open(temporary, "wb") as file:
            shutil.copyfileobj(answer, file)
    except (URLError, OSError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{url} cannot be downloaded ({reason}); without a network, put the file at {path}") from error


# --- reading ---------------------------------------------------------------------------------------------------------


def load_dict(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """`torch.load` that never runs code. Raises ValueError naming a file that would need to, or that is broken."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except UnpicklingError as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(
            f"{path} is broken, or holds objects that could run code, and was not loaded: {reason}"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        reason = str(error).split("\n", 1)[0].split(". ", 1)[0]
        raise ValueError(f"{path} is broken or incomplete: {reason}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no state dict but a {type(state).__name__}")
    return state


def load_sealed(path: Path) -> dict[str, Any]:
    """What `save(..., sealed=True)` wrote, mapped. Raises ValueError if a single bit of the file has changed."""
    size = hashlib.sha256().digest_size
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    with open(path, "rb") as file:
        digest, left = hashlib.sha256(), os.fstat(file.fileno()).st_size - size
        while left > 0 and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
        if left or file.read() != digest.digest():
            raise ValueError(f"{path} is damaged: its checksum is not that of its content")
    return load_dict(path, mmap=True)


class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    where: Path  # for error messages
    is_lit: bool  # the names are ours already
    metas: Mapping[str, torch.Tensor]  # shapes and dtypes, on the meta device

    def read(self, name: str) -> torch.Tensor: ...
    def release(self, name: str) -> None:
        """Say that the tensor has been used, and what it holds in memory can go."""


class FolderSource:
    """The weights of a folder: `lit_model.pth`, or HF's safetensors or .bin files, sharded or not.

    Only headers are read until a tensor is asked for. Raises ValueError for a folder that is missing or incomplete.
    """

    def __init__(self, folder: Path, *, original: bool = False):
        """With `original`, a `lit_model.pth` is passed over for the HF files that it was made from."""
        self.where = self.folder = folder
        kinds = WEIGHTS[1:] if original else WEIGHTS
        self.files, self.is_lit = self._find(kinds)
        self._states: dict[Path, dict[str, torch.Tensor]] = {}
        self._home: dict[str, Path] = {}
        metas: dict[str, torch.Tensor] = {}
        for file in self.files:
            for name, meta in self._headers(file):
                metas[name], self._home[name] = meta, file
        self.metas: Mapping[str, torch.Tensor] = metas

    def _find(self, kinds: Iterable[tuple[str, str]]) -> tuple[list[Path], bool]:
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a folder; download a checkpoint with scripts/download.py")
        for pattern, index in kinds:
            if (self.folder / index).is_file():
                names = sorted(set(read_json(self.folder / index).get("weight_map", {}).values()))
                if strange := [n for n in names if not isinstance(n, str) or Path(n).name != n]:
                    raise ValueError(f"{self.folder / index} names files outside the folder: {strange}")
                if missing := [name for name in names if not (self.folder / name).is_file()]:
                    raise ValueError(
                        f"{self.folder} is incomplete: {', '.join(missing)} missing; run scripts/download.py again"
                    )
                return [self.folder / name for name in names], False
            if files := sorted(self.folder.glob(pattern)):
                return files, pattern == LIT_MODEL
        found = sorted(path.name for path in self.folder.iterdir())
        raise ValueError(
            f"{self.folder} holds no weights (lit_model.pth, *.safetensors or *.bin), only {found or 'nothing'}; "
            "run scripts/download.py, or give a folder whose download is complete"
        )

    def _headers(self, file: Path) -> Iterator[tuple[str, torch.Tensor]]:
        if file.suffix == ".safetensors":
            with open_safetensors(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    part = opened.get_slice(name)
                    yield name, torch.empty(part.get_shape(), dtype=_safetensors_dtype(file, part), device="meta")
        else:
            for name, tensor in load_dict(file, mmap=True).items():
                if not isinstance(tensor, torch.Tensor):
                    raise ValueError(f"{file}: {name!r} is no tensor but a {type(tensor).__name__}")
                self._states.setdefault(file, {})[name] = tensor
                yield name, tensor.to("meta")

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, in the file's dtype."""
        file = self._home[name]
        if file in self._states:
            return self._states[file][name]
        # Opened anew each time: pages of a file that stays mapped would count as this process's memory.
        with open_safetensors(file) as opened:
            return opened.get_tensor(name)

    def release(self, name: str) -> None:
        """Say that the tensor has been used, and what it holds in memory can go."""
        file = self._home[name]
        if file in self._states and zipfile.is_zipfile(file):  # mapped, then
            forget(self._states[file][name])


def open_safetensors(file: Path) -> Any:
    """`safetensors.safe_open`. Raises ValueError naming the file if it is broken or cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is broken or incomplete ({error}); run scripts/download.py again") from error


def _safetensors_dtype(file: Path, part: Any) -> torch.dtype:
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    names |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
    names |= {"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    if (name := part.get_dtype()) not in names:
        raise ValueError(f"{file} holds a tensor of the unknown type {name}")
    return names[name]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object but a {type(value).__name__}")
    return value


def forget(tensor: torch.Tensor) -> None:
    """Give back the memory of a tensor that is mapped from a file; if it is used again, it is read again.

    For loops over a mapped checkpoint, whose pages would pile up as this process's memory. Does nothing but on Linux,
    and must not be used on a tensor that has been written to.
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu":
        return
    page = os.sysconf("SC_PAGE_SIZE")
    begin = -(-tensor.data_ptr() // page) * page  # only whole pages: the first and last are shared with others
    size = (tensor.data_ptr() + tensor.nbytes) // page * page - begin
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), 4)  # MADV_DONTNEED
