"""A folder that holds weights in bitsandbytes' 4 bits, as transformers saves them, seen as one of full weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lit_gpt import quantization
from lit_gpt.quantization import Linear4bit
from lit_gpt.sources import TensorSource

STATE = ".quant_state.bitsandbytes__"  # between a weight's name and its levels, in the name of its description
MOST_BYTES = 1 << 16  # of a description, which is a line of JSON
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")  # what else lies beside a weight
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OTHERS = {  # `quant_method` in config.json -> how it keeps weights
    "bitsandbytes 8-bit": "whole numbers with a scale per row, and 16 bits for inputs that stand out",
    "gptq": "whole numbers with a scale and an offset per group, fitted to sample inputs",
    "awq": "whole numbers with a scale and an offset per group, the inputs scaled too",
    "compressed-tensors": "one of several layouts",
    "fp8": "8-bit floating point with a scale per tile",
    "fbgemm_fp8": "8-bit floating point with a scale per row",
    "mxfp4": "4-bit floating point with a scale for 32 numbers",
}


def parts(name: str, layer: Linear4bit, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A layer's tensors as transformers saves them, for a weight of that name which came from `dtype`."""
    state = {
        "quant_type": layer.levels,
        "blocksize": layer.block,
        "dtype": next((name for name, known in DTYPES.items() if known == dtype), "float32"),
        "shape": [layer.out_features, layer.in_features],
    }
    found = {name: layer.weight.detach(), f"{name}.absmax": layer.get_buffer("absmax"), f"{name}.quant_map": layer.code}
    if layer.kind.endswith("-dq"):
        state |= {"nested_blocksize": quantization.NESTED_BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = float(layer.get_buffer("offset"))
        found[f"{name}.nested_absmax"] = layer.get_buffer("nested_absmax")
        found[f"{name}.nested_quant_map"] = layer.nested_code
    description = bytearray(json.dumps(state).encode())
    return {**found, f"{name}{STATE}{layer.levels}": torch.frombuffer(description, dtype=torch.uint8)}


def check_readable(where: Path, hf_config: Mapping[str, Any]) -> None:
    """Raises ValueError for weights that were quantized otherwise than in bitsandbytes' 4 bits, as config.json says."""
    told = hf_config.get("quantization_config")
    if not isinstance(told, dict):
        return
    in_8bit = bool(told.get("load_in_8bit"))
    method = str(told.get("quant_method") or ("bitsandbytes" if "load_in_8bit" in told else "unnamed"))
    if method == "bitsandbytes" and in_8bit:
        method = "bitsandbytes 8-bit"
    if method != "bitsandbytes":
        layout = OTHERS.get(method, "a layout of its own")
        raise ValueError(
            f"{where} holds weights that are quantized already, by a method not read here: {method} ({layout}); "
            "download the unquantized model and use --quantize bnb.nf4, or one in bitsandbytes' 4 bits"
        )


class FourBitSource:
    """A `TensorSource` in which 4-bit weights have their plain names, full shapes, and the dtype that they came from.

    `read` gives them dequantized, in float32; `layer` as they are stored.
    """

    def __init__(self, inner: TensorSource):
        """Raises ValueError for a description that does not fit its tensors, or where bitsandbytes is not installed."""
        self.inner, self.where, self.is_lit = inner, inner.where, inner.is_lit
        library = quantization.import_bitsandbytes(f"{self.where} holds 4-bit weights, and reading them")
        self._map_of_scales: torch.Tensor = library.functional.create_dynamic_map()
        self.states: dict[str, dict[str, Any]] = {}
        metas = dict(inner.metas)
        for description in inner.metas:
            name, found, levels = description.partition(STATE)
            if found:
                try:
                    if inner.metas[description].numel() > MOST_BYTES:
                        raise ValueError(f"of {inner.metas[description].numel():,} bytes")
                    state = json.loads(bytes(inner.read(description).tolist()))
                    self.states[name] = self._checked(name, state, levels)
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    raise ValueError(f"{self.where}: {description} does not describe {name}: {error!r}") from error
                for part in (description, *(f"{name}.{leaf}" for leaf in PARTS)):
                    metas.pop(part, None)
                metas[name] = torch.empty(state["shape"], dtype=DTYPES[state["dtype"]], device="meta")
        self.metas: Mapping[str, torch.Tensor] = metas

    @staticmethod
    def holds(inner: TensorSource) -> bool:
        """Whether some of its weights are in 4 bits."""
        return any(STATE in name for name in inner.metas)

    def _checked(self, name: str, state: dict[str, Any], levels: str) -> dict[str, Any]:
        """The description, if it is of a kind that we know and the tensors have the sizes that it tells."""
        (n_out, n_in), block, nested = state["shape"], state["blocksize"], "nested_offset" in state
        if not all(isinstance(n, int) and n > 0 for n in (n_out, n_in, block)):
            raise ValueError(f"{n_out} by {n_in} numbers in blocks of {block}")
        n_scales = -(-n_out * n_in // block)
        sizes = {name: (n_out * n_in + 1) // 2, f"{name}.absmax": n_scales * (1 if nested else 4)}
        if nested:
            sizes[f"{name}.nested_absmax"] = -(-n_scales // quantization.NESTED_BLOCK) * 4
            known = torch.equal(self.inner.read(f"{name}.nested_quant_map"), self._map_of_scales)
            if not known or state["nested_blocksize"] != quantization.NESTED_BLOCK:
                raise ValueError("its scales are quantized in a way that is not known")
        if wrong := [part for part, n_bytes in sizes.items() if self.inner.metas[part].nbytes != n_bytes]:
            raise ValueError(f"{n_out} by {n_in} numbers in blocks of {block} do not fit {', '.join(wrong)}")
        if state["dtype"] not in DTYPES or levels not in ("nf4", "fp4"):
            raise ValueError(f"{levels} of {state['dtype']} is not known")
        offset = float(state["nested_offset"]) if nested else None
        return {**state, "kind": f"bnb.{levels}{'-dq' if nested else ''}", "nested_offset": offset}

    def layer(self, name: str) -> Linear4bit:
        """A layer of the weight as it is stored; nothing is copied."""
        state = self.states[name]
        layer = Linear4bit(state["shape"][1], state["shape"][0], state["kind"])
        layer.block = state["blocksize"]
        layer.load("weight", self.inner.read(name).view(torch.uint8).view(-1, 1))  # other dtypes are bytes all the same
        layer.load("absmax", self.inner.read(f"{name}.absmax"))
        if state["nested_offset"] is not None:
            layer.load("nested_absmax", self.inner.read(f"{name}.nested_absmax"))
            layer.load("offset", torch.tensor(state["nested_offset"]))
        return layer

    def read(self, name: str) -> torch.Tensor:
        return self.layer(name).dense(torch.float32) if name in self.states else self.inner.read(name)

    def release(self, name: str) -> None:
        self.inner.release(name)
