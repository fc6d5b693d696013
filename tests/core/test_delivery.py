"""Results in an object storage: shard by shard, complete at the very end, and gone on with."""

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from poemerge.errors import SettingError, SourceError
from poemerge.hashing import hash_files
from poemerge.layout import FINISHED, INDEX, RECORD
from poemerge.merge import merge_checkpoints
from poemerge.merging import journal
from poemerge.merging.shards import Shard
from poemerge.merging.work import ShardJob, make_shard
from poemerge.remote import delivery
from poemerge.remote.places import Place
from tests.storage import Storage
from tests.zoo import Zoo


def merge(zoo: Zoo, out: Path | str, **options: object) -> set[str]:
    """Merge; names of the shards that were made now."""
    made: set[str] = set()
    real = journal.Journal.note

    def note(self: journal.Journal, shard: Shard) -> None:
        made.add(shard.file)
        real(self, shard)

    experts = {"a": zoo.full(1), "b": zoo.adapter(2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.Journal, "note", note)
        merge_checkpoints(zoo.base(sharded=True), experts, out, device="cpu", **options)
    return made


@pytest.fixture(scope="module")
def here(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same merge on this machine."""
    out = tmp_path_factory.mktemp("here") / "out"
    merge(zoo, out)
    return out


@pytest.fixture
def out(storage: Storage) -> str:
    return storage.url("merged")


def stop(after: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= after:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def stopped(zoo: Zoo, out: str) -> str:
    """Where a merge was stopped late."""
    with pytest.raises(KeyboardInterrupt):
        merge(zoo, out, progress=stop(15))
    return out


def shards(storage: Storage, out: str) -> set[str]:
    return {name for name in storage.names(out) if name.endswith(".safetensors")}


def same(storage: Storage, out: str, here: Path, tmp_path: Path) -> bool:
    found = storage.download(out, tmp_path / "down")
    records = [(folder / RECORD).read_bytes() for folder in (found, here)]
    return hash_files(found) == hash_files(here) and records[0] == records[1]


def test_the_same_bytes_come_and_what_completes_them_comes_last(
    zoo: Zoo, storage: Storage, out: str, here: Path, tmp_path: Path
) -> None:
    with storage.watched() as watcher:
        merge(zoo, out)
        puts = [line.split()[1] for line in watcher.asked if line.startswith("PUT")]
    assert same(storage, out, here, tmp_path)
    names = [path.rpartition("/merged/")[2] for path in puts]
    assert names[-2:] == [INDEX, RECORD]
    assert names[0] == delivery.STARTED
    assert sorted(name for name in names if FINISHED not in name) == storage.names(out)


def test_no_more_than_a_shard_lies_here(
    zoo: Zoo, storage: Storage, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(path.stat().st_size for path in zoo.base(sharded=True).glob("*.safetensors"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen: list[int] = []

    def look(done: int, total: int) -> None:
        files = [p for end in ("", ".*.partial") for p in tmp_path.rglob(f"*.safetensors{end}")]
        seen.append(sum(path.stat().st_blocks * 512 for path in files if path.is_file()))

    merge(zoo, out, progress=look)
    total = sum(storage.files.info(f"{out}/{name}")["size"] for name in shards(storage, out))
    assert 0 < max(seen) <= largest + 3 * 4096 < total / 2  # and the header of the next one
    assert not any(tmp_path.iterdir())


def test_what_was_finished_is_kept_and_does_not_look_complete(
    zoo: Zoo, storage: Storage, stopped: str, here: Path, tmp_path: Path
) -> None:
    kept = shards(storage, stopped)
    assert len(kept) > 2
    beside = {name for name in storage.names(stopped) if not name.startswith(f"{FINISHED}/")}
    assert beside == kept
    before = {name: storage.files.info(f"{stopped}/{name}")["LastModified"] for name in kept}
    made = merge(zoo, stopped)
    assert made == shards(storage, stopped) - kept
    assert same(storage, stopped, here, tmp_path)
    after = {name: storage.files.info(f"{stopped}/{name}")["LastModified"] for name in kept}
    assert after == before


def flip(storage: Storage, out: str, shard: str) -> None:
    data = storage.files.cat_file(f"{out}/{shard}")
    storage.files.pipe_file(f"{out}/{shard}", data[:-1] + bytes([data[-1] ^ 1]))


def lose(storage: Storage, out: str, shard: str) -> None:
    storage.files.rm(f"{out}/{shard}")


def forget(storage: Storage, out: str, shard: str) -> None:
    storage.files.rm(f"{out}/{FINISHED}/{shard}.json")


def edit(storage: Storage, out: str, shard: str) -> None:
    path = f"{out}/{FINISHED}/{shard}.json"
    fields = json.loads(storage.files.cat_file(path))
    fields["tensors"][0]["rule"] = "copy"
    storage.files.pipe_file(path, json.dumps(fields).encode())


def mislead(storage: Storage, out: str, shard: str) -> None:
    """What is said to have arrived is a file out of the folder."""
    path = f"{out}/{FINISHED}/{shard}{delivery.ARRIVED}"
    fields = json.loads(storage.files.cat_file(path))
    storage.files.pipe_file(path, json.dumps(fields | {"name": f"../{shard}"}).encode())


def garble(storage: Storage, out: str, shard: str) -> None:
    storage.files.pipe_file(f"{out}/{FINISHED}/{shard}{delivery.ARRIVED}", b'{"a": 1}')


@pytest.mark.parametrize("harm", [flip, lose, forget, edit, mislead, garble])
def test_a_shard_that_is_not_as_it_arrived_is_made_anew(
    zoo: Zoo, storage: Storage, stopped: str, here: Path, harm: Callable[[Storage, str, str], None]
) -> None:
    first, *others = sorted(shards(storage, stopped))
    harm(storage, stopped, first)
    made = merge(zoo, stopped)
    assert first in made
    assert not made & set(others)
    for name in shards(storage, stopped):
        assert storage.files.cat_file(f"{stopped}/{name}") == (here / name).read_bytes()
    assert storage.files.cat_file(f"{stopped}/{RECORD}") == (here / RECORD).read_bytes()


def test_another_merge_keeps_nothing(zoo: Zoo, storage: Storage, stopped: str) -> None:
    assert merge(zoo, stopped, epsilon=0.5) == shards(storage, stopped)


def test_a_refusal_leaves_nothing(zoo: Zoo, storage: Storage, out: str) -> None:
    def refuse(done: int, total: int) -> None:
        if done > 12:
            raise SettingError("no")

    with pytest.raises(SettingError):
        merge(zoo, out, progress=refuse)
    assert not storage.names(out)


def test_what_is_there_is_replaced_on_request_alone(
    zoo: Zoo, storage: Storage, out: str, here: Path, tmp_path: Path
) -> None:
    storage.files.pipe_file(f"{out}/notes.txt", b"mine")
    with pytest.raises(SettingError, match=f"{out} exists already; .*--overwrite"):
        merge(zoo, out)
    assert storage.names(out) == ["notes.txt"]
    merge(zoo, out, overwrite=True)
    assert same(storage, out, here, tmp_path)
    with pytest.raises(SettingError, match="exists already"):
        merge(zoo, out)


def test_a_source_is_never_written_into(zoo: Zoo, storage: Storage) -> None:
    url = storage.upload(zoo.full(1), "models/a")
    for out in (url, f"{url}/merged", storage.url("models")):
        with pytest.raises(SettingError, match=f"is, holds or lies in the source {url}"):
            merge_checkpoints(zoo.base(), {"a": url}, out, device="cpu", overwrite=True)
    merge_checkpoints(zoo.base(), {"a": url}, storage.url("models/ab"), device="cpu")


def test_a_place_that_takes_nothing_is_found_out_before_the_work(
    zoo: Zoo, storage: Storage, out: str
) -> None:
    def never(done: int, total: int) -> None:
        pytest.fail("it was merged")

    with pytest.raises(SourceError, match=r"s3://no-such-bucket/out.* does not exist"):
        merge(zoo, "s3://no-such-bucket/out", progress=never)
    with storage.closed(), pytest.raises(SourceError, match=f"{out}.* is closed to you"):
        merge(zoo, out, progress=never)
    with pytest.raises(SettingError, match=f"{out} is not; choose a folder"):
        merge(zoo, out, progress=never, samples=2)


def test_a_merged_adapter_goes_there_too(zoo: Zoo, storage: Storage, tmp_path: Path) -> None:
    experts = {"a": zoo.adapter(1), "b": zoo.adapter(2)}
    for out in (tmp_path / "here", storage.url("merged")):
        merge_checkpoints(zoo.base(), experts, out, device="cpu", output="adapter")
    assert same(storage, storage.url("merged"), tmp_path / "here", tmp_path)


def test_workers_bring_their_shards_themselves(
    zoo: Zoo, storage: Storage, out: str, here: Path, tmp_path: Path
) -> None:
    def elsewhere(jobs: Sequence[ShardJob], done: Callable[[Shard], None]) -> None:
        for job in reversed(jobs):
            there = pickle.loads(pickle.dumps(job))
            assert there.folder == out
            done(pickle.loads(pickle.dumps(make_shard(there))))

    merge(zoo, out, runner=elsewhere)
    assert same(storage, out, here, tmp_path)


def test_large_files_go_in_parts(storage: Storage, out: str, tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(101 << 20)
        file.seek(70 << 20)
        file.write(b"here")
    entry = Place(out).put(path, "large")
    assert entry.tag.endswith("-3")  # the parts that its tag was made of
    assert Place(out).read([("large", (70 << 20) - 1, (70 << 20) + 5)]) == [b"\0here\0"]
