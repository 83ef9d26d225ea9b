"""A checkpoint folder becomes a model: strictly, completely checked, a tensor at a time."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lit_gpt import files, quantization, surgery
from lit_gpt.config import Config
from lit_gpt.families import FAMILIES, read_hf_config
from lit_gpt.families.table import PLAIN, Step
from lit_gpt.interop import bnb
from lit_gpt.model import GPT, NORMS
from lit_gpt.quantization import Linear4bit, QuantizedLinear
from lit_gpt.sources import FolderSource, TensorSource


def save_config(folder: Path, config: Config) -> None:
    files.save_text(folder / files.LIT_CONFIG, json.dumps(config.to_dict(), indent=2) + "\n")


def load_config(folder: Path, *, original: bool = False) -> Config:
    """The architecture of a folder: `lit_config.json`, else (or if `original`) what HF's `config.json` says.

    Raises ValueError for an architecture that is not known, or HF weights that are quantized in a way that is not read.
    """
    files.checkpoint_folder(folder)
    if (folder / files.LIT_CONFIG).is_file() and not original:
        config = Config.from_file(folder / files.LIT_CONFIG)
        if config.family not in FAMILIES:
            raise ValueError(f"{folder / files.LIT_CONFIG}: unknown family {config.family!r}")
        return config
    if not (folder / files.HF_CONFIG).is_file():
        raise ValueError(
            f"{folder} holds neither {files.LIT_CONFIG} nor {files.HF_CONFIG}; run scripts/download.py again"
        )
    hf_config = files.read_json(folder / files.HF_CONFIG)
    if original or not (folder / files.LIT_MODEL).is_file():  # what HF's config says is not of that file
        bnb.check_readable(folder, hf_config)
    try:
        config = read_hf_config(hf_config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    config.name = folder.name
    return config


def open_folder(folder: Path, *, original: bool = False) -> TensorSource:
    """The weights of a folder of either kind, as `FolderSource` finds them; those in 4 bits look like full ones."""
    source = FolderSource(folder, original=original)
    return bnb.FourBitSource(source) if bnb.FourBitSource.holds(source) else source


def kept_kind(folder: Path) -> tuple[str | None, int]:
    """The 4-bit kind that most of a folder's layers are kept in already, and how many numbers were skipped.

    Those of layers in full that the kind would have in 4 bits. None and 0 if none are kept so, or weights are missing.
    """
    try:
        weights = Weights.from_folder(folder)
    except ValueError:  # said when they are loaded
        return None, 0
    if not isinstance(weights.source, bnb.FourBitSource):
        return None, 0
    states = weights.source.states
    kind, _ = Counter(str(state["kind"]) for state in states.values()).most_common(1)[0]
    wanted = quantizable(weights.config, kind)
    in_full = [name for step in weights.steps if step.theirs not in states for name in step.ours if name in wanted]
    return kind, sum(weights.metas[name].numel() for name in in_full)


class _NothingDrawn(TorchFunctionMode):
    """What has no memory needs no numbers to begin with; to draw them torch would import its compiler, for seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return kwargs["tensor"] if getattr(func, "__module__", None) == "torch.nn.init" else func(*args, **kwargs)


def hollow(config: Config) -> GPT:
    """The model without memory: every parameter on the meta device."""
    with torch.device("meta"), _NothingDrawn():
        return GPT(config)


def check_kind(config: Config, kind: str | None, where: object) -> None:
    """Raises ValueError if the kind asks for a head which is not there."""
    if kind and kind.endswith(quantization.HEAD) and config.tie_embeddings:
        raise ValueError(
            f"{where} has no head of its own to quantize: its embedding serves as one, and stays as it is; "
            f"use --quantize {kind.removesuffix(quantization.HEAD)}"
        )


def quantizable(config: Config, kind: str) -> set[str]:
    """The names of the weights that a kind quantizes."""
    modules = hollow(config).named_modules()
    return {f"{name}.weight" for name, module in modules if quantization.quantizable(name, module, kind)}


def parameter_metas(model: GPT) -> dict[str, torch.Tensor]:
    """Name to meta tensor of everything that a file must hold; a tied head is the embedding, not a thing of its own."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def plan(source: TensorSource, config: Config) -> list[Step]:
    """How the source's tensors fill the model that `config` describes.

    Raises one ValueError that lists every missing, unexpected and misshapen tensor.
    """
    least = sum(config.n_expert if config.has_experts(i) else 1 for i in range(config.n_layer))
    if least > len(source.metas):  # before a model of that many layers is built, if only on the meta device
        raise ValueError(
            f"{source.where} does not hold the weights that its config describes: {config.n_layer} layers "
            f"{f'of {config.n_expert} experts ' if config.n_expert else ''}and {len(source.metas)} tensors"
        )
    expected, is_lit, family = parameter_metas(hollow(config)), source.is_lit, FAMILIES[config.family]
    steps = [Step(name, (name,)) for name in expected] if is_lit else family.steps(config, expected)
    prefix = "" if is_lit else family.base_prefix
    if prefix and not any(name.startswith(prefix) for name in source.metas):  # saved without the head
        steps = [replace(step, theirs=step.theirs.removeprefix(prefix)) for step in steps]
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


class Weights:
    """A checkpoint's tensors under our names: checked at once, read one at a time."""

    def __init__(self, source: TensorSource, config: Config):
        """Raises ValueError as `plan` does."""
        if source.is_lit and "lm_head.weight" in source.metas:
            config.tie_embeddings = False  # ours is stored only where it differs, whatever config was copied here
        self.source, self.config = source, config
        self.steps = plan(source, config)
        self.metas: dict[str, torch.Tensor] = {
            name: meta
            for step in self.steps
            for name, meta in zip(step.ours, step.via.split(config, source.metas[step.theirs]), strict=True)
        }

    @classmethod
    def from_folder(cls, folder: Path) -> "Weights":
        """Of a folder of either kind."""
        config = load_config(folder)
        return cls(open_folder(folder), config)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for step in self.steps:
            yield from zip(step.ours, self._read(step), strict=True)
            self.source.release(step.theirs)

    def layers(
        self, kind: str | None, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, torch.Tensor | QuantizedLinear]]:
        """Like iteration, but a weight that is kept in few bits comes as the layer that holds it, on the device.

        With `kind` so come all that it quantizes, else those that the files keep in 4 bits, their numbers unchanged.
        Raises ValueError if the kind asks for a head which is not there.
        """
        check_kind(self.config, kind, self.source.where)
        wanted = quantizable(self.config, kind) if kind else set()
        for step in self.steps:
            for name, part in zip(step.ours, self._stored(step), strict=True):
                made: torch.Tensor | QuantizedLinear = part
                if kind and isinstance(made, Linear4bit) and not (name in wanted and made.is_of(kind)):
                    made = made.dense(torch.float32)
                if kind and name in wanted and isinstance(made, torch.Tensor):
                    made = quantization.quantize(made.to(device), kind)
                yield name, made.to(device) if isinstance(made, QuantizedLinear) else made
            self.source.release(step.theirs)

    def _read(self, step: Step) -> tuple[torch.Tensor, ...]:
        return step.via.split(self.config, self.source.read(step.theirs))

    def _stored(self, step: Step) -> Sequence[torch.Tensor | Linear4bit]:
        """What the step gives, in 4 bits where the files have it so; fused rows that are no whole blocks in full."""
        if isinstance(self.source, bnb.FourBitSource) and step.theirs in self.source.states:
            layer = self.source.layer(step.theirs)
            if step.via is PLAIN:
                return [layer]
            if layer.in_features % layer.block == 0:  # what splits rows splits their codes and scales alike
                return layer.split(partial(step.via.split, self.config))
        return self._read(step)


def load_model(
    folder: Path,
    dtype: torch.dtype | None,
    *,
    norm_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GPT:
    """The model of a checkpoint folder, frozen, filled tensor by tensor.

    Weights get `dtype` (None: as the files have them), those of the norms `norm_dtype` (default: the same); with
    `quantize`, one of `quantization.KINDS`, each linear layer is quantized as its weight arrives: no more than one is
    there in full. Without it, layers that the folder keeps in 4 bits stay as they are.
    `progress` hears the tensors placed and those to place. Raises ValueError as `plan` does.
    """
    norm_dtype = norm_dtype or dtype
    if quantize and _is_current(folder, quantize):
        return _load_quantized(folder, dtype, norm_dtype, device, quantize)
    weights = Weights.from_folder(folder)
    model = hollow(weights.config)
    for done, (name, part) in enumerate(weights.layers(quantize, device), start=1):
        if isinstance(part, QuantizedLinear):
            surgery.put(model, name.removesuffix(".weight"), part)
        else:
            place(model, name, part, dtype, norm_dtype, device)
        progress(done, len(weights.metas))
    model.tie()
    return model


def load_by_block(
    folder: Path, dtype: torch.dtype, ran: Callable[[], None] = lambda: None, *, device: torch.device | str = "cpu"
) -> GPT:
    """The model of a checkpoint folder, each part of which gets its weights when it runs and gives them up after.

    For one look at a model that memory does not hold: only one block is there at a time, read anew for each pass.
    `ran` is called after each of the blocks.
    """
    weights = Weights.from_folder(folder)
    model, tied = hollow(weights.config).to(dtype).requires_grad_(False), weights.config.tie_embeddings
    names = ["wte", "wpe", *(f"h.{layer}" for layer in range(weights.config.n_layer)), "ln_f"]
    parts = [f"transformer.{name}" for name in names if name != "wpe" or weights.config.learned_positions] + ["lm_head"]
    for prefix in parts:
        steps = [step for step in weights.steps if step.ours[0].startswith(f"{prefix}.")]
        owners = {name: model.get_submodule(name.rpartition(".")[0]) for step in steps for name in step.ours}
        if prefix == "lm_head" and tied:
            steps += [step for step in weights.steps if step.ours[0] == "transformer.wte.weight"]
            owners["transformer.wte.weight"] = model.lm_head
        part = model.get_submodule(prefix)
        part.register_forward_pre_hook(partial(_bring, weights, steps, owners, dtype, device))
        part.register_forward_hook(partial(_take_away, owners, ran if ".h." in prefix else lambda: None))
    return model


def _bring(
    weights: Weights,
    steps: list[Step],
    owners: dict[str, nn.Module],
    dtype: torch.dtype,
    device: torch.device | str,
    *hooked: object,
) -> None:
    for step in steps:
        for name, tensor in zip(step.ours, weights._read(step), strict=True):
            parameter = nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=False)
            setattr(owners[name], name.rpartition(".")[2], parameter)
        weights.source.release(step.theirs)


def _take_away(owners: dict[str, nn.Module], ran: Callable[[], None], *hooked: object) -> None:
    for name, owner in owners.items():
        leaf = name.rpartition(".")[2]
        setattr(owner, leaf, nn.Parameter(getattr(owner, leaf).to("meta"), requires_grad=False))
    ran()


def place(
    model: GPT,
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype | None,
    norm_dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Give the model a tensor of that name, in a dtype or its own."""
    owner, leaf = name.rsplit(".", 1)
    module = model.get_submodule(owner)
    if isinstance(module, QuantizedLinear) and leaf != "bias":
        module.load(leaf, tensor.to(device))
        return
    # Where nothing changes the file stays mapped: pages are read when they are used, and never written back.
    placed = tensor.to(device, (norm_dtype if isinstance(module, tuple(NORMS.values())) else dtype) or tensor.dtype)
    setattr(module, leaf, nn.Parameter(placed.contiguous(), requires_grad=False))


def save_quantized(folder: Path, quantize: str, progress: Callable[[int, int], None]) -> Path:
    """Keep the quantized weights beside the checkpoint, for an instant start; the file may be deleted at any time."""
    model = load_model(folder, None, quantize=quantize, progress=progress)  # what is not quantized as it was
    state = model.state_dict()
    if model.config.tie_embeddings:
        del state["lm_head.weight"]
    path = folder / files.quantized_name(quantize)
    files.save(path, {"made_from": _made_from(folder), "weights": dict(state)})
    return path


def _load_quantized(
    folder: Path, dtype: torch.dtype | None, norm_dtype: torch.dtype | None, device: torch.device | str, quantize: str
) -> GPT:
    model, path = hollow(load_config(folder)), folder / files.quantized_name(quantize)
    state = files.load_dict(path, mmap=True).get("weights")
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path} holds no quantized weights; delete it")
    model.config.tie_embeddings = "lm_head.weight" not in state
    expected: dict[str, tuple[torch.Size | tuple[int, ...], torch.dtype | None]] = {
        name: (meta.shape, None) for name, meta in parameter_metas(model).items()
    }
    if not model.config.tie_embeddings:
        expected["lm_head.weight"] = (model.lm_head.weight.shape, None)
    for owner, module in list(model.named_modules()):
        if quantization.quantizable(owner, module, quantize):
            layer = quantization.empty(module.in_features, module.out_features, quantize)
            surgery.put(model, owner, layer)
            del expected[f"{owner}.weight"]
            expected |= {f"{owner}.{leaf}": layout for leaf, layout in layer.layout().items()}
    wrong = [
        name
        for name, (shape, dtype) in expected.items()
        if name not in state
        or state[name].shape != shape
        or not (state[name].dtype == dtype if dtype else state[name].is_floating_point())
    ]
    if wrong := sorted(map(str, {*wrong, *(set(state) - set(expected))})):
        raise ValueError(f"{path} does not fit its folder's model ({', '.join(wrong[:6])}); delete it")
    for name, tensor in state.items():
        place(model, name, tensor, dtype, norm_dtype, device)
    model.tie()
    return model


def _made_from(folder: Path) -> str:
    """What the weights' files look like: changes when they do."""
    stats = [(file.name, file.stat()) for file in FolderSource(folder).files]
    return json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])


def _is_current(folder: Path, quantize: str) -> bool:
    path = folder / files.quantized_name(quantize)
    return path.is_file() and files.load_dict(files.own(path), mmap=True).get("made_from") == _made_from(folder)


def unfreeze(model: GPT) -> None:
    """Make every weight trainable, each in memory of its own instead of a mapped file.

    Raises ValueError for a model with layers in few bits.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError(
            f"{model.config.name} has weights in 4 bits, which cannot be trained: train an adapter with "
            "finetune/lora.py, or take the full model (scripts/convert_hf_checkpoint.py makes one of an HF folder)"
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)


def save_model(path: Path, model: GPT, base_dir: Path, style: str, dtype: torch.dtype | None = None) -> None:
    """Write a plain model's weights as `path`, and beside them all that makes its folder a complete checkpoint."""
    parameters = parameter_metas(model)
    metas = {name: torch.empty(p.shape, dtype=dtype or p.dtype, device="meta") for name, p in parameters.items()}
    files.save_streamed(path, metas, parameters.items())
    complete_folder(path.parent, model.config, base_dir, style)


def complete_folder(folder: Path, config: Config, base_dir: Path, style: str | None) -> None:
    """Put beside new weights what the scripts that follow need: config, tokenizer, prompt style (none of a base)."""
    files.copy_companions(base_dir, folder)
    save_config(folder, config)
    if style is None:
        (folder / files.PROMPT_STYLE).unlink(missing_ok=True)
    else:
        files.save_text(folder / files.PROMPT_STYLE, json.dumps({"prompt_style": style}) + "\n")


def prompt_style(folder: Path) -> str | None:
    """The style that a fine-tuned model's folder says it was trained with; None for a base."""
    path = folder / files.PROMPT_STYLE
    return str(files.read_json(path).get("prompt_style")) if path.is_file() else None


def fingerprint(folder: Path) -> str:
    """Tells two bases apart by a sample of each tensor, rounded: neither the files' layout nor their dtype matters."""
    samples = {}
    weights = Weights.from_folder(folder)
    for name, part in weights.layers(None):
        meta = weights.metas[name]
        where = torch.arange(0, meta.numel(), max(1, meta.numel() // 64))
        picked = part.at(where) if isinstance(part, QuantizedLinear) else part.flatten()[where]
        picked = picked.to(meta.dtype).to(torch.bfloat16)  # 4-bit weights are rounded as a converted file has them
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
    weights = Weights(source, config)
    metas = {name: meta.to(dtype or meta.dtype) for name, meta in weights.metas.items()}
    total = sum(meta.nbytes for meta in metas.values())

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        done = 0
        for name, tensor in weights:
            yield name, tensor
            done += metas[name].nbytes
            progress(done, total)

    files.save_streamed(folder / files.LIT_MODEL, metas, counted())
    save_config(folder, config)
