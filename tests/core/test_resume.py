"""A merge that was stopped: what is kept of it, and what is not trusted."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from poemerge.atomic import new_folder, write_text
from poemerge.errors import MachineError, SettingError
from poemerge.hashing import hash_files
from poemerge.layout import FINISHED, RECORD, is_ready
from poemerge.merge import merge_checkpoints
from poemerge.merging import journal
from poemerge.merging.shards import Shard
from tests.zoo import Zoo

METHOD = "cauchy_poe"
SHARDS = "model-*.safetensors"


def merge(zoo: Zoo, out: Path, stop_after: int | None = None, **options: object) -> set[str]:
    """Merge, stopped after so many tensors; names of the shards that were made now."""
    made: set[str] = set()
    real = journal.Journal.note

    def note(self: journal.Journal, shard: Shard) -> None:
        made.add(shard.file)
        real(self, shard)

    def stop(done: int, total: int) -> None:
        if stop_after is not None and done >= stop_after:
            raise KeyboardInterrupt

    experts = {"a": zoo.full(1), "b": zoo.adapter(2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.Journal, "note", note)
        merge_checkpoints(
            zoo.base(sharded=True), experts, out, METHOD, "cpu", progress=stop, **options
        )
    return made


@pytest.fixture
def whole(zoo: Zoo, tmp_path: Path) -> Path:
    merge(zoo, tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def stopped(zoo: Zoo, tmp_path: Path) -> Path:
    """The folder of a merge that was stopped late."""
    with pytest.raises(KeyboardInterrupt):
        merge(zoo, tmp_path / "out", stop_after=15)
    return tmp_path / "out.partial"


def same(out: Path, whole: Path) -> bool:
    lineages = (out / RECORD).read_bytes() == (whole / RECORD).read_bytes()
    return lineages and hash_files(out) == hash_files(whole)


def test_finished_shards_are_kept_and_nothing_else(
    zoo: Zoo, tmp_path: Path, whole: Path, stopped: Path
) -> None:
    kept = {path.name for path in stopped.glob(SHARDS)}
    assert len(kept) > 2
    assert {path.name for path in stopped.iterdir()} == {*kept, FINISHED}
    assert not is_ready(stopped)
    made = merge(zoo, tmp_path / "out")
    assert made == {path.name for path in whole.glob(SHARDS)} - kept
    assert same(tmp_path / "out", whole)
    assert not stopped.exists()


def flip(stopped: Path) -> None:
    shard = min(stopped.glob(SHARDS))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def shorten(stopped: Path) -> None:
    shard = min(stopped.glob(SHARDS))
    shard.write_bytes(shard.read_bytes()[:-8])


def edit(stopped: Path) -> None:
    """A report that says something else, of a shard that is as it was."""
    record = min(stopped.glob(f"{FINISHED}/*.json"))
    fields = json.loads(record.read_text())
    fields["tensors"][0]["rule"] = "copy"
    record.write_text(json.dumps(fields))


def break_off(stopped: Path) -> None:
    record = min(stopped.glob(f"{FINISHED}/*.json"))
    record.write_text(record.read_text()[:100])


def lose(stopped: Path) -> None:
    min(stopped.glob(f"{FINISHED}/*.json")).unlink()


def swap(stopped: Path) -> None:
    """A record under the name of another shard."""
    first, second = sorted(stopped.glob(f"{FINISHED}/*.json"))[:2]
    shutil.copyfile(second, first)


@pytest.mark.parametrize("harm", [flip, shorten, edit, break_off, lose, swap])
def test_a_shard_that_is_not_as_it_was_is_made_anew(
    zoo: Zoo, tmp_path: Path, whole: Path, stopped: Path, harm: Callable[[Path], None]
) -> None:
    first, *others = sorted(path.name for path in stopped.glob(SHARDS))
    harm(stopped)
    made = merge(zoo, tmp_path / "out")
    assert first in made
    assert not made & set(others)
    assert same(tmp_path / "out", whole)


def test_what_is_no_finished_shard_is_deleted(
    zoo: Zoo, tmp_path: Path, whole: Path, stopped: Path
) -> None:
    (stopped / "sub").mkdir()
    for name in ("config.json", "model-x.safetensors", "sub/file", f"{FINISHED}/x.json", RECORD):
        (stopped / name).write_text("{}")
    merge(zoo, tmp_path / "out")
    assert same(tmp_path / "out", whole)


def test_another_merge_keeps_nothing(zoo: Zoo, tmp_path: Path, whole: Path, stopped: Path) -> None:
    files = {path.name for path in whole.glob(SHARDS)}
    assert merge(zoo, tmp_path / "out", epsilon=0.5) == files
    assert not same(tmp_path / "out", whole)


def test_a_refusal_keeps_nothing(zoo: Zoo, tmp_path: Path, stopped: Path) -> None:
    def refuse(done: int, total: int) -> None:
        raise SettingError("no")

    experts = {"a": zoo.full(1), "b": zoo.adapter(2)}
    with pytest.raises(SettingError):
        merge_checkpoints(
            zoo.base(sharded=True), experts, tmp_path / "out", METHOD, "cpu", progress=refuse
        )
    assert not any(tmp_path.iterdir())


def test_no_shard_is_recorded_before_the_sources_are_hashed(tmp_path: Path) -> None:
    kept = journal.Journal(tmp_path, Future())
    (tmp_path / "model.safetensors").write_bytes(b"1")
    kept.note(Shard("model.safetensors", "", ()))
    assert not (tmp_path / FINISHED).exists()


def test_a_folder_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever dies between any two steps leaves the old one, the new one, or none."""
    real, steps = Path.rename, [0]

    def rename(self: Path, target: Path) -> Path:
        steps[0] -= 1
        if steps[0] < 0:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").touch()
    for allowed, seen in ((0, [["old"]]), (1, []), (1, [["new"]])):
        steps[0] = allowed
        try:
            with new_folder(tmp_path / "out") as folder:
                (folder / "new").touch()
        except KeyboardInterrupt:
            assert seen != [["new"]]
        found = [sorted(p.name for p in f.iterdir()) for f in tmp_path.glob("out")]
        assert found == seen
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_text_that_finds_no_room_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *_: object, **__: object) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(MachineError, match=r"note could not be made \(No space left on device\)"):
        write_text(tmp_path / "note", "text")
    assert not any(tmp_path.iterdir())
