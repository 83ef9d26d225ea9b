"""4-bit weights whose codes are chosen by what layers are asked, not each number by itself (GPTQ, arXiv:2210.17323).

Rounding a weight to the nearest level is best if inputs know nothing of each other. They do: what one weight's rounding
adds to the output, later ones can take back, and later layers some of what is lost then. The scales stay those that
plain quantization finds, so that every 4-bit kind, layer and kernel works as before.
"""

import fnmatch
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_gpt import checkpoint, files, quantization, sources
from lit_gpt.config import Config
from lit_gpt.data import open_prepared
from lit_gpt.interop import bnb
from lit_gpt.quantization import Linear4bit, levels_of
from lit_gpt.runtime import device_of_this_machine, resolve_precision
from lit_gpt.tokenizer import Tokenizer

DAMPING = 0.01  # of the mean second moment, added to each input's: rows cannot tell inputs apart that go together
RIDGE = 0.5  # likewise, where a weight makes up for others; nearer to 0 it learns the rows by heart (benchmarks/LOG.md)
AT_ONCE = 64  # inputs whose errors reach the later ones in one product
WIDE_AT_ONCE = 4096  # tokens whose numbers are in float32


@dataclass
class Errors:
    """Squared errors of the layers' outputs on the rows, each as a share of the output aimed at, summed over layers."""

    nearest: float = 0.0
    chosen: float = 0.0
    n_layers: int = 0

    def add(self, aim: torch.Tensor, moments: torch.Tensor, nearest: torch.Tensor, chosen: torch.Tensor) -> None:
        """Of one layer: the weight aimed at and two others (out, in), float32; and its inputs' moments (in, in)."""

        def size(matrix: torch.Tensor) -> float:  # of its outputs: the trace of M H M^T
            return float(((matrix @ moments) * matrix).sum())

        whole = size(aim)
        if whole > 0:
            self.nearest += size(aim - nearest) / whole
            self.chosen += size(aim - chosen) / whole
            self.n_layers += 1

    def __str__(self) -> str:
        """Roots of the means, in per cent."""
        chosen, nearest = ((error / max(self.n_layers, 1)) ** 0.5 for error in (self.chosen, self.nearest))
        return f"{chosen:.1%} of what layers should compute on these rows, {nearest:.1%} with the nearest codes"


def choose_codes(layer: Linear4bit, weight: torch.Tensor, moments: torch.Tensor) -> None:
    """Give the quantized layer codes with which its outputs, not its numbers, are near those of `weight` (out, in).

    `moments` (in, in) are the sums of products of its inputs, float32. The weights of one input are rounded after those
    of another, the largest first; what that changes is made up for by the inputs still to come (algorithm 1 of the
    paper, whose upper factor of the inverse is R^-1 for H = R R^T, R upper). Without inputs nothing is changed.
    """
    if not bool(moments.any()):
        return
    levels, at = levels_of(layer.levels, weight.device).sort()
    between = (levels[1:] + levels[:-1]) / 2
    scales = layer.scales().repeat_interleave(layer.block)[: weight.numel()].view(weight.shape)
    order = moments.diagonal().argsort(descending=True)
    left, scales = (matrix.float().t()[order].contiguous() for matrix in (weight, scales))  # (in, out)
    passed_on = _passed_on(moments[order[:, None], order])
    codes = torch.empty_like(left, dtype=torch.uint8)
    for begin in range(0, len(left), AT_ONCE):
        end = min(begin + AT_ONCE, len(left))
        errors = torch.empty_like(left[begin:end])
        for i in range(begin, end):
            now = left[i] - passed_on[begin:i, i] @ errors[: i - begin]
            code = torch.bucketize(now / scales[i].clamp(min=1e-38), between)
            codes[i] = at[code]
            errors[i - begin] = (now - levels[code] * scales[i]) / passed_on[i, i]
        left[end:] -= passed_on[begin:end, end:].t() @ errors
    flat = torch.empty_like(codes).index_copy_(0, order, codes).t().flatten()
    pairs = nn.functional.pad(flat, (0, len(flat) % 2)).view(-1, 2)
    layer.load("weight", ((pairs[:, :1] << 4) | pairs[:, 1:]).contiguous())


def aimed_at(weight: torch.Tensor, moments: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
    """The weight (out, in) that takes back what the layers before have lost (asymmetric calibration, arXiv:2504.02692).

    Its outputs are nearest to those that `weight` has in the full model, at a price for each step away from that: ridge
    regression, W + W D (H + ridge)^-1. H are the `moments`, the sums of products x x^T of the inputs; D is `lost`
    (in, in), those of (full - x) x^T.
    """
    if not bool(lost.any()):
        return weight
    damped = moments.clone()
    damped.diagonal().add_(RIDGE * moments.diagonal().mean())
    return weight + torch.cholesky_solve((weight @ lost).t(), torch.linalg.cholesky(damped)).t()


def _passed_on(moments: torch.Tensor) -> torch.Tensor:
    """The upper factor of the inverse of the damped moments."""
    damped = moments.flip(0, 1)
    damped.diagonal().add_(DAMPING * moments.diagonal().mean())
    factor = torch.linalg.cholesky(damped).flip(0, 1)
    one = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, one, upper=True)


def products_of(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Sums over the n of products of two inputs (..., in) of a layer, (in, in) float32."""
    total = torch.zeros(left.shape[-1], left.shape[-1], device=left.device)
    for some, others in zip(*(x.flatten(0, -2).split(WIDE_AT_ONCE) for x in (left, right)), strict=True):
        total.addmm_(some.float().t(), others.float())
    return total


def open_rows(checkpoint_dir: Path, data_dirs: Sequence[Path], n_tokens: int, seed: int) -> list[torch.Tensor]:
    """Training rows (T,) of prepared sets, drawn until each gave its share of tokens; ValueError as `open_prepared`."""
    if n_tokens < 1:
        raise ValueError(f"--calibration_tokens must be at least 1, not {n_tokens}")
    config, tokenizer = checkpoint.load_config(checkpoint_dir), Tokenizer(checkpoint_dir)
    rows: list[torch.Tensor] = []
    for folder in data_dirs:
        training, _, _ = open_prepared(folder, tokenizer, config.block_size, config.vocab_size)
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))
        n_rows = int((training.lengths()[order].cumsum(0) < n_tokens // len(data_dirs)).sum()) + 1
        rows += [training.row(index)[0] for index in order[:n_rows].tolist()]
    return rows


class _Choosing:
    """Hooks of a model that rows are passing: each block runs as in the full model, then with layers quantized.

    A layer is quantized when its inputs are there that the quantized ones before it made. One that is skipped only
    takes back what those have lost.
    """

    def __init__(self, folder: Path, kind: str, skip: Collection[str]):
        self.folder, self.kind, self.skip = folder, kind, skip
        self.weights: dict[str, Linear4bit | torch.Tensor] = {}
        self.errors = Errors()
        self.state: torch.Tensor | None = None  # of the full model, after the last block
        self.is_full = False
        self.inputs: dict[str, torch.Tensor] = {}  # in the full model, of layers still to come
        self.given: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # of the last layer; some share them

    def begin(self, block: nn.Module, arguments: tuple[Any, ...]) -> None:
        x, *others = arguments
        self.given, self.is_full = None, True
        self.state = block.forward(x if self.state is None else self.state, *others)
        self.is_full = False

    def choose(self, name: str, linear: nn.Linear, arguments: tuple[torch.Tensor]) -> None:
        x = arguments[0]
        if self.is_full:
            if x.ndim == 3:  # experts are given some tokens only, and the quantized ones others
                self.inputs[name] = x
            return
        full = self.inputs.pop(name, None)
        if self.given is None or self.given[0] is not x:
            moments = products_of(x, x)
            self.given = x, moments, torch.zeros_like(moments) if full is None else products_of(full, x) - moments
        _, moments, lost = self.given
        weight, dtype = linear.weight.detach(), linear.weight.dtype
        if not bool((moments + lost).isfinite().all()):
            raise ValueError(f"{self.folder}: on these rows {name} is given numbers that are not finite in {dtype}")
        aim = aimed_at(weight.float(), moments, lost)
        if f"{name}.weight" in self.skip:
            linear.weight.data = aim.to(dtype)
            self.weights[f"{name}.weight"] = linear.weight.data.cpu()
            return
        layer = quantize(weight, self.kind)
        before = layer.dense(torch.float32)
        choose_codes(layer, aim, moments)
        after = layer.dense(torch.float32)
        self.errors.add(aim, moments, before, after)
        linear.weight.data = after.to(dtype)
        self.weights[f"{name}.weight"] = layer.cpu()


def quantize(weight: torch.Tensor, kind: str) -> Linear4bit:
    """A layer with the nearest codes."""
    layer = quantization.quantize(weight, kind)
    assert isinstance(layer, Linear4bit)
    return layer


def calibrate(
    folder: Path,
    kind: str,
    rows: Sequence[torch.Tensor],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    ran: Callable[[], None] = lambda: None,
    skip: Collection[str] = (),
) -> tuple[dict[str, Linear4bit | torch.Tensor], Errors]:
    """Layers of a checkpoint in a 4-bit kind, by their weights' names, and how far off they are.

    One pass of the rows (T,), laid end to end, through the model: each layer is quantized when it is first used, so
    that it sees what the quantized ones before it give, beside what it would see in the full model. One block's weights
    are there at a time, in `dtype`, from which they are quantized; `ran` is called after each. Experts that no token
    goes to keep the nearest codes. Of the weights to `skip` come full ones, in `dtype`, that take back what was lost
    before them; experts', which other tokens go to then, stay as they were. Raises ValueError where the rows make
    numbers that are not finite.
    """
    model = checkpoint.load_by_block(folder, dtype, ran, device=device)
    names = [name for name, module in model.named_modules() if quantization.quantizable(name, module, kind)]
    choosing = _Choosing(folder, kind, skip)
    for block in model.transformer.h:
        block.register_forward_pre_hook(choosing.begin)
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(partial(choosing.choose, name))
    lengths = [len(row) for row in rows]
    with torch.no_grad():
        model.transformer(torch.cat(list(rows))[None].to(device), lengths)
    found = choosing.weights
    if unasked := {f"{name}.weight" for name in names} - set(skip) - set(found):
        for name, weight in checkpoint.Weights.from_folder(folder):
            if name in unasked:
                found[name] = quantize(weight, kind)
    return found, choosing.errors


def named(config: Config, kind: str, parts: Sequence[str]) -> set[str]:
    """The names of weights in which one of the parts is, such as `mlp.proj`, `h.0` for a block or `experts.*.up`.

    Raises ValueError for a part that is in none, or if all weights that the kind quantizes are named.
    """
    names = checkpoint.quantizable(config, kind)
    found: set[str] = set()
    for part in parts:
        of_part = set(fnmatch.filter(names, f"*.{part}.*"))
        if not of_part:
            known = sorted({re.sub(r"\.\d+\.", ".*.", name.split(".", 3)[3]).removesuffix(".weight") for name in names})
            raise ValueError(
                f"--skip_modules {part!r}: no layer is called so; there are h.0 to h.{config.n_layer - 1}, and in them "
                f'{", ".join(known)}; several are named as "[mlp.proj,h.0]"'
            )
        found |= of_part
    if found == names:
        raise ValueError(f"--skip_modules {' '.join(parts)} leaves nothing to quantize; name fewer")
    return found


def write(
    source_dir: Path,
    kind: str,
    rows: Sequence[torch.Tensor],
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    dtype: torch.dtype | None = None,
    skip: Sequence[str] = (),
) -> Errors:
    """Write `folder`, a complete checkpoint whose `lit_model.pth` holds the calibrated layers, all else as it was.

    A weight in 4 bits lies there as transformers saves it, under our names; those that have one of the parts `skip` in
    their names are in full. `dtype` is what the rows are run in, by default this machine's best. `progress` hears the
    blocks done and all. Raises ValueError for a kind in which there is nothing to choose, a source in 4 bits, a folder
    that holds weights, or a part that is in no name.
    """
    if kind == "bnb.int8" or kind.endswith(quantization.HEAD):
        raise ValueError(f"rows choose the 4-bit codes of the blocks' layers; --quantize {kind} has others")
    kept, _ = checkpoint.kept_kind(source_dir)
    if kept:
        raise ValueError(f"{source_dir} is in 4 bits already ({kept}); take the full weights that it was made from")
    sources.refuse_if_weights(folder, "--out_dir")
    weights = checkpoint.Weights.from_folder(source_dir)
    skipped = named(weights.config, kind, skip)
    folder.mkdir(parents=True, exist_ok=True)  # fails now, not after minutes
    n_blocks, done = weights.config.n_layer, count(1)
    dtype, device = dtype or resolve_precision(None, training=False).frozen, device_of_this_machine()
    chosen, errors = calibrate(source_dir, kind, rows, dtype, device, lambda: progress(next(done), n_blocks), skipped)
    dtypes = {name: weights.metas[name].dtype for name in chosen}
    parts = {
        name: bnb.parts(name, made, dtypes[name]) if isinstance(made, Linear4bit) else {name: made.to(dtypes[name])}
        for name, made in chosen.items()
    }
    metas = {name: meta for name, meta in weights.metas.items() if name not in parts}
    metas |= {name: tensor.to("meta") for part in parts.values() for name, tensor in part.items()}
    everything = (parts.get(name, {name: tensor}).items() for name, tensor in weights)
    files.save_streamed(folder / files.LIT_MODEL, metas, (item for items in everything for item in items))
    checkpoint.complete_folder(folder, weights.config, source_dir, checkpoint.prompt_style(source_dir))
    return errors
