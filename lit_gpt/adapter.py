"""An adapter is a file that tells all that the next script needs to know of it; a wrong base is refused."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lit_gpt import checkpoint, files, lora
from lit_gpt.lora import LoRASettings
from lit_gpt.model import GPT

ADAPTER_TYPES = {
    "base_name": str,
    "base_fingerprint": str,
    "prompt_style": str,
    "precision": str,
    "quantize": str | None,
    "step": int,
}


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
        """Raises ValueError if the file is no adapter of this project, or one whose parts do not fit each other."""
        content = files.load_dict(path)
        try:
            settings = LoRASettings(**content["lora"])
            told = {name: content[name] for name in cls.__dataclass_fields__ if name not in ("state", "settings")}
            adapter = cls(dict(content["model"]), settings, **told)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no LoRA adapter written by finetune/lora.py (no {error})") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        for name, kind in ADAPTER_TYPES.items():
            if not isinstance(value := getattr(adapter, name), kind):
                raise ValueError(f"{path}: {name} cannot be of the type {type(value).__name__}")
        lora.check_factors(adapter.state, settings, path)
        return adapter

    def check_base(self, checkpoint_dir: Path, where: Path) -> None:
        """Raises ValueError if the adapter was trained on another base than this folder's."""
        if (found := checkpoint.fingerprint(checkpoint_dir)) != self.base_fingerprint:
            raise ValueError(
                f"{where} was trained on {self.base_name!r} ({self.base_fingerprint[:8]}), and {checkpoint_dir} holds "
                f"other weights ({found[:8]}); give the base that it was trained on as --checkpoint_dir"
            )

    def attach(self, model: GPT, checkpoint_dir: Path, where: Path) -> None:
        """Give the model these factors. Raises ValueError if they were trained on another base."""
        self.check_base(checkpoint_dir, where)
        lora.check_fit(model, self.settings, self.state, where)  # before memory is taken for factors of such a size
        lora.attach(model, self.settings)
        lora.load_adapter_state(model, self.state, where)
