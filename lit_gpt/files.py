"""Files: every name under checkpoints/ and out/, spelled once; atomic writing, safe reading."""

import contextlib
import ctypes
import hashlib
import json
import os
import pickletools
import re
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

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
DOWNLOADING = ".downloading"  # lies in a folder from before its first file comes until after the last is checked
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

TEXT_LIMIT = 100_000_000  # bytes of JSON or of a pickle that are parsed: as Python objects they take many times that
SURROGATE = re.compile("[\ud800-\udfff]")
PLAIN_PICKLES = {  # what a file of tensors, numbers and text names; torch itself lets more pass, see `_strange`
    "collections OrderedDict",
    "torch Size",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in "Double Float Half BFloat16 Long Int Short Char Byte Bool".split()),
    *("torch._utils _rebuild_tensor_v3", "torch.storage UntypedStorage", "torch float8_e4m3fn", "torch float8_e5m2"),
}


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
    return f"quantized-{kind}-v2.pth"


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
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put what was renamed in a folder on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    os.fsync(opened)
    os.close(opened)


def save(path: Path, state: dict[str, Any], *, sealed: bool = False) -> None:
    """`torch.save`, atomically; `sealed` with a checksum behind it, for `load_sealed`. Raises OSError."""
    with atomically(path) as temporary, open(temporary, "wb") as file:
        digest = _save_into(file, state)
        if sealed:
            file.write(digest)


def _save_into(file: BinaryIO, state: dict[str, Any]) -> bytes:
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

    def __init__(self, file: BinaryIO):
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
                _seek_record(file, record)
                file.write(data.data)
        assert not waiting, f"never written: {sorted(waiting)}"


def _seek_record(file: BinaryIO, record: zipfile.ZipInfo) -> None:
    """Go to where the record's bytes begin."""
    file.seek(record.header_offset + 26)  # the two lengths at the end of a zip's local header
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    file.seek(record.header_offset + 30 + name_length + extra_length)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation and config files; those of a model that was in `target` before go.

    Nothing happens if it is the same folder.
    """
    target.mkdir(parents=True, exist_ok=True)
    if source.resolve() == target.resolve():
        return
    for name in COMPANIONS:
        if (source / name).is_file():
            with atomically(target / name) as temporary:
                shutil.copyfile(own(source / name), temporary)
        else:
            (target / name).unlink(missing_ok=True)


def fetch(url: str, path: Path) -> None:
    """Download a file. Raises ValueError that says what to do where there is no network."""
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=60) as answer, atomically(path) as temporary, open(temporary, "wb") as file:
            shutil.copyfileobj(answer, file)
            if (told := answer.headers["Content-Length"]) is not None and file.tell() != int(told):
                raise OSError(f"the connection was lost after {file.tell():,} of {int(told):,} bytes")
    except (URLError, OSError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{url} cannot be downloaded ({reason}); without a network, put the file at {path}") from error


# --- reading ---------------------------------------------------------------------------------------------------------


def checkpoint_folder(folder: Path) -> Path:
    """The folder itself. Raises ValueError if there is none, or if its download was interrupted."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; download a checkpoint with scripts/download.py")
    if (folder / DOWNLOADING).exists():
        raise ValueError(f"{folder} is incomplete: its download was interrupted; run scripts/download.py again")
    return folder


def own(path: Path) -> Path:
    """The file itself. Raises ValueError for a link that leads out of the file's folder.

    A folder from elsewhere could name any file of this machine so, which would be read in its place, or copied along
    with a merged model. Links may stay within the folder; and within one repository of the hub's own cache, which
    keeps the files themselves in blobs/ and gives each a name by a link in snapshots/<commit>/.
    """
    folder, real = path.parent.resolve(), path.resolve()
    homes = [folder] + ([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])
    if not any(real.is_relative_to(home) for home in homes):
        raise ValueError(f"{path} is a link that leads out of its folder, to {real}; put the file itself there")
    return path


def load_dict(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """`torch.load` that never runs code. Raises ValueError naming a file that would need to, or that is broken."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        strange = _strange(path)
        state = None if strange else torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # a broken file fails wherever its bytes stop making sense
        reason = str(error).split("\n", 1)[0].split(". ", 1)[0] or type(error).__name__
        raise ValueError(f"{path} is broken or incomplete: {reason}") from error
    if strange:
        raise ValueError(f"{path} was not loaded: {strange}")
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no state dict but a {type(state).__name__}")
    # Tensors may share memory, as tied weights do; but a small file could name its few numbers over and over.
    if (claimed := sum(tensor.nbytes for tensor in _tensors(state))) > 2 * path.stat().st_size:
        raise ValueError(f"{path} is no larger than {path.stat().st_size:,} bytes, and claims tensors of {claimed:,}")
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


def _strange(path: Path) -> str | None:
    """Why torch should not open this `.pth`, if there is a reason. Raises whatever a broken file leads to.

    torch runs no code, but would let two kinds of small files take any amount of memory: packed records, and pickles
    that call what takes as much as it is asked for, such as bytearray. That tensors lie in their records it checks.
    """
    with open(path, "rb") as file:
        if file.read(1) == b"\x80":  # it tells no sizes that could be checked before memory is taken
            return "it is a bare pickle, as torch wrote them before version 1.6; load and save it again with torch"
    with zipfile.ZipFile(path) as archive:
        listed, size = archive.infolist(), path.stat().st_size
    records = {record.filename.split("/", 1)[-1].lower(): record for record in listed}  # torch takes either case
    claimed = sum(record.file_size for record in listed)
    if claimed > size or any(record.compress_type for record in listed) or len(records) < len(listed):
        return f"its records are packed, or overlap: {claimed:,} bytes in a file of {size:,}"
    pickle = records["data.pkl"]
    if pickle.file_size > TEXT_LIMIT:
        return f"its index alone has {pickle.file_size:,} bytes"
    with open(path, "rb") as file:
        _seek_record(file, pickle)
        operations = pickletools.genops(file.read(pickle.file_size))
    named = {str(argument) for code, argument, _ in operations if code.name == "GLOBAL"}
    if unknown := sorted(named - PLAIN_PICKLES):
        return f"it holds objects that could run code or take any amount of memory: {', '.join(unknown[:4])}"
    return None


def _tensors(state: object) -> Iterator[torch.Tensor]:
    """Every tensor in nested dicts, lists and tuples, once."""
    waiting, seen = [state], set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, torch.Tensor):
            yield part
        elif isinstance(part, dict):
            waiting += part.values()
        elif isinstance(part, (list, tuple)):
            waiting += part


def read_text(path: Path) -> str:
    """A small text file of a folder. Raises ValueError naming the file if it is large, no text, or lies elsewhere."""
    own(path)
    try:
        if (size := path.stat().st_size) > TEXT_LIMIT:
            raise ValueError(f"{size:,} bytes are too many for such a file")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: JSON can spell half of a character, such as \\ud83d alone."""
    return value.isascii() or not SURROGATE.search(value)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming the file."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
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
