"""fetch from a hub: a small real one on loopback that speaks the hub's file API."""

import hashlib
import io
import json
import logging
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save

from poemerge.checkpoint import Checkpoint
from poemerge.errors import SourceError
from poemerge.hashing import hash_files
from poemerge.lineage import Lineage
from tasks.fetch import OfflineError, UnreachableError, fetch, fetched, resolve, resolved_once
from tasks.fetch.headers import open_headers
from tasks.progress import watched_by

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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
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


def test_downloads_what_a_model_needs_and_no_code(hub: Hub, tmp_path: Path) -> None:
    assert run(tmp_path / "out") is True
    made = hash_files(tmp_path / "out")
    assert made == {name: hashlib.sha256(MODEL[name]).hexdigest() for name in WANTED}
    assert hub.downloads == WANTED
    record = record_of(tmp_path / "out")
    assert (record.uri, record.revision) == (SOURCE, FIRST)
    assert record.params == {"revision": FIRST}
    assert record.inputs[0].files == {
        "config.json": f"git:{blob_id(MODEL['config.json'])}",
        "model.safetensors": made["model.safetensors"],
        "tokenizer.json": f"git:{blob_id(MODEL['tokenizer.json'])}",
    }


def test_the_token_is_sent_and_never_kept(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        run(tmp_path / "out")
        hub.branches["main"] = "no commit"
        with pytest.raises(SourceError) as caught:
            run(tmp_path / "out")
    assert f"Bearer {TOKEN}" in hub.tokens
    assert TOKEN not in (tmp_path / "out/lineage.json").read_text()
    assert TOKEN not in str(caught.value) + caplog.text


def test_converts_pickles_where_there_is_nothing_else(hub: Hub, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(4.0)}, buffer)
    hub.commits[FIRST] = {"config.json": b"{}", "pytorch_model.bin": buffer.getvalue()}
    run(tmp_path / "out")
    assert sorted(hash_files(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["w"], torch.arange(4.0))


def test_within_a_run_a_branch_means_one_commit(hub: Hub, tmp_path: Path) -> None:
    """What looks for changes, side by side, hands on to what downloads; fetched, it is given up."""

    def asked() -> int:
        return sum("/revision/main" in request for request in hub.requests)

    hub.commits[SECOND] = MODEL | {"config.json": b"{}"}
    with resolved_once(), resolved_once(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(copy_context().run, resolve, SOURCE).result() == FIRST
        hub.branches["main"] = SECOND
        assert resolve(SOURCE) == FIRST
        run(tmp_path / "out")
        assert fetched(tmp_path / "out") == FIRST
        assert asked() == 1
        assert resolve(SOURCE) == SECOND
    assert resolve(SOURCE) == SECOND
    assert asked() == 3


def test_a_download_tells_how_many_bytes_have_come(hub: Hub, tmp_path: Path) -> None:
    """The second half is sent when the first was told of."""
    weights = save({"w": torch.zeros(6_000_000)})
    hub.commits[FIRST]["model.safetensors"] = weights
    hub.resume = threading.Event()
    told: list[tuple[str, str, int, int]] = []

    def watch(step: str, unit: str, done: int, total: int) -> None:
        told.append((step, unit, done, total))
        if done >= 10:  # the client writes pieces of so many MB
            hub.resume.set()

    with watched_by(watch):
        run(tmp_path / "out")
    assert {(step, unit, total) for step, unit, _, total in told} == {(SOURCE, "MB", 24)}
    counts = [done for _, _, done, _ in told]
    assert counts == sorted(counts)
    assert 10 <= counts[-2] < counts[-1] == 24


def test_an_unmoved_branch_downloads_nothing(hub: Hub, tmp_path: Path) -> None:
    run(tmp_path / "out")
    hub.requests.clear()
    assert run(tmp_path / "out") is False
    assert hub.requests == ["GET /api/models/org/model/revision/main"]


def test_a_moved_branch_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    run(tmp_path / "out")
    hub.commits[SECOND] = MODEL | {"config.json": b'{"model_type": "gpt2"}'}
    hub.branches["main"] = SECOND
    assert run(tmp_path / "out") is True
    assert record_of(tmp_path / "out").revision == SECOND
    assert (tmp_path / "out/config.json").read_bytes() == b'{"model_type": "gpt2"}'


def test_a_branch_resolves_to_its_commit_and_nothing_is_written(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(SOURCE) == FIRST
    hub.commits[SECOND], hub.branches["main"] = MODEL, SECOND
    assert resolve(SOURCE) == SECOND
    assert resolve(f"{SOURCE}@{FIRST}") == FIRST
    assert hub.downloads == []
    assert list(tmp_path.iterdir()) == []


def test_without_an_answer_the_intact_copy_says_the_revision(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "out"
    run(copy)
    hub.commits[SECOND], hub.branches["main"] = MODEL, SECOND
    assert resolve(SOURCE, copy=copy) == SECOND
    hub.faults += [503] * 20
    assert resolve(SOURCE, copy=copy) == fetched(copy) == FIRST
    assert "nobody could say so" in caplog.text
    with pytest.raises(UnreachableError):
        resolve(SOURCE)
    (copy / "config.json").write_text("{}")
    with pytest.raises(UnreachableError):
        resolve(SOURCE, copy=copy)


def test_a_pinned_commit_stays_where_it_is(hub: Hub, tmp_path: Path) -> None:
    hub.commits[SECOND] = MODEL | {"config.json": b"{}"}
    hub.branches["main"] = SECOND
    run(tmp_path / "out", f"{SOURCE}@{FIRST}")
    assert record_of(tmp_path / "out").revision == FIRST
    assert (tmp_path / "out/config.json").read_bytes() == MODEL["config.json"]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_corrupted_bytes_are_refused(hub: Hub, tmp_path: Path, file: str) -> None:
    hub.corrupt.add(file)
    with pytest.raises(SourceError, match=f"{file} of {SOURCE} arrived with hash"):
        run(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_index_that_leaves_the_folder_is_refused(hub: Hub, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"w": "../../secret.safetensors"}}).encode()
    hub.commits[FIRST]["model.safetensors.index.json"] = index
    with pytest.raises(SourceError, match=r"names the shard \.\./\.\./secret"):
        run(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_unexpected_hash_costs_no_download(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is expected") as caught:
        run(tmp_path / "out", sha256="0" * 64)
    assert not hub.downloads
    found = str(caught.value).split()[3]
    assert run(tmp_path / "out", sha256=found) is True


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf://org/absent", "does not exist on 127.0.0.1 or is closed to you"),
        (f"{SOURCE}@absent", "has no such revision"),
        ("hf://org/-model", "is no model of a hub"),
    ],
)
def test_refuses_in_one_sentence(hub: Hub, tmp_path: Path, source: str, expected: str) -> None:
    with pytest.raises(SourceError) as caught:
        run(tmp_path / "out", source)
    assert expected in str(caught.value)
    assert not isinstance(caught.value, UnreachableError)
    assert not list(tmp_path.iterdir())


def test_a_repository_without_weights_is_refused(hub: Hub, tmp_path: Path) -> None:
    del hub.commits[FIRST]["model.safetensors"], hub.commits[FIRST]["pytorch_model.bin"]
    with pytest.raises(SourceError, match=f"{SOURCE} holds no model or adapter weights"):
        run(tmp_path / "out")


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_fault_that_may_pass_is_unreachable(hub: Hub, tmp_path: Path, status: int) -> None:
    hub.faults = [status]
    with pytest.raises(UnreachableError, match=f"answers with status {status}"):
        run(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_fault_in_mid_download_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.broken["model.safetensors"] = 503
    with pytest.raises(UnreachableError, match="answers with status 503"):
        run(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_download_that_breaks_off_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.short.add("model.safetensors")
    with pytest.raises(UnreachableError, match="broke off"):
        run(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_fault_while_refetching_keeps_the_old_copy(hub: Hub, tmp_path: Path) -> None:
    run(tmp_path / "out")
    hub.commits[SECOND] = dict(MODEL)
    hub.branches["main"] = SECOND
    hub.corrupt.add("model.safetensors")
    with pytest.raises(SourceError):
        run(tmp_path / "out")
    assert record_of(tmp_path / "out").revision == FIRST
    assert record_of(tmp_path / "out").outputs == hash_files(tmp_path / "out")


def test_a_refusal_is_not_a_passing_fault(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [403]
    with pytest.raises(SourceError, match="status 403") as caught:
        run(tmp_path / "out")
    assert not isinstance(caught.value, UnreachableError)


def test_a_closed_file_is_not_a_passing_fault(hub: Hub, tmp_path: Path) -> None:
    hub.closed.add("model.safetensors")
    with pytest.raises(SourceError, match="status 403") as caught:
        run(tmp_path / "out")
    assert not isinstance(caught.value, UnreachableError)
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_no_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Handler, "describe", lambda self, _: self.answer(200, "<html>Log in</html>")
    )
    with pytest.raises(UnreachableError, match="JSONDecodeError"):
        run(tmp_path / "out")


def test_the_third_attempt_succeeds(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [500, 500]
    for _ in range(2):
        with pytest.raises(UnreachableError):
            run(tmp_path / "out")
    assert run(tmp_path / "out") is True


def test_nobody_listening(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnreachableError, match="cannot be reached"):
        run(tmp_path / "out")


def test_switched_off(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineError, match="HF_HUB_OFFLINE is set"):
        run(tmp_path / "out")
    assert not hub.requests


def test_an_intact_copy_is_kept_while_the_hub_is_away(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "out")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with caplog.at_level(logging.WARNING, logger="tasks.fetch"):
        assert run(tmp_path / "out") is False
    assert "was kept" in caplog.text
    with pytest.raises(OfflineError):
        run(tmp_path / "out", f"{SOURCE}@{FIRST}")
    with pytest.raises(OfflineError):
        run(tmp_path / "out", sha256="0" * 64)
    (tmp_path / "out/config.json").write_text("{}")
    with pytest.raises(OfflineError):
        run(tmp_path / "out")


def test_headers_alone_are_downloaded_to_plan(hub: Hub, tmp_path: Path) -> None:
    large = {"up.weight": torch.zeros(2000, 500), "norm.weight": torch.zeros(500)}
    config = MODEL["config.json"]
    model = {"model.safetensors": save(large), "config.json": config}
    hub.commits[FIRST] = model
    folder = open_headers("hf://org/model", tmp_path / "ghost")
    with Checkpoint(folder) as ghost:
        assert {n: i.shape for n, i in ghost.tensors.items()} == {
            "norm.weight": (500,), "up.weight": (2000, 500),
        }  # fmt: skip
    assert (folder / "config.json").read_bytes() == config
    assert hub.sent < 150_000 < len(model["model.safetensors"])
    hub.commits[FIRST] = {"pytorch_model.bin": b"", "config.json": config}
    with pytest.raises(SourceError, match="has pickles alone"):
        open_headers("hf://org/model", tmp_path / "pickled")
    hub.branches.clear()
    with pytest.raises(SourceError, match="has no such revision"):
        open_headers("hf://org/model@gone", tmp_path / "gone")
