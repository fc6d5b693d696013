"""Sources in an object storage: the same merge, by ranges, and one sentence where they fail."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from poemerge.checkpoint import Checkpoint
from poemerge.errors import CheckpointError, SourceError, UnreachableError
from poemerge.hashing import hash_files
from poemerge.layout import RECORD
from poemerge.lineage import Lineage
from poemerge.merge import merge_checkpoints
from poemerge.merging.plan import plan_merge
from poemerge.remote import ranges
from poemerge.remote.places import Place, locate
from poemerge.remote.stand_ins import at_hand
from tests.storage import ENDPOINT, SECRET, Storage
from tests.zoo import Zoo

SHARDS = "*.safetensors"


def merge(
    base: Path | str, first: Path | str, second: Path | str, out: Path, **more: object
) -> None:
    merge_checkpoints(base, {"a": first, "b": second}, out, device="cpu", **more)


def local(zoo: Zoo) -> tuple[Path, Path, Path]:
    return zoo.base(sharded=True), zoo.full(1), zoo.adapter(2)


def uploaded(zoo: Zoo, storage: Storage) -> list[str]:
    return [storage.upload(folder) for folder in local(zoo)]


def same_weights(one: Path, other: Path) -> bool:
    mine, theirs = hash_files(one), hash_files(other)
    return {**mine, "README.md": ""} == {**theirs, "README.md": ""}  # which names the sources


@pytest.fixture
def here(zoo: Zoo, tmp_path: Path) -> Path:
    merge(*local(zoo), tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def in_memory() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    yield "memory://folder"
    files.rm("/folder", recursive=True)


def test_sources_elsewhere_merge_to_the_same_bytes(
    zoo: Zoo, storage: Storage, tmp_path: Path, here: Path
) -> None:
    urls = uploaded(zoo, storage)
    merge(*urls, tmp_path / "out")
    assert same_weights(tmp_path / "out", here)
    record = Lineage.find(tmp_path / "out")
    assert record is not None
    assert [source.uri for source in record.inputs] == urls
    for source, folder in zip(record.inputs, local(zoo), strict=True):
        known = hash_files(folder)
        for name, value in source.files.items():
            tag = storage.files.info(f"{source.uri}/{name}")["ETag"].strip('"')
            assert value == (f"etag:{tag}" if name.endswith(".safetensors") else known[name])
    (statement,) = [json.loads((tmp_path / "out" / RECORD).read_text())]
    (base, *_) = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert base["digest"] == {}  # a tag is no sha256


def test_any_storage_that_fsspec_knows(
    zoo: Zoo, tmp_path: Path, here: Path, in_memory: str
) -> None:
    base, first, second = local(zoo)
    fsspec.filesystem("memory").put(f"{first}/", "/folder/", recursive=True)
    merge(base.as_uri(), in_memory, second, tmp_path / "out")
    assert same_weights(tmp_path / "out", here)


@contextmanager
def opened(url: str, folder: Path) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    with at_hand([url]) as (stand_in,), Checkpoint(stand_in) as remote, Checkpoint(folder) as real:
        yield remote, real


@pytest.fixture
def large(storage: Storage, tmp_path: Path) -> tuple[Path, str]:
    """A checkpoint of 24 MB, one vector and one matrix a layer, and its URL."""
    folder = tmp_path / "large"
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {f"up.{i}": torch.randn(512, 1024) for i in range(11)}
    tensors |= {f"norm.{i}": torch.randn(1000 + i) for i in range(11)}
    save_file(tensors, folder / "model.safetensors")
    return folder, storage.upload(folder)


def test_a_tensor_costs_its_own_bytes_alone(large: tuple[Path, str], storage: Storage) -> None:
    folder, url = large
    whole = (folder / "model.safetensors").stat().st_size
    with storage.watched() as watcher, opened(url, folder) as (remote, real):
        header, watcher.sent = watcher.sent, 0
        assert remote.tensors == real.tensors
        assert torch.equal(remote.read("up.3"), real.read("up.3"))
        matrix, watcher.sent = watcher.sent, 0
        assert torch.equal(remote.read("up.3", (7, 9)), real.read("up.3", (7, 9)))
        rows = watcher.sent
    assert header < 200_000
    assert 2_097_152 <= matrix < 2_110_000  # the matrix and heads of answers
    assert rows < ranges.BLOCK + 2_000
    assert header + matrix + rows < whole / 8


def test_neighbours_come_in_company(large: tuple[Path, str], storage: Storage) -> None:
    folder, url = large
    with storage.watched() as watcher, opened(url, folder) as (remote, real):
        watcher.asked.clear()
        for i in range(11):
            assert torch.equal(remote.read(f"norm.{i}"), real.read(f"norm.{i}"))
        assert len(watcher.asked) <= 2


@pytest.mark.parametrize("sizes", [(64, 128, 3), (1, 7, 1), (10**6, 1, 1)])
def test_every_tensor_is_read_whatever_the_ranges_are(
    zoo: Zoo, in_memory: str, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int]
) -> None:
    for name, size in zip(("BLOCK", "PART", "PARTS"), sizes, strict=True):
        monkeypatch.setattr(ranges, name, size)
    ranges._block.cache_clear()
    folder = zoo.base("bfloat16")
    fsspec.filesystem("memory").put(f"{folder}/", "/folder/", recursive=True)
    with opened(in_memory, folder) as (remote, real):
        for name, info in list(real.tensors.items())[:5]:
            assert torch.equal(remote.read(name), real.read(name))
            cut = (info.shape[0] // 3, info.shape[0] - 1)
            assert torch.equal(remote.read(name, cut), real.read(name, cut))
    ranges._block.cache_clear()


def test_what_is_given_the_path_alone_reads_no_hole(zoo: Zoo, storage: Storage) -> None:
    url = storage.upload(zoo.full(1))
    with at_hand([url]) as (stand_in,):
        with Checkpoint(Path(str(stand_in))) as remote, Checkpoint(zoo.full(1)) as real:
            assert all(torch.equal(remote.read(name), real.read(name)) for name in real.tensors)
        assert f"{stand_in / 'config.json'}" == f"{url}/config.json"
        assert not stand_in.samefile(zoo.full(1))


def test_messages_speak_of_the_url(zoo: Zoo, storage: Storage, tmp_path: Path) -> None:
    base, first, second = local(zoo)
    bad = tmp_path / "bad"
    bad.mkdir()
    with Checkpoint(first) as full:
        tensors = {name: full.read(name) for name in full.tensors}
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, bad / "model.safetensors")
    (bad / "config.json").write_bytes((first / "config.json").read_bytes())
    url = storage.upload(bad)
    with pytest.raises(CheckpointError, match=rf"model.norm.weight of expert 'a' \({url}\)"):
        merge(base, url, second, tmp_path / "out")
    storage.files.pipe_file(f"{url}/model.safetensors", b"\xff" * 500)
    with pytest.raises(CheckpointError, match=f"{url}/model.safetensors is no intact"):
        merge(base, url, second, tmp_path / "out")
    with pytest.raises(SourceError, match=f"{storage.url('none')} does not exist"):
        merge(base, storage.url("none"), second, tmp_path / "out")
    storage.files.pipe_file(f"{storage.bucket}/text/notes.txt", b"no model")
    with pytest.raises(SourceError, match=f"{storage.url('text')} holds neither model.safetensors"):
        merge(base, storage.url("text"), second, tmp_path / "out")


@pytest.mark.parametrize("change", ["replaced", "gone"])
def test_a_source_that_changes_meanwhile_is_refused(
    zoo: Zoo, storage: Storage, tmp_path: Path, change: str
) -> None:
    base, first, second = local(zoo)
    url = storage.upload(first)
    file = f"{url}/model.safetensors"

    def meddle(done: int, total: int) -> None:
        ranges._block.cache_clear()  # of so small a file nothing else would be read anew
        if change == "gone" and storage.files.exists(file):
            storage.files.rm(file)
        elif done == total:
            storage.files.pipe_file(file, (zoo.full(3) / "model.safetensors").read_bytes())

    ranges._block.cache_clear()
    with pytest.raises(SourceError, match=f"{file} was changed or removed while it was read"):
        merge(base, url, second, tmp_path / "out", progress=meddle)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", [503, "dropped"])
def test_a_fault_that_passes_is_not_noticed(
    zoo: Zoo, storage: Storage, tmp_path: Path, fault: int | str
) -> None:
    url = storage.upload(zoo.full(1))
    with storage.watched() as watcher, opened(url, zoo.full(1)) as (remote, real):
        watcher.fail(fault, 0, 2)
        assert torch.equal(remote.read("lm_head.weight"), real.read("lm_head.weight"))
        assert len(watcher.heal()) >= 3


def test_a_network_that_is_away_leaves_finished_shards_to_the_next_try(
    zoo: Zoo, storage: Storage, tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = uploaded(zoo, storage)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")

    def cut(done: int, total: int) -> None:
        if done >= 12 and os.environ[ENDPOINT] == storage.server:
            ranges._block.cache_clear()
            storage.move_to("http://127.0.0.1:9")

    with pytest.raises(UnreachableError, match=r"s3://.* cannot be reached or broke off .*; run"):
        merge(*urls, tmp_path / "out", progress=cut)
    kept = list((tmp_path / "out.partial").glob(SHARDS))
    assert kept
    times = {path.name: path.stat().st_mtime_ns for path in kept}
    storage.move_to(storage.server)
    merge(*urls, tmp_path / "out")
    assert same_weights(tmp_path / "out", here)
    assert (
        times.items()
        <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}.items()
    )


def test_a_closed_bucket_is_one_sentence_without_a_secret(zoo: Zoo, storage: Storage) -> None:
    url = storage.upload(zoo.full(1))
    with (
        storage.closed(),
        pytest.raises(SourceError, match=f"{url} is closed to you .*KEY_ID") as caught,
    ):
        Place(url).listing()
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://no-such-bucket/model", "s3://no-such-bucket/model does not exist .*bucket"),
        ("s3://key:a-secret-of-mine@bucket/model", "s3://bucket/model holds a password"),
        ("s3://bucket/model?X-Amz-Signature=a-secret", "holds a password, a token or a query"),
        ("s3://A bucket!/model", "s3://A bucket!/model cannot be read here"),
        ("nothing://bucket/model", "cannot be read here .*nothing.*howto/storage"),
        ("gs://bucket/model", "cannot be read here .*gcsfs"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(
    zoo: Zoo, storage: Storage, tmp_path: Path, url: str, expected: str
) -> None:
    with pytest.raises(SourceError, match=expected) as caught:
        merge(zoo.base(), url, zoo.adapter(2), tmp_path / "out")
    assert "secret" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_plan_is_made_of_headers(zoo: Zoo, storage: Storage) -> None:
    base, first, second = uploaded(zoo, storage)
    with plan_merge(base, {"a": first, "b": second}, "cauchy_poe", {}) as plan:
        rules, read = plan.rules, plan.read_bytes
    base, first, second = local(zoo)
    with plan_merge(base, {"a": first, "b": second}, "cauchy_poe", {}) as plan:
        assert (rules, read) == (plan.rules, plan.read_bytes)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("s3://bucket/a/", "s3://bucket/a"),
        ("file:///a%20b", Path("/a b")),
        ("a/b", Path("a/b")),
        ("hf://org/name", Path("hf://org/name")),
        (Path("s3://bucket"), Path("s3:/bucket")),
    ],
)
def test_what_is_here_is_a_path(place: Path | str, expected: Path | str) -> None:
    assert locate(place) == expected
