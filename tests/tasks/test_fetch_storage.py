"""fetch from an object storage: downloaded, and fetched again when its tags change."""

from pathlib import Path

import pytest
import torch

from poemerge.errors import SourceError
from poemerge.hashing import hash_files
from poemerge.lineage import Lineage
from tasks.fetch import UnreachableError, fetch, fetched, resolve
from tests.storage import Storage
from tests.zoo import Zoo


@pytest.fixture
def url(zoo: Zoo, storage: Storage) -> str:
    return storage.upload(zoo.full(1))


def test_it_is_downloaded_once_and_recorded_by_its_tags(
    zoo: Zoo, storage: Storage, url: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert fetch.fn("base", url, out)
    assert hash_files(out) == hash_files(zoo.full(1))
    record = Lineage.find(out)
    assert record is not None
    assert record.uri == url
    assert all(value.startswith("etag:") for value in record.inputs[0].files.values())
    assert not fetch.fn("base", url, out)
    assert resolve(url) == fetched(out) == record.revision
    storage.files.pipe_file(f"{url}/config.json", (zoo.base() / "config.json").read_bytes() + b" ")
    assert resolve(url) != record.revision
    assert fetch.fn("base", url, out)


def test_what_is_expected_is_a_digest_of_tags(url: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"{url} has sha256 {resolve(url)} where 0000"):
        fetch.fn("base", url, tmp_path / "out", sha256="0" * 64)
    assert fetch.fn("base", url, tmp_path / "out", sha256=resolve(url))


def test_the_record_found_there_is_taken_along(
    zoo: Zoo, storage: Storage, url: str, tmp_path: Path
) -> None:
    fetch.fn("base", url, tmp_path / "out")
    fetch.fn("base", storage.upload(tmp_path / "out", "again"), tmp_path / "copy")
    record = Lineage.find(tmp_path / "copy")
    assert record is not None
    assert record.inputs[0].parent is not None
    assert record.inputs[0].parent["uri"] == url


def test_pickles_become_safetensors(storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    torch.save({"w": torch.ones(3)}, folder / "pytorch_model.bin")
    fetch.fn("base", storage.upload(folder), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").exists()
    assert not (tmp_path / "out/pytorch_model.bin").exists()


def test_an_intact_copy_is_kept_while_the_storage_is_away(
    storage: Storage, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch.fn("base", url, tmp_path / "out")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage.move_to("http://127.0.0.1:9")
    assert not fetch.fn("base", url, tmp_path / "out")
    with pytest.raises(UnreachableError, match=f"{url} cannot be reached"):
        fetch.fn("base", url, tmp_path / "other")
    storage.move_to(storage.server)
    storage.files.rm(f"{url}/model.safetensors")
    with pytest.raises(SourceError, match=f"{url} holds no model or adapter weights"):
        fetch.fn("base", url, tmp_path / "out")
