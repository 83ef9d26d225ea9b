"""C for CPUs, compiled where it is first used. Without a compiler or the right processor all works too, only slower."""

import contextlib
import ctypes
import hashlib
import logging
import math
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from torch._subclasses import FakeTensor

# What the compiler may use of the processor: what torch's own kernels use of it.
PROCESSORS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}
# Of pairs of bfloat16, where the processor has them; compilers from before 2020 do not know the flag.
DOT_PRODUCTS = ["-mavx512bf16"]
TYPES = {"l": ctypes.c_long, "f": ctypes.c_float, "p": ctypes.c_void_p}
ALIGNED = 64  # bytes: what comes from memory together, and a whole vector
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-fopenmp"]


@cache
def in_pairs() -> bool:
    """Whether the processor is faster at dot products of bfloat16 pairs than at float32.

    AMD's are twice as fast. Those of Intel's that have matrix tiles are half as fast (benchmarks/LOG.md).
    """
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


@cache
def compiled(name: str) -> ctypes.CDLL | None:
    """The library of `name`.c beside this file, or None, and a warning, where it cannot be had.

    It is kept in the user's cache, some 20 KB, under a name that tells source, compiler's command and processor; where
    there is no such folder, it is made for this process alone.
    """
    source, processor = Path(__file__).with_name(f"{name}.c"), torch.backends.cpu.get_cpu_capability()
    command = [*shlex.split(os.environ.get("CC") or "cc"), *FLAGS, *PROCESSORS.get(processor, [])]
    more = DOT_PRODUCTS if processor == "AVX512" and torch.cpu._is_avx512_bf16_supported() else []
    try:
        try:
            return _kept([*command, *more], source)
        except subprocess.CalledProcessError as error:
            if not any(flag in _told(error) for flag in more):
                raise
            return _kept(command, source)
    except subprocess.CalledProcessError as error:
        why = next((line for line in _told(error).splitlines() if "error" in line), str(error))
    except OSError as error:
        why = str(error)
    logging.getLogger(__name__).warning(
        "%s cannot be compiled, and this CPU takes longer without it; install a C compiler, or name it in CC (%s)",
        *(source.name, why),
    )
    return None


def _told(error: subprocess.CalledProcessError) -> str:
    return str(error.stderr.decode(errors="replace"))


def _kept(command: Sequence[str], source: Path) -> ctypes.CDLL:
    """The library in the user's cache, made where it is not there. Raises as `_made`."""
    sources = b"".join(path.read_bytes() for path in sorted(source.parent.glob("*.[ch]")))  # one may include another
    told = " ".join((*command, platform.machine())).encode() + sources
    file = f"{source.stem}-{hashlib.sha256(told).hexdigest()[:16]}.so"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_gpt"
        folder.mkdir(parents=True, exist_ok=True)
        return _made(command, source, folder / file)
    except (OSError, RuntimeError):  # no home, or none that may be written to
        with tempfile.TemporaryDirectory() as private:
            return _made(command, source, Path(private) / file)


def _made(command: Sequence[str], source: Path, library: Path) -> ctypes.CDLL:
    """The library, compiled unless it is there. Raises OSError, or CalledProcessError if the compiler fails."""
    if library.is_file():
        with contextlib.suppress(OSError):  # a file that was damaged is made anew
            return ctypes.CDLL(str(library))
    with tempfile.TemporaryDirectory(dir=library.parent) as made:  # renamed when it is whole
        out = Path(made) / library.name
        subprocess.run([*command, "-o", out, source, "-lm"], check=True, capture_output=True)
        out.replace(library)
    return ctypes.CDLL(str(library))


def empty(like: torch.Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Memory for a result on the CPU, laid out end to end, of `like`'s shape and dtype unless told otherwise.

    torch asks malloc for addresses that are multiples of 64, and glibc before 2.38 takes for that only blocks that are
    some bytes larger: one that was freed never serves for the same size again, and a step leaves hundreds of holes.
    Without that wish they are found again; the address is made even within the block. (benchmarks/LOG.md) It is numpy
    that asks, which for blocks of 4 MiB and more also asks the system for huge pages.
    """
    shape, dtype = like.shape if shape is None else shape, dtype or like.dtype
    if isinstance(like, FakeTensor):
        return like.new_empty(shape, dtype=dtype)
    block = torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize + ALIGNED, np.uint8))
    offset = -block.data_ptr() % ALIGNED // dtype.itemsize
    return torch.empty(0, dtype=dtype, device="cpu").set_(block.untyped_storage(), offset, shape)  # type: ignore[call-overload]


class Functions:
    """The functions of a C file, called with tensors.

    `kinds` tells of each function's arguments: l a whole number, f a fraction, p a tensor's numbers, or none. The
    number of threads is added.
    """

    def __init__(self, name: str, kinds: dict[str, str]):
        self.name, self.kinds = name, kinds

    @cached_property
    def library(self) -> ctypes.CDLL | None:
        library = compiled(self.name)
        for name, kinds in self.kinds.items() if library is not None else ():
            function = getattr(library, name)
            function.argtypes, function.restype = [TYPES[kind] for kind in (*kinds, "l")], None
        return library

    @cached_property
    def with_pairs(self) -> bool:
        """Whether the library was made for a processor that multiplies pairs of bfloat16."""
        return self.library is not None and bool(ctypes.c_long.in_dll(self.library, "with_pairs"))

    def call(self, name: str, *arguments: torch.Tensor | float | None) -> None:
        """Nothing happens to the planner's tensors, which have no numbers."""
        passed: list[float | None] = []
        for argument in arguments:
            if isinstance(argument, FakeTensor):
                return
            if isinstance(argument, torch.Tensor):
                assert argument.is_contiguous()
                argument = argument.data_ptr()
            passed.append(argument)
        getattr(self.library, name)(*passed, torch.get_num_threads())
