"""Damaged and hostile files made of good ones, and a watch over what reading them costs."""

import copy
import io
import json
import resource
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

SECONDS = 10  # of computing that one file may take
SLACK = 8 << 20  # bytes beyond twice the file: what Python and the libraries take of their own accord
ADDRESSES = 2 << 30  # bytes that may be asked for at all, used or not
HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**63), 10**9, 10**30, 0.0, -1.5, 1e-300, 1e308),
    *(float("nan"), float("inf"), "", "x", "\ud800", "\0", "../x", "/etc/passwd", "a" * 5000, "é" * 40, "8", "NaN"),
    *([], {}, [[]], [None], [0] * 500, {"a": {}}, {"": ""}, [[[[[[[[[[]]]]]]]]]], [True, False], ["x", 1]),
]
NUMBERS = [0, 1, 2, 7, 31, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]

places = st.floats(0, 1, exclude_max=True)
byte_edits = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "repeat", "cut", "number"]),
        places,
        st.one_of(st.sampled_from(NUMBERS), st.integers(0, 300)),
        st.binary(min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=4,
)
json_edits = st.lists(
    st.tuples(st.sampled_from(["value", "delete", "rename", "wrap", "copy"]), places, st.sampled_from(HOSTILE)),
    min_size=1,
    max_size=4,
)


def spoil_bytes(data: bytes, edits: list[tuple[str, float, int, bytes]]) -> bytes:
    """`data` with a few places changed."""
    for what, place, number, few in edits:
        at, n = int(place * len(data)), number % 300
        if what == "set":
            data = data[:at] + few + data[at + len(few) :]
        elif what == "insert":
            data = data[:at] + few + data[at:]
        elif what == "delete":
            data = data[:at] + data[at + n :]
        elif what == "repeat":
            data = data[:at] + data[at : at + n] * 3 + data[at + n :]
        elif what == "cut":
            data = data[:at]
        else:
            size = 8 if number > 2**32 - 1 or n % 2 else 4
            data = data[:at] + struct.pack("<Q", number)[:size] + data[at + size :]
    return data


def spoil_json(value: Any, edits: list[tuple[str, float, Any]]) -> Any:
    """`value` with a few of its parts, at any depth, replaced, removed, renamed, wrapped or put elsewhere."""
    value = copy.deepcopy(value)
    for what, place, hostile in edits:
        spots = list(_spots(value))
        if not spots:
            return hostile
        owner, key = spots[int(place * len(spots))]
        if what == "value":
            owner[key] = copy.deepcopy(hostile)
        elif what == "delete":
            del owner[key]
        elif what == "rename" and isinstance(owner, dict):
            owner[str(hostile)[:50]] = owner.pop(key)
        elif what == "wrap":
            owner[key] = [owner[key]]
        else:
            other, other_key = spots[int(place * 7919) % len(spots)]
            owner[key] = copy.deepcopy(other[other_key]) if other_key in _keys(other) else None
    return value


def _keys(owner: Any) -> Any:
    return owner if isinstance(owner, dict) else range(len(owner))


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, (dict, list)):
        for key in list(_keys(value)):
            yield value, key
            yield from _spots(value[key])


def to_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def read_safetensors(data: bytes) -> tuple[Any, bytes]:
    """Its header, and the rest."""
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def to_safetensors(header: Any, rest: bytes) -> bytes:
    text = to_json(header)
    return struct.pack("<Q", len(text)) + text + rest


def change_record(
    data: bytes, change: Callable[[bytes], bytes], name: str = "data.pkl", packing: int = zipfile.ZIP_STORED
) -> bytes:
    """A `.pth` with one of its records changed."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(changed, "w", packing) as other:
        for record in archive.infolist():
            content = archive.read(record)
            other.writestr(record.filename, change(content) if record.filename.endswith(f"/{name}") else content)
    return changed.getvalue()


@contextmanager
def watched(n_bytes: int) -> Iterator[None]:
    """Fail if the block takes too long, or more memory than twice `n_bytes` and what Python itself needs."""

    def too_long(*_: object) -> None:
        raise AssertionError(f"not done after {SECONDS} s")

    status, peak = Path("/proc/self/status"), "VmHWM:"
    if not status.exists():  # memory is watched on Linux only
        yield
        return

    def field(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)) << 10

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = field("VmRSS:")
    old, limits = signal.signal(signal.SIGPROF, too_long), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (field("VmSize:") + ADDRESSES, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    taken = field(peak) - before
    assert taken <= 2 * n_bytes + SLACK, f"{taken:,} bytes for a file of {n_bytes:,}"
