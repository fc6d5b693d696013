"""Sources that stay as they are while they are read: else a record would speak of other bytes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from poemerge.errors import SourceError
from poemerge.names import listed
from poemerge.remote import stand_ins
from poemerge.remote.places import Entry, Place

Stamp = tuple[int, int, int] | Entry  # inode, size, time of the last change; or size and tag


@contextmanager
def unchanged(folders: Iterable[Path]) -> Iterator[None]:
    """See that nobody changes, replaces or removes a file while the block reads it.

    Raises:
        SourceError: somebody did, whatever else went wrong because of it.
    """
    before = {folder: _stamps(folder) for folder in folders}
    try:
        yield
    except Exception as error:
        _check(before, error)
        raise
    _check(before)


def _stamps(folder: Path) -> dict[Path, Stamp]:
    if url := stand_ins.url_of(folder):
        there = Place(url).listing()
        return {folder / name: entry for name, entry in there.items()}
    files = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in files}


def _check(before: dict[Path, dict[Path, Stamp]], cause: Exception | None = None) -> None:
    for folder, stamps in before.items():
        now = _stamps(folder)
        other = sorted(path for path in stamps if now.get(path) != stamps[path])
        if other:
            message = (
                f"{listed(other, 1)} was changed or removed while it was read; run again once "
                f"{folder} stays as it is."
            )
            raise SourceError(message) from cause
