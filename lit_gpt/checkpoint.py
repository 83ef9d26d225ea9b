"""A checkpoint folder becomes a model, and an adapter a file: strictly, completely checked, a tensor at a time."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from lit_gpt import files, lora
from lit_gpt.config import Config
from lit_gpt.families import FAMILIES, read_hf_config
from lit_gpt.families.table import Step
from lit_gpt.files import FolderSource, TensorSource
from lit_gpt.lora import LoRASettings
from lit_gpt.model import GPT, NORMS


def save_config(folder: Path, config: Config) -> None:
    files.save_text(folder / files.LIT_CONFIG, json.dumps(config.to_dict(), indent=2) + "\n")


def load_config(folder: Path, *, original: bool = False) -> Config:
    """The architecture of a folder: `lit_config.json`, else (or if `original`) what HF's `config.json` says."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; download a checkpoint with scripts/download.py")
    if (folder / files.LIT_CONFIG).is_file() and not original:
        return Config.from_file(folder / files.LIT_CONFIG)
    if not (folder / files.HF_CONFIG).is_file():
        raise ValueError(
            f"{folder} holds neither {files.LIT_CONFIG} nor {files.HF_CONFIG}; run scripts/download.py again"
        )
    try:
        config = read_hf_config(files.read_json(folder / files.HF_CONFIG))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder}: {error}") from error
    config.name = folder.name
    return config


def hollow(config: Config) -> GPT:
    """The model without memory: every parameter on the meta device."""
    with torch.device("meta"):
        return GPT(config)


def parameter_metas(model: GPT) -> dict[str, torch.Tensor]:
    """Name to meta tensor of everything that a file must hold; a tied head is the embedding, not a thing of its own."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def plan(source: TensorSource, config: Config) -> list[Step]:
    """How the source's tensors fill the model that `config` describes.

    Raises one ValueError that lists every missing, unexpected and misshapen tensor.
    """
    expected, is_lit, family = parameter_metas(hollow(config)), source.is_lit, FAMILIES[config.family]
    steps = [Step(name, (name,)) for name in expected] if is_lit else family.steps(config, expected)
    read = {step.theirs for step in steps}
    missing = sorted(read - set(source.metas)) + sorted(set(expected) - {name for step in steps for name in step.ours})
    ignored = {"lm_head.weight", "embed_out.weight"} if config.tie_embeddings else set()
    extra = [n for n in sorted(set(source.metas) - read - ignored) if is_lit or not family.drops(n)]
    wrong = []
    for step in steps:
        if step.theirs in source.metas:
            wrong += _misshapen(step, config, source.metas[step.theirs], expected)
    if missing or extra or wrong:
        lists = [
            f"{label}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
            for label, names in (("missing", missing), ("unexpected", extra), ("wrong shape", wrong))
            if names
        ]
        raise ValueError(f"{source.where} does not hold the weights that its config describes; {'; '.join(lists)}")
    return steps


def _misshapen(step: Step, config: Config, theirs: torch.Tensor, expected: Mapping[str, torch.Tensor]) -> list[str]:
    try:
        parts = step.via.split(config, theirs)
    except RuntimeError:
        return [f"{step.theirs} {tuple(theirs.shape)}"]
    return [
        f"{step.theirs} {tuple(part.shape)} instead of {tuple(expected[name].shape)}"
        for name, part in zip(step.ours, parts, strict=True)
        if name in expected and part.shape != expected[name].shape
    ]


def stream(source: TensorSource, config: Config, steps: Iterable[Step]) -> Iterator[tuple[str, torch.Tensor]]:
    """Our names and tensors, one of theirs in memory at a time."""
    for step in steps:
        yield from zip(step.ours, step.via.split(config, source.read(step.theirs)), strict=True)


def open_folder(folder: Path) -> tuple[Config, Iterator[tuple[str, torch.Tensor]]]:
    """A checkpoint folder of either kind: its architecture and a stream of its weights, checked before it starts."""
    config, source = load_config(folder), FolderSource(folder)
    return config, stream(source, config, plan(source, config))


def load_model(
    folder: Path,
    dtype: torch.dtype,
    *,
    norm_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> GPT:
    """The model of a checkpoint folder, frozen, filled tensor by tensor.

    Weights get `dtype`, those of the norms `norm_dtype` (default: the same). Raises ValueError as `plan` does.
    """
    config, tensors = open_folder(folder)
    model = hollow(config)
    norms = {name for name, module in model.named_modules() if isinstance(module, tuple(NORMS.values()))}
    for name, tensor in tensors:
        owner, leaf = name.rsplit(".", 1)
        kind = norm_dtype if norm_dtype is not None and owner in norms else dtype
        # Where nothing changes the file stays mapped: pages are read when they are used, and never written back.
        placed = tensor.to(device, kind)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(placed, requires_grad=False))
    model.tie()
    return model


def unfreeze(model: GPT) -> None:
    """Make every weight trainable, each in memory of its own instead of a mapped file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)


def save_model(path: Path, model: GPT, base_dir: Path, prompt_style: str, dtype: torch.dtype | None = None) -> None:
    """Write a plain model's weights as `path`, and beside them all that makes its folder a complete checkpoint."""
    expected = parameter_metas(model)
    metas = {name: torch.empty(p.shape, dtype=dtype or p.dtype, device="meta") for name, p in expected.items()}
    files.save_streamed(path, metas, expected.items())
    files.copy_companions(base_dir, path.parent)
    save_config(path.parent, model.config)
    files.save_text(path.parent / files.PROMPT_STYLE, json.dumps({"prompt_style": prompt_style}) + "\n")


def prompt_style(folder: Path) -> str | None:
    """The style that a fine-tuned model's folder says it was trained with; None for a base."""
    path = folder / files.PROMPT_STYLE
    return str(files.read_json(path).get("prompt_style")) if path.is_file() else None


def fingerprint(folder: Path) -> str:
    """Tells two bases apart by a sample of each tensor, rounded: neither the files' layout nor their dtype matters."""
    _, tensors = open_folder(folder)
    samples = {}
    for name, tensor in tensors:
        picked = tensor.flatten()[:: max(1, tensor.numel() // 64)].to(torch.bfloat16)
        samples[name] = picked.contiguous().view(torch.int16).numpy().tobytes()
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(name.encode() + samples[name])
    return digest.hexdigest()[:32]


def convert(
    source: TensorSource,
    config: Config,
    folder: Path,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write `lit_model.pth` and `lit_config.json` into `folder`, in `dtype` or the source's own.

    `progress` hears the bytes written so far and those to write.
    """
    steps = plan(source, config)
    metas: dict[str, torch.Tensor] = {}
    for step in steps:
        parts = step.via.split(config, source.metas[step.theirs])
        metas |= {name: part.to(dtype or part.dtype) for name, part in zip(step.ours, parts, strict=True)}
    total = sum(meta.nbytes for meta in metas.values())

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        done = 0
        for name, tensor in stream(source, config, steps):
            yield name, tensor
            done += metas[name].nbytes
            progress(done, total)

    files.save_streamed(folder / files.LIT_MODEL, metas, counted())
    save_config(folder, config)


# --- adapters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter and all that the next script needs to know of it; one file."""

    state: dict[str, torch.Tensor]
    settings: LoRASettings
    base_name: str
    base_fingerprint: str
    prompt_style: str
    precision: str
    quantize: str | None
    step: int

    def save(self, path: Path) -> None:
        from lit_gpt import __version__

        told = {name: value for name, value in asdict(self).items() if name not in ("state", "settings")}
        versions = {"lit_gpt": __version__, "torch": str(torch.__version__)}
        files.save(path, {"model": self.state, "lora": self.settings.to_dict(), **told, "versions": versions})

    @classmethod
    def load(cls, path: Path) -> "Adapter":
        """Raises ValueError if the file is no adapter of this project."""
        content = files.load_dict(path)
        try:
            settings = LoRASettings(**content["lora"])
            told = {name: content[name] for name in cls.__dataclass_fields__ if name not in ("state", "settings")}
            return cls(dict(content["model"]), settings, **told)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no LoRA adapter written by finetune/lora.py (no {error})") from error

    def attach(self, model: GPT, checkpoint_dir: Path, where: Path) -> None:
        """Give the model these factors. Raises ValueError if they were trained on another base."""
        if (found := fingerprint(checkpoint_dir)) != self.base_fingerprint:
            raise ValueError(
                f"{where} was trained on {self.base_name!r} ({self.base_fingerprint[:8]}), and {checkpoint_dir} holds "
                f"other weights ({found[:8]}); give the base that it was trained on as --checkpoint_dir"
            )
        lora.attach(model, self.settings)
        lora.load_adapter_state(model, self.state, where)
