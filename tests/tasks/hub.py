"""A small real hub on loopback that speaks the hub's file API, and what is fetched from it."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from safetensors.torch import save

from poemerge.lineage import Lineage
from tasks.fetch import fetch

SOURCE = "hf://org/model"
FIRST, SECOND = "1" * 40, "2" * 40
MANY = 1_000_000  # bytes
PATIENCE = 180  # seconds, of a busy machine
TOKEN = "hf_averysecrettoken"
WEIGHTS = save({"w": torch.arange(4.0)})
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"a second copy of the weights",
    "modeling_evil.py": b"raise SystemExit",
    "onnx/model.safetensors": b"another copy",
    "README.md": b"a card",
}
WANTED = ["config.json", "model.safetensors", "tokenizer.json"]


@dataclass
class Hub:
    """What the server serves, and what it was asked.

    Attributes:
        commits: commit → path → content.
        branches: branch → commit.
        faults: statuses to answer the next requests with, before any is served.
        broken: path → status that a download of it is answered with.
        closed: paths that nobody may even ask about.
        corrupt: paths whose content arrives with one byte changed.
        short: paths whose content arrives without its last byte.
        requests: method and path, in order.
    """

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    faults: list[int] = field(default_factory=list)
    broken: dict[str, int] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    corrupt: set[str] = field(default_factory=set)
    short: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    sent: int = 0  # bytes of files
    resume: threading.Event | None = None  # for it the second half of a large file waits

    @property
    def downloads(self) -> list[str]:
        """The files that were asked for, in alphabetical order."""
        gets = (line for line in self.requests if line.startswith("GET") and "/resolve/" in line)
        return sorted(line.rpartition("/")[2] for line in gets)


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


def lfs(content: bytes) -> dict[str, object]:
    return {"size": len(content), "pointerSize": 134, "sha256": hashlib.sha256(content).hexdigest()}


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.serve()

    def do_GET(self) -> None:
        self.serve()

    def serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.tokens.add(self.headers.get("authorization"))
        if self.hub.faults:
            self.answer(self.hub.faults.pop(0))
            return
        match path.strip("/").split("/"):
            case ["api", "models", "org", "model", "revision", revision]:
                self.describe(self.hub.branches.get(revision, revision))
            case ["api", "models", "org", "model", "tree", commit]:
                self.list_tree(self.hub.commits[commit])
            case ["org", "model", "resolve", commit, *parts]:
                self.send_content(commit, "/".join(parts))
            case _:
                self.answer(404, headers={"X-Error-Code": "RepoNotFound"})

    def describe(self, commit: str) -> None:
        if commit not in self.hub.commits:
            self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [
            {"rfilename": path, "size": len(content), "blobId": blob_id(content)}
            | ({"lfs": lfs(content)} if is_large(path) else {})
            for path, content in self.hub.commits[commit].items()
        ]
        self.answer(200, json.dumps({"id": "org/model", "sha": commit, "siblings": siblings}))

    def list_tree(self, files: dict[str, bytes]) -> None:
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            | ({"lfs": lfs(content) | {"oid": lfs(content)["sha256"]}} if is_large(path) else {})
            for path, content in files.items()
        ]
        self.answer(200, json.dumps(entries))

    def send_content(self, commit: str, path: str) -> None:
        content = self.hub.commits[commit][path]
        large = is_large(path)
        etag = hashlib.sha256(content).hexdigest() if large else blob_id(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        if large:
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        if path in self.hub.closed:
            self.answer(403)
            return
        if self.command == "GET" and path in self.hub.broken:
            self.answer(self.hub.broken[path])
            return
        if self.command == "GET" and path in self.hub.short:
            content = content[:-1]
        if path in self.hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        if asked and self.command == "GET":
            content = content[int(asked[1]) : int(asked[2]) + 1]
        self.hub.sent += len(content) * (self.command == "GET")
        self.answer(206 if asked else 200, content, headers)

    def answer(
        self, status: int, body: bytes | str = b"", headers: dict[str, str] | None = None
    ) -> None:
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            half = len(body) // 2 if self.hub.resume else 0
            self.wfile.write(body[:half])
            if half > MANY:
                assert self.hub.resume.wait(PATIENCE)
            self.wfile.write(body[half:])

    def log_message(self, *_: object) -> None:
        """Keep the test output clean."""


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the model `org/model`, reached through HF_ENDPOINT."""
    state = Hub({FIRST: dict(MODEL)}, {"main": FIRST})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield state
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


def run(out: Path, source: str = SOURCE, sha256: str | None = None) -> bool:
    return fetch.fn("base", source, out, sha256=sha256)


def record_of(out: Path) -> Lineage:
    record = Lineage.find(out)
    assert record is not None
    return record
