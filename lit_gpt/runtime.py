"""One Fabric from (devices, precision), and what each precision means for the weights."""

import contextlib
import ctypes
import logging
import os
import resource
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from lit_gpt.model import GPT

# A compiled product is kept for each shape, and rows of all lengths bring new ones for ever: 1,024 of them in oneDNN,
# and once more in torch's layer above it. 128 in one place are as fast and take 1.5 GB less after a hundred steps
# (benchmarks/LOG.md). The variables are read at the first product.
KEPT_PRODUCTS, MANY, FEW = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128", "48"
os.environ.setdefault(KEPT_PRODUCTS, MANY)
os.environ.setdefault("LRU_CACHE_CAPACITY", "1")


@dataclass(frozen=True)
class Precision:
    """How the numbers are kept: `frozen` weights, `trained` ones and norms, and whether autocast is on."""

    name: str
    frozen: torch.dtype
    trained: torch.dtype
    mixed: bool = False


# Under mixed precision autocast would round a frozen weight anyway each time it is used: it is stored rounded.
PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("32-true", torch.float32, torch.float32),
        Precision("16-true", torch.float16, torch.float16),
        Precision("bf16-true", torch.bfloat16, torch.bfloat16),
        Precision("16-mixed", torch.float16, torch.float32, mixed=True),
        Precision("bf16-mixed", torch.bfloat16, torch.float32, mixed=True),
        Precision("64-true", torch.float64, torch.float64),
    )
}
SYNONYMS = {"32": "32-true", "32-full": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}


def resolve_precision(name: str | None, *, training: bool) -> Precision:
    """The precision of that name, or the best default of this machine: mixed to train, true to run.

    That is bfloat16 but on GPUs that lack it. A CPU that cannot multiply in it keeps and reads half the bytes of frozen
    weights all the same, and trains nearly as fast (`products.linear`). Raises ValueError that lists the names.
    """
    if name is None:
        lacks = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
        name = f"{'16' if lacks else 'bf16'}-{'mixed' if training else 'true'}"
    name = SYNONYMS.get(name, name)
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}; known are {', '.join((*PRECISIONS, *SYNONYMS))}")
    return PRECISIONS[name]


def launch(precision: Precision, devices: int | str = 1, num_nodes: int = 1) -> "Fabric":
    """A Fabric that is running, on the best accelerator there is; with several devices, data parallel."""
    quiet()
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision
    from lightning_fabric.plugins.precision import Precision as WeightsAsTheyAre

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Fabric's "true" plugins would round the LoRA factors too: the weights come in the right dtype, so none is needed.
    plugin = MixedPrecision(precision.name, device) if precision.mixed else WeightsAsTheyAre()  # type: ignore[arg-type]
    strategy = "ddp" if is_spread(devices, num_nodes) else "auto"
    fabric = Fabric(accelerator=device, devices=devices, num_nodes=num_nodes, strategy=strategy, plugins=plugin)
    fabric.launch()
    return fabric


def is_first_process(devices: int | str, num_nodes: int) -> bool:
    """Whether `launch` will give this process rank 0, whoever starts the others."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return not is_spread(devices, num_nodes) or all(os.environ.get(name, "0") == "0" for name in ranks)


def is_spread(devices: int | str, num_nodes: int) -> bool:
    """Whether a run has more than one process."""
    return num_nodes > 1 or devices not in (1, "1")


# Of a run for which compiling its blocks may be worth it: 94 s on an H100's slow host, for a fifth of a 7B model's step
# in one run, and for nothing in another (benchmarks/LOG.md).
COMPILED_STEPS = 2000


def wants_compile(choice: bool | Literal["auto"], device: str, n_steps: int) -> bool:
    """Whether blocks are to be compiled. `auto`: those of long runs on GPUs.

    On CPUs the bodies in C are faster than what torch's compiler makes (benchmarks/LOG.md).
    """
    return device == "cuda" and n_steps >= COMPILED_STEPS if choice == "auto" else choice


def change_blocks(model: "GPT", *, compiled: bool, checkpointed: bool) -> None:
    """Compile the blocks and checkpoint their activations, or one of both; what they compute stays."""
    if compiled:
        compile_blocks(model)
    if checkpointed:
        checkpoint_activations(model)


def keep_few_products() -> None:
    """Keep what the layers of a micro-batch need, 20 to 30: the blocks of each one kept cut the heap to pieces.

    To be called before the first product, where attention has none. A number that the user chose stays, but for `MANY`.
    """
    if os.environ[KEPT_PRODUCTS] == MANY:
        os.environ[KEPT_PRODUCTS] = FEW


def keep_memory() -> None:
    """Let malloc keep what a step frees, for the next one: the system would have to clear every page of it again.

    Only blocks of 32 MB and more, the most that glibc can be told, go back at once. Other systems are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3  # numbers of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)


def compile_blocks(model: "GPT") -> None:
    """Let torch's compiler fuse what stands between a block's attention and its products.

    One block's code serves them all and every length. Attention stays outside, since it splits each batch into other
    rows. To be called when the layers are what they will be.
    """
    from lit_gpt import attention

    attention.attend = torch.compiler.disable(attention.attend)
    for block in model.transformer.h:
        block.forward = torch.compile(block.forward, dynamic=True)


def checkpoint_activations(model: "GPT") -> None:
    """Keep one state per block instead of everything inside it, and run each block again on the way back.

    (Chen et al. 2016, arXiv:1604.06174.) Less memory, a third more work; the result is the same.
    """
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    def run(forward: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
        # Without a way back it would still look at random states, which fails where a GPU's kernels are recorded.
        if not torch.is_grad_enabled():
            return forward(*inputs)
        y: torch.Tensor = checkpoint(forward, *inputs, use_reentrant=False)
        return y

    for block in model.transformer.h:
        block.forward = partial(run, block.forward)


def autocast(precision: Precision, device: str) -> AbstractContextManager[object]:
    """What mixed precision needs around a model that Fabric has not wrapped."""
    return torch.autocast(device, precision.frozen) if precision.mixed else nullcontext()


def device_of_this_machine() -> torch.device:
    """Where a script that does not train runs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_memory_gb() -> float:
    """Peak memory of this process so far in GB: the GPU's, or the resident set's where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def resident_bytes() -> int:
    """What this process holds in the machine's memory now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def memory_limit_bytes(device: torch.device) -> int:
    """What a process may use: the GPU's memory, or the machine's (the container's, if that is less)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    cgroup = Path("/sys/fs/cgroup/memory.max")
    if cgroup.is_file() and (told := cgroup.read_text().strip()).isdigit():
        limits.append(int(told))
    return min(limits)


def quiet() -> None:
    """Silence what libraries say at start and a user can do nothing about."""
    for name in ("lightning_fabric", "lightning.fabric", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning_fabric")
    warnings.filterwarnings("ignore", message=".*srun.*")
