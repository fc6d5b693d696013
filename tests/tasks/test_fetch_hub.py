"""fetch from a hub: what is downloaded, what is checked, and what is refused."""

import hashlib
import io
import json
import logging
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from poemerge.checkpoint import Checkpoint
from poemerge.errors import SourceError
from poemerge.hashing import hash_files
from tasks.fetch import UnreachableError
from tasks.fetch.headers import open_headers
from tasks.progress import watched_by
from tests.tasks.hub import FIRST, MODEL, SOURCE, TOKEN, WANTED, Hub, blob_id, record_of, run


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
