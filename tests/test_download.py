"""Downloads from a hub of our own, on this machine, that breaks off and damages as a network does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, STORIES

from lit_gpt import checkpoint, files
from lit_gpt.tokenizer import Tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/stories"


class Hub(ThreadingHTTPServer):
    """As much of the Hugging Face hub's API as a download needs; one repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {file.name: file.read_bytes() for file in STORIES.iterdir()}
        self.cut_after: int | None = None  # bytes of the weights after which the connection breaks
        self.damage = ""  # the file of which one byte is changed
        self.asked: list[tuple[str, int]] = []  # names, and the byte that was asked for first

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def describe(self, name: str, data: bytes) -> dict:
        told = {"size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        if name.endswith(".safetensors"):
            told["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return told


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        hub, path = self.server, self.path.split("?")[0]
        if path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": name, **hub.describe(name, data)} for name, data in hub.files.items()]
            return self.give(json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode(), body)
        if path.startswith(f"/{REPO}/resolve/{COMMIT}/"):  # the hub sends on to the servers that hold the files
            self.send_response(302)
            self.send_header("Location", f"/stored/{path.rsplit('/', 1)[-1]}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        name = path.removeprefix("/stored/")
        if name not in hub.files:
            return self.send_error(404)
        data = hub.files[name]
        if name == hub.damage:
            data = bytes([data[0] ^ 1]) + data[1:]
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if body:
            hub.asked.append((name, begin))
        return self.give(data, body, begin)

    def give(self, data: bytes, body: bool, begin: int = 0) -> None:
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(data) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if not body:
            return
        cut = self.server.cut_after
        if cut is not None and len(data) > cut:
            self.wfile.write(data[begin : max(begin, cut)])
            self.close_connection = True
            return
        self.wfile.write(data[begin:])


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def download(folder: Path, url: str, *flags: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable,
        str(ROOT / "scripts" / "download.py"),
        "--repo_id",
        REPO,
        "--checkpoint_dir",
        str(folder),
    ]
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home")}
    return subprocess.run(
        [*command, *flags], capture_output=True, text=True, env={**environment, **variables}, cwd=ROOT, timeout=120
    )


def is_refused(folder: Path) -> bool:
    """Whether nothing that opens a checkpoint takes the folder for one."""
    for read in (checkpoint.load_config, checkpoint.fingerprint, Tokenizer):
        with pytest.raises(ValueError, match="is incomplete: its download was interrupted; run scripts/download"):
            read(folder)
    return True


@pytest.mark.slow
def test_a_download_is_the_repository(hub: Hub, tmp_path: Path) -> None:
    hub.files |= dict.fromkeys(("../evil.json", "tokenizer/../../evil.json", "training_args.bin", "README.md"), b"{}")
    done = download(tmp_path, hub.url)
    assert done.returncode == 0, done.stderr
    assert checkpoint.fingerprint(tmp_path / REPO) == checkpoint.fingerprint(STORIES)
    got = {path.name for path in (tmp_path / REPO).iterdir() if path.is_file()}
    assert got == {file.name for file in STORIES.iterdir()} - {"LICENSE"}
    assert not list(tmp_path.rglob("evil.json"))


def test_an_interrupted_download_goes_on_and_is_no_checkpoint_until_then(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after = 300_000
    done = download(tmp_path, hub.url)
    assert done.returncode == 1, done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith("error: the Hugging Face hub cannot be reached")
    assert is_refused(tmp_path / REPO)
    hub.cut_after = None
    assert download(tmp_path, hub.url, "--tokenizer_only", "true").returncode == 0
    assert is_refused(tmp_path / REPO)
    hub.asked.clear()
    assert download(tmp_path, hub.url).returncode == 0
    assert [(name, begin > 0) for name, begin in hub.asked] == [("model.safetensors", True)]
    assert checkpoint.fingerprint(tmp_path / REPO) == checkpoint.fingerprint(STORIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_not_kept_and_fetched_again(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.damage = name
    done = download(tmp_path, hub.url)
    assert done.returncode == 1
    assert f"{name} came damaged, and was not kept" in done.stderr.strip().splitlines()[-1]
    assert is_refused(tmp_path / REPO)
    hub.damage = ""
    hub.asked.clear()
    assert download(tmp_path, hub.url).returncode == 0
    assert (name, 0) in hub.asked  # others that were stopped go on where they were
    assert checkpoint.fingerprint(tmp_path / REPO) == checkpoint.fingerprint(STORIES)


def test_a_token_is_not_shown() -> None:
    for flag in ("--help", "--print_config"):
        command = [sys.executable, "scripts/download.py", flag]
        environment = {**os.environ, "HF_TOKEN": "hf_secret"}
        told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        assert "access_token" in told
        assert "hf_secret" not in told


@pytest.mark.slow
def test_without_a_network_one_line_says_so(tmp_path: Path) -> None:
    for variables in ({"HF_HUB_OFFLINE": "1"}, {}):
        done = download(tmp_path, "http://127.0.0.1:9", **variables)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("error: the Hugging Face hub cannot be reached")
    assert not (tmp_path / REPO).exists()


@pytest.mark.slow
def test_a_repository_without_weights_is_refused_at_once(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    assert f"{REPO} holds no weights that are read here" in download(tmp_path, hub.url).stderr
    assert not hub.asked


def test_a_file_that_is_cut_short_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    url = f"{hub.url}/{REPO}/resolve/{COMMIT}/model.safetensors"
    hub.cut_after = 300_000
    with pytest.raises(ValueError, match=r"the connection was lost after 300,000 of 1,044,992 bytes"):
        files.fetch(url, tmp_path / "rows.json")
    assert not list(tmp_path.iterdir())
    hub.cut_after = None
    files.fetch(url, tmp_path / "rows.json")
    assert (tmp_path / "rows.json").read_bytes() == hub.files["model.safetensors"]
