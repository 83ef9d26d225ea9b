"""C for CPUs, compiled where it is first used. Without a compiler or the right processor all works too, only slower."""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("few_tokens.c")
MOST_TOKENS = 16


@cache
def few_tokens() -> ctypes.CDLL | None:
    """The compiled `few_tokens.c`, or None where it cannot be had. It is kept in the user's cache, about 20 KB."""
    if not torch.cpu._is_avx512_bf16_supported():
        return None
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_gpt"
    library = folder / f"few_tokens-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    try:
        if not library.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as made:  # renamed when it is whole
                out = Path(made) / library.name
                command: list[str | Path] = [
                    os.environ.get("CC", "cc"),
                    "-O3",
                    "-shared",
                    "-fPIC",
                    "-fopenmp",
                    "-o",
                    out,
                    SOURCE,
                ]
                subprocess.run(command, check=True, capture_output=True)
                out.replace(library)
        loaded = ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError):
        return None
    number, pointer = ctypes.c_long, ctypes.c_void_p
    loaded.few_tokens_4bit.argtypes = [number] * 4 + [pointer] * 5 + [ctypes.c_int]
    return loaded


def few_tokens_4bit(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, block: int
) -> torch.Tensor:
    """x (m, in) W^T, (m, out) in bfloat16, for m up to `MOST_TOKENS`; `few_tokens()` must be there.

    W is codes (out * in / 2) uint8 into levels (16,) bfloat16, times float32 scales (out * in / block); all contiguous,
    on the CPU, and `block` a multiple of 64 that divides `in`.
    """
    library = few_tokens()
    assert library is not None, "ask few_tokens() first"
    x, (m, k) = x.contiguous(), x.shape  # a copy has to live until the call is over
    n = codes.numel() * 2 // k
    y = torch.empty(m, n, dtype=torch.bfloat16)
    pointers = [t.data_ptr() for t in (x, codes, scales, levels, y)]
    failed = library.few_tokens_4bit(m, n, k, block, *pointers, torch.get_num_threads())
    assert not failed, f"{m} tokens are too many, or there is no memory"
    return y
