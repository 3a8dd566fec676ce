"""A base known from its small files: in a folder, and on a hub that is a local stand-in asked over HTTP."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hatrack.base.description import describe_local, is_on_hub
from hatrack.base.hub import describe_on_hub
from hatrack.errors import ModelError, RecipeError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_folder(tiny_decoder: Path) -> None:
    found = describe_local(str(tiny_decoder))
    assert found is not None and found.config["model_type"] == "llama" and found.to_download == 0
    assert found.tensors["model.embed_tokens.weight"].shape[1] == 32
    with pytest.raises(RecipeError, match="--revision is for bases on the hub"):
        describe_local(str(tiny_decoder), "main")
    assert not is_on_hub("./nowhere/at.all") and describe_local("./nowhere/at.all") is None  # `find_base` says why
    assert is_on_hub("org/tiny") and not is_on_hub(str(tiny_decoder)) and not is_on_hub("pypi:some-wheel")


def test_a_hub_that_cannot_be_asked() -> None:
    with pytest.raises(ModelError, match="there is no folder org/nothing here, and the hub cannot be asked for it"):
        describe_on_hub("org/nothing")


@pytest.fixture
def hub(tiny_decoder: Path) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """A stand-in for the hub with org/tiny on it, and (path, bytes) of each answer it gave."""
    sent: list[tuple[str, int]] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            name = path.rpartition("/")[2]
            if path.startswith("/api/models/org/tiny"):
                files = [{"rfilename": file.name} for file in sorted(tiny_decoder.iterdir())]
                content = json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": files, "private": False}).encode()
                if "/tree/" in path:
                    content = json.dumps(
                        [
                            {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
                            for f in tiny_decoder.iterdir()
                        ]
                    ).encode()
            elif path.startswith("/org/tiny/resolve/") and (tiny_decoder / name).is_file():
                content = (tiny_decoder / name).read_bytes()
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if path.startswith("/org/tiny/") else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            whole, ranged = len(content), self.headers.get("Range")
            if ranged:
                first, _, last = ranged.removeprefix("bytes=").partition("-")
                content = content[int(first) : int(last) + 1]
            self.send_response(206 if ranged else 200)
            self.send_header("Content-Length", str(len(content) if body else whole))
            self.send_header("ETag", f'"{name}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(content)
                sent.append((name, len(content)))

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", sent
    server.shutdown()
    server.server_close()


def _plan(endpoint: str, folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    places = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder), "HATRACK_CACHE": str(folder)}
    environment = dict(os.environ, **places)
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-m", "hatrack", "plan", *words, "--json"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


def test_a_hub_base_is_planned_from_its_small_files(
    hub: tuple[str, list[tuple[str, int]]], tiny_decoder: Path, tmp_path: Path
) -> None:
    endpoint, sent = hub
    done = _plan(endpoint, tmp_path, "--base", "org/tiny")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    local = json.loads(_plan(endpoint, tmp_path, "--base", str(tiny_decoder)).stdout)
    assert (told["trainable"], told["total"]) == (local["trainable"], local["total"])
    weights = (tiny_decoder / "model.safetensors").stat().st_size
    assert 0 < told["to_download"] < weights and local["to_download"] == 0
    assert not list(tmp_path.rglob("model.safetensors"))
    assert all(size <= 100_001 for name, size in sent if name == "model.safetensors")
    missing = _plan(endpoint, tmp_path, "--base", "org/other")
    assert missing.returncode == 2 and "no public model org/other on the hub" in missing.stderr
