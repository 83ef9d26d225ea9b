"""The weights of a folder, whoever wrote them: tensors that are read one at a time, by name."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from lit_gpt.files import LIT_MODEL, checkpoint_folder, forget, load_dict, own, read_json

WEIGHTS = (  # where a folder's weights may lie, best first; an index beside them names the shards
    (LIT_MODEL, "no index"),
    ("*.safetensors", "model.safetensors.index.json"),
    ("*.bin", "pytorch_model.bin.index.json"),
)


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
        self.where = self.folder = checkpoint_folder(folder)
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
        for pattern, index in kinds:
            if (self.folder / index).is_file():
                return self._indexed(self.folder / index, pattern), False
            whole = self.folder / index.removesuffix(".index.json")
            # By its own name first: other files may lie beside it, such as training_args.bin.
            if files := [whole] if whole.is_file() else sorted(self.folder.glob(pattern)):
                return [own(file) for file in files], pattern == LIT_MODEL
        found = sorted(path.name for path in self.folder.iterdir())
        raise ValueError(
            f"{self.folder} holds no weights (lit_model.pth, *.safetensors or *.bin), only {found or 'nothing'}; "
            "run scripts/download.py, or give a folder whose download is complete"
        )

    def _indexed(self, index: Path, pattern: str) -> list[Path]:
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{index} has no weight_map from the names of tensors to those of files")
        files = sorted(set(names.values()))
        if strange := [n for n in files if Path(n).name != n or "\0" in n]:
            raise ValueError(f"{index} names files outside the folder: {strange}")
        if other := [name for name in files if not Path(name).match(pattern)]:
            raise ValueError(f"{index} names files that are no {pattern}: {other}")
        if missing := [name for name in files if not (self.folder / name).is_file()]:
            raise ValueError(
                f"{self.folder} is incomplete: {', '.join(missing)} missing; run scripts/download.py again"
            )
        return [own(self.folder / name) for name in files]

    def _headers(self, file: Path) -> Iterator[tuple[str, torch.Tensor]]:
        if file.suffix == ".safetensors":
            with open_safetensors(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    part = opened.get_slice(name)
                    yield name, _meta(file, name, part.get_shape(), _safetensors_dtype(file, part))
        else:
            for name, tensor in load_dict(file, mmap=True).items():
                if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
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
        if file in self._states:
            forget(self._states[file][name])


def open_safetensors(file: Path) -> Any:
    """`safetensors.safe_open`. Raises ValueError naming the file if it is broken or cut short.

    The library refuses a header of over 100 MB, and tensors that overlap, leave gaps, or do not fill the file exactly.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is broken or incomplete ({error}); run scripts/download.py again") from error


def _safetensors_dtype(file: Path, part: Any) -> torch.dtype:
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    names |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
    names |= {"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    if (name := part.get_dtype()) not in names:
        raise ValueError(f"{file} holds a tensor of the unknown type {name}")
    return names[name]


def _meta(file: Path, name: str, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device="meta")
    except (RuntimeError, TypeError, ValueError) as error:  # an empty tensor may claim axes beyond any count
        raise ValueError(f"{file}: {name} has an impossible shape") from error


def refuse_if_weights(folder: Path, flag: str) -> None:
    """Raises ValueError for a folder to be written that holds weights: of two models' files one would be read."""
    if folder.is_file() or any((folder / index).is_file() or any(folder.glob(kind)) for kind, index in WEIGHTS):
        raise ValueError(f"{flag} {folder} holds weights, which may be needed; name a new folder, or delete them")
