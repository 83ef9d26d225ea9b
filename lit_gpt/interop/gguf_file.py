"""What a GGUF file says of itself, each number held against the file's size before anything is made of it.

The layout is llama.cpp's (docs/gguf.md in ggml): a header, key-value pairs, a table of tensors, the tensors' bytes.
"""

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_gpt.files import TEXT_LIMIT

VERSIONS = (2, 3)
TEXT, ARRAY = 8, 9  # kinds of a value; the others are numbers
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # kind -> as `struct` spells it
MOST_AXES = 4  # ggml's own limit


class RawTensor(NamedTuple):
    """A tensor as it is stored; `data` (..., bytes of a row) is mapped from the file."""

    shape: tuple[int, ...]  # the slowest axis first, as torch has it
    kind: int  # a gguf.GGMLQuantizationType
    data: np.ndarray[Any, Any]


def read(path: Path, sizes: dict[Any, tuple[int, int]]) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """The metadata and the tensors of a file; arrays of numbers are numpy's, and mapped like the tensors.

    `sizes` (gguf.GGML_QUANT_SIZES) tells of each kind of tensor how many numbers are stored in how many bytes. Raises
    ValueError for whatever does not fit into the file.
    """
    with open(path, "rb") as file:
        reader = _Reader(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    reader.take(4)  # the magic word, which the caller has looked at
    if (version := reader.number("I")) & 0xFFFF == 0:
        raise ValueError("it is of the other byte order than this machine")
    if version not in VERSIONS:
        raise ValueError(f"version {version} is not known")
    n_tensors, n_pairs = reader.number("Q"), reader.number("Q")
    values: dict[str, Any] = {}
    for _ in range(n_pairs):
        name = reader.text()
        if name in values:
            raise ValueError(f"the entry {name!r} comes twice")
        values[name] = reader.value(reader.number("I"))
    table = [reader.tensor() for _ in range(n_tensors)]
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment!r}")
    start = -(-reader.at // alignment) * alignment
    tensors: dict[str, RawTensor] = {}
    end = 0
    for name, shape, kind, offset in sorted(table, key=lambda row: row[3]):
        if kind not in sizes:
            raise ValueError(f"{name} is of the unknown kind {kind}")
        n_numbers, n_bytes = sizes[kind]
        if name in tensors or not shape or 0 in shape or shape[-1] % n_numbers:
            raise ValueError(f"{name} comes twice, or cannot have the shape {shape}")
        if offset < end:
            raise ValueError(f"{name} overlaps another tensor")
        row_bytes = shape[-1] // n_numbers * n_bytes
        end = offset + row_bytes * _product(shape[:-1])
        data = reader.array(np.dtype(np.uint8), end - offset, start + offset)
        tensors[name] = RawTensor(shape, kind, data.reshape(*shape[:-1], row_bytes))
    return values, {name: tensors[name] for name, *_ in table}


def _product(sizes: tuple[int, ...]) -> int:
    product = 1  # of Python's own numbers, which never overflow
    for size in sizes:
        product *= size
    return product


class _Reader:
    """A place in the file's header; going beyond the file's end is a ValueError."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, n_bytes: int) -> int:
        """Step over so many bytes; returns where they begin."""
        begin, self.at = self.at, self.at + n_bytes
        if self.at > min(len(self.data), TEXT_LIMIT):
            raise ValueError(f"{n_bytes:,} bytes at {begin:,} are beyond its end, or more than a header has")
        return begin

    def number(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        n_bytes = self.number("Q")
        begin = self.take(n_bytes)
        return self.data[begin : begin + n_bytes].decode("utf-8")

    def array(self, dtype: np.dtype[Any], count: int, begin: int) -> np.ndarray[Any, Any]:
        """Numbers that stay in the file until they are read."""
        if begin + count * dtype.itemsize > len(self.data):
            raise ValueError(f"{count * dtype.itemsize:,} bytes at {begin:,} are beyond its end")
        return np.frombuffer(self.data, dtype, count, begin)

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind != ARRAY:
            raise ValueError(f"a value of the unknown kind {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind == TEXT:
            return [self.text() for _ in range(count)]
        if kind not in NUMBERS:
            raise ValueError(f"an array of the unknown kind {kind}")
        dtype = np.dtype(f"<{NUMBERS[kind]}")
        return self.array(dtype, count, self.take(count * dtype.itemsize))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, kind and offset."""
        name, n_axes = self.text(), self.number("I")
        if n_axes > MOST_AXES:
            raise ValueError(f"{name} has {n_axes} axes")
        shape = tuple(self.number("Q") for _ in range(n_axes))[::-1]  # the file has the fastest axis first
        return name, shape, self.number("I"), self.number("Q")
