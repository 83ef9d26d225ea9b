"""Fine-tune language models with scripts that you can read.

The three names a reader types first are imported on use, so that `--help` does not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_gpt.config import Config as Config
    from lit_gpt.model import GPT as GPT
    from lit_gpt.tokenizer import Tokenizer as Tokenizer

__version__ = "0.1.0"

_HOME = {"GPT": "lit_gpt.model", "Config": "lit_gpt.config", "Tokenizer": "lit_gpt.tokenizer"}
__all__ = ["GPT", "Config", "Tokenizer", "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'lit_gpt' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
