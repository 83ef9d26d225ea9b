"""C for CPUs, compiled where it is first used. Without a compiler or the right processor all works too, only slower."""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

# What the compiler may use of the processor: what torch's own kernels use of it.
PROCESSORS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-fopenmp"]


@cache
def compiled(name: str) -> ctypes.CDLL | None:
    """The library of `name`.c beside this file, or None where it cannot be had.

    It is kept in the user's cache, some 20 KB, under a name that tells source, compiler and processor.
    """
    source, processor = Path(__file__).with_name(f"{name}.c"), torch.backends.cpu.get_cpu_capability()
    command = [os.environ.get("CC", "cc"), *FLAGS, *PROCESSORS.get(processor, [])]
    told = " ".join((*command, platform.machine())).encode() + source.read_bytes()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_gpt"
    library = folder / f"{name}-{hashlib.sha256(told).hexdigest()[:16]}.so"
    try:
        if not library.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as made:  # renamed when it is whole
                out = Path(made) / library.name
                subprocess.run([*command, "-o", out, source, "-lm"], check=True, capture_output=True)
                out.replace(library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError):
        return None
