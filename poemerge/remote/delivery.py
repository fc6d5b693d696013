"""A result elsewhere: made here piece by piece, each brought there as soon as it is finished.

Nothing can be renamed in an object storage, so the folder fills in place: shards first, each with
its record among the unfinished work, then what lies beside them, the index, and the lineage record
at the very end. What has no lineage record is not complete, and the next try goes on from it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from poemerge.atomic import is_refusal, write_json
from poemerge.checkpoint import read_json
from poemerge.errors import CheckpointError, SettingError
from poemerge.layout import FINISHED, INDEX, RECORD
from poemerge.remote import stand_ins
from poemerge.remote.places import Entry, Place, last_part
from poemerge.remote.stand_ins import Remote, StandIn

ARRIVED = ".arrived"  # what the storage said of a shard when it had come whole
STARTED = f"{FINISHED}/started"


def check_free(url: str, *, overwrite: bool) -> None:
    """Refuse a folder elsewhere that holds something, unless it is unfinished work.

    Raises:
        SettingError: it does, and `overwrite` is False.
        SourceError: it is closed to us.
    """
    there = Place(url).everything()
    unfinished = STARTED in there and RECORD not in there
    if there and not unfinished and not overwrite:
        raise SettingError(f"{url} exists already; choose another folder, or say `--overwrite`.")


@contextmanager
def delivered(url: str) -> Iterator[Path]:
    """Yield a folder here whose files are at `url` when the block has ended.

    Shards that are finished before that are brought there by `hand_over`, and take no room here
    afterwards. What an earlier try has left is taken over for the journal to judge; whatever else
    was there goes. Where the block is interrupted, or the network gives out, finished shards stay
    for the next try; where something is refused, they go.

    Raises:
        SourceError: the place is closed to us.
        UnreachableError: it does not answer.
    """
    place = Place(url)
    with TemporaryDirectory(prefix="poemerge-") as room:
        folder = stand_ins.empty_stand_in(url, Path(room, last_part(url)))
        _take_over(place, folder)
        try:
            yield folder
            _finish(place, folder)
        except BaseException as error:
            if is_refusal(error):
                place.remove(place.everything())
            raise


def hand_over(shard: Path, sha256: str, record: Path) -> None:
    """Bring a finished shard where its folder's files belong, if that is elsewhere.

    Args:
        shard: that is complete, here or, where a worker has brought it, already there.
        sha256: of it.
        record: of the journal, brought after it.
    """
    if not stand_ins.find(shard) and not bring(shard, sha256):
        return
    remote = stand_ins.find(shard)
    assert remote is not None
    arrived = record.with_name(shard.name + ARRIVED)
    write_json(arrived, asdict(remote))
    for path in (arrived, record):
        Place(remote.folder).put(path, f"{FINISHED}/{path.name}")


def bring(shard: Path, sha256: str) -> str:
    """Bring a shard where its folder's files belong; only what stands for it is left here.

    Returns:
        The tag that its storage gave it; nothing if it belongs here.
    """
    url = stand_ins.url_of(shard.parent)
    if not url:
        return ""
    entry = Place(url).put(shard, shard.name)
    shard.write_bytes(b"")
    stand_ins.note(shard, Remote(url, shard.name, *entry, sha256))
    return entry.tag


def receive(shard: Path, sha256: str, tag: str) -> None:
    """Let `shard` stand for one that a worker has brought there, if it is there as it was."""
    url = stand_ins.url_of(shard.parent)
    shard.unlink(missing_ok=True)
    entry = Place(url).entry(shard.name)
    if entry is not None and entry.tag == tag:
        stand_ins.note(shard, Remote(url, shard.name, *entry, sha256))


@contextmanager
def workplace(place: Path | str) -> Iterator[Path]:
    """Where a worker makes a shard: the place itself, or for a URL a folder that vanishes."""
    if isinstance(place, Path):
        yield place
        return
    with TemporaryDirectory(prefix="poemerge-") as room:
        yield stand_ins.empty_stand_in(place, Path(room, last_part(place)))


def _take_over(place: Place, folder: StandIn) -> None:
    """Leave no index and no lineage of older work; fetch the records of unfinished shards."""
    there = place.everything()
    place.remove({RECORD, INDEX} & there.keys())
    (folder / FINISHED).mkdir()
    for name in _records(there) if RECORD not in there else ():
        place.get(name, folder / name)
    for path in sorted((folder / FINISHED).glob(f"*{ARRIVED}")):
        with suppress(CheckpointError, TypeError):  # it is none of ours
            remote = Remote(**read_json(path))
            name = path.name.removesuffix(ARRIVED)
            if name == remote.name and there.get(name) == Entry(remote.size, remote.tag):
                stand_ins.note(folder / name, remote)
    started = folder / STARTED  # a place that takes nothing is found out before the work
    started.touch()
    place.put(started, STARTED)


def _finish(place: Place, folder: StandIn) -> None:
    """Bring what is left: what makes the folder complete comes last."""
    paths = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    there = place.everything()
    place.remove(there.keys() - paths.keys() - set(_records(there)))
    for name in sorted(paths, key=lambda name: (name == RECORD, name == INDEX, name)):
        if stand_ins.find(paths[name]) is None:
            place.put(paths[name], name)
    place.remove(_records(there))


def _records(there: Iterable[str]) -> list[str]:
    return [name for name in there if name.rpartition("/")[0] == FINISHED]
