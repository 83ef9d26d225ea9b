"""How the C files become libraries: where there is a compiler or none, a cache or none."""

import logging
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROCESSOR
from torch._subclasses import FakeTensor, FakeTensorMode

from lit_gpt import kernels
from lit_gpt.kernels import rows

pytestmark = pytest.mark.skipif(not rows.available(), reason="no C compiler")


def compiled_anew() -> object:
    return kernels.compiled.__wrapped__("rows")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lit_gpt"


def test_a_library_is_kept_and_a_damaged_one_made_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled_anew()
    (kept,) = cache.iterdir()
    made = kept.stat().st_mtime_ns
    assert compiled_anew()
    assert kept.stat().st_mtime_ns == made
    damaged = cache.parent / "other" / "lit_gpt" / kept.name  # elsewhere: a library is opened once under one name
    damaged.parent.mkdir(parents=True)
    damaged.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent / "other"))
    assert compiled_anew()
    assert damaged.stat().st_size == kept.stat().st_size


@pytest.mark.parametrize("command", ["", "env cc -DLEFT_ALONE"])
def test_the_compiler_may_be_a_command_with_arguments(
    command: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", command)
    assert compiled_anew()


def test_no_folder_to_keep_it_in_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiled_anew()

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert compiled_anew()


def test_without_a_compiler_there_is_a_warning(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert compiled_anew() is None
    assert "rows.c" in caplog.text
    assert "no-such-compiler" in caplog.text
    monkeypatch.setenv("CC", "cc -fno-such-flag")
    assert compiled_anew() is None
    assert "no-such-flag" in caplog.text


@pytest.mark.skipif(PROCESSOR not in kernels.PROCESSORS, reason="another kind of processor")
def test_a_compiler_that_does_not_know_the_processors_dot_products_does_without(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(kernels, "DOT_PRODUCTS", ["-fno-such-flag"])
    kept = kernels._kept
    monkeypatch.setattr(kernels, "_kept", lambda command, source: tried.append(command) or kept(command, source))
    with caplog.at_level(logging.WARNING):
        assert compiled_anew()
    assert ["-fno-such-flag" in command for command in tried] == [True, False]
    assert not caplog.text


def test_what_fails_for_another_reason_is_not_tried_without_dot_products(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(kernels, "DOT_PRODUCTS", ["-include", "no-such-file.h"])
    monkeypatch.setattr(kernels, "_told", lambda error: "rows.c: error: something else")
    with caplog.at_level(logging.WARNING):
        assert compiled_anew() is None
    assert "something else" in caplog.text


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc does")
def test_memory_that_was_given_back_serves_for_the_same_size_again() -> None:
    """Every other one of 40 blocks is freed, in a heap of its own: those that follow lie where it was."""
    code = """
import torch
from lit_gpt import kernels
blocks = [kernels.empty(torch.empty(0), (30_001,)) for _ in range(40)]
free = {block.data_ptr() for block in blocks[1::2]}
del blocks[1::2]
print(len(free & {block.data_ptr() for block in [kernels.empty(torch.empty(0), (30_001,)) for _ in free]}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(done.stdout) == 20  # torch.empty with glibc 2.36: 0, 1, 1 and once 18


def test_memory_has_the_shape_that_is_asked_for() -> None:
    for like in (torch.empty(3, 301), torch.empty(301, 3).t(), torch.empty(5, dtype=torch.uint8)):
        y = kernels.empty(like)
        assert (y.shape, y.dtype, y.data_ptr() % kernels.ALIGNED) == (like.shape, like.dtype, 0)
        assert y.is_contiguous()
    y = kernels.empty(like, (4, 0, 5), torch.bfloat16)
    assert (y.shape, y.dtype) == ((4, 0, 5), torch.bfloat16)
    with FakeTensorMode():
        assert isinstance(kernels.empty(torch.empty(2, 3), (7,)), FakeTensor)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc does")
def test_what_a_step_frees_is_kept_for_the_next() -> None:
    """108 MB, freed and asked for again: the system has not to make their pages anew."""
    code = """
import resource, torch
from lit_gpt import kernels, runtime
if KEPT:
    runtime.keep_memory()
def step():
    blocks = [kernels.empty(torch.ones(1), (900_000,)).fill_(1.0) for _ in range(30)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(), step()
before = step()
print(step() - before)
"""
    kept, anew = (
        int(subprocess.run([sys.executable, "-c", code.replace("KEPT", word)], capture_output=True, check=True).stdout)
        for word in ("True", "False")
    )
    assert kept * 4 < anew
