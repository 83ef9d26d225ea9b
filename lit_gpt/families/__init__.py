"""One file per model family. Adding a family is adding a file here and its name to `FAMILIES`."""

from lit_gpt.config import Config
from lit_gpt.families import llama, neox
from lit_gpt.families.table import Family, HFConfig

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in (llama, neox)}


def read_hf_config(hf: HFConfig) -> Config:
    """The Config that an HF `config.json` describes. Raises ValueError for an architecture that is not known."""
    model_type = hf.get("model_type")
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family.read(hf)
    known = sorted(name for family in FAMILIES.values() for name in family.model_types)
    raise ValueError(f"config.json: unknown model_type {model_type!r}; known are {', '.join(known)}")


def preset_names() -> list[str]:
    """Repositories whose architecture is known without a download."""
    return [name for family in FAMILIES.values() for name in family.presets]
