"""One file per model family. Adding a family is adding a file here and a line to `FAMILIES`."""

import sys

from lit_gpt.config import Config
from lit_gpt.families import (
    falcon,
    gemma,
    gpt2,
    granite,
    llama,
    mistral,
    mixtral,
    neox,
    olmo,
    phi,
    phi3,
    qwen2,
    qwen3,
    smollm3,
    stablelm,
)
from lit_gpt.families.table import Family, HFConfig, check_types

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        neox.FAMILY,
        falcon.FAMILY,
        falcon.GROUPED,
        llama.FAMILY,
        mistral.FAMILY,
        mixtral.FAMILY,
        phi.FAMILY,
        phi3.FAMILY,
        gemma.FAMILY,
        gemma.FAMILY_2,
        gemma.FAMILY_3,
        qwen2.FAMILY,
        qwen3.FAMILY,
        stablelm.FAMILY,
        olmo.FAMILY,
        olmo.FAMILY_2,
        gpt2.FAMILY,
        smollm3.FAMILY,
        granite.FAMILY,
    )
}
ALIASES = {  # the original's names of repositories that are called otherwise
    "tiny-llama-1.1b": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "tiny-llama-1.1bchat": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "tiny-llama-1.1b-chat": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}


def read_hf_config(hf: HFConfig) -> Config:
    """The Config that an HF `config.json` describes.

    Raises ValueError for an architecture that is not known, and for sizes and settings that make no model.
    """
    check_types(hf)
    model_type = hf.get("model_type")
    for family in FAMILIES.values():
        if model_type in family.model_types:
            try:
                return family.read(hf)
            except (ArithmeticError, KeyError, TypeError) as error:  # numbers beyond all bounds; a nested key or type
                raise ValueError(f"config.json makes no sense ({type(error).__name__}: {error})") from error
    known = sorted(name for family in FAMILIES.values() for name in family.model_types)
    raise ValueError(f"config.json: unknown model_type {model_type!r}; known are {', '.join(known)}")


def preset_names() -> list[str]:
    """Repositories whose architecture is known without a download."""
    return [name for family in FAMILIES.values() for name in family.presets]


def preset(name: str) -> Config:
    """The Config of a known repository, with or without its organisation; else ValueError with names that are near."""
    wanted = ALIASES.get(name, name)
    for family in FAMILIES.values():
        for repository, hf in family.presets.items():
            if wanted in (repository, repository.split("/")[-1]):
                config = family.read({"model_type": family.model_types[0], **hf})
                config.name = repository.split("/")[-1]
                return config
    from difflib import get_close_matches

    short = [repository.split("/")[-1] for repository in preset_names()]
    near = get_close_matches(name.split("/")[-1], short, n=3, cutoff=0.4)
    raise ValueError(
        f"no preset is named {name!r}; near it are {', '.join(near) or 'none'}; scripts/download.py lists all"
    )


def table() -> str:
    """The families as a Markdown table, for the README: a row per file."""
    by_file: dict[str, list[Family]] = {}
    for family in FAMILIES.values():
        by_file.setdefault(str(sys.modules[family.read.__module__].__doc__).strip(), []).append(family)
    lines = ["| family | `model_type` in config.json | known names |", "|---|---|---|"]
    for description, families in by_file.items():
        types = ", ".join(name for family in families for name in family.model_types)
        lines.append(f"| {description.rstrip('.')} | {types} | {sum(len(family.presets) for family in families)} |")
    return "\n".join(lines)
