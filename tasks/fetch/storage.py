"""`s3://bucket/folder`, `gs://`, and what else fsspec knows: a folder of an object storage."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from poemerge.errors import SourceError
from poemerge.hashing import digest
from poemerge.layout import RECORD
from poemerge.lineage import Lineage
from poemerge.remote.places import Entry, Place
from tasks.fetch.layout import select
from tasks.fetch.origin import Origin
from tasks.fetch.pickles import settle


def open_storage(url: str) -> Origin:
    """Take the tags of the model files at `url` for what they hold; nothing is downloaded yet.

    Raises:
        SourceError: there is nothing, it is closed to us, or it holds no weights.
        UnreachableError: the storage does not answer.
    """
    place = Place(url)
    there = place.listing()
    found = {name: there[name] for name in select(url, there)}
    files = {name: entry.tag for name, entry in found.items()}
    content = digest(files)
    return Origin(
        files,
        sha256=content,
        revision=content,
        write=partial(_download, place, found),
        parent=_parent(place) if RECORD in there else None,
    )


def _download(place: Place, files: Mapping[str, Entry], folder: Path) -> None:
    for name in files:
        place.get(name, folder / name)
    now = place.listing()
    for name, entry in files.items():
        if now.get(name) != entry or (folder / name).stat().st_size != entry.size:
            raise SourceError(f"{place.url}/{name} changed while it was copied; fetch it again.")
    settle(folder, files)


def _parent(place: Place) -> dict[str, Any] | None:
    with TemporaryDirectory() as folder:
        place.get(RECORD, Path(folder, RECORD))
        found = Lineage.find(Path(folder))
    return None if found is None else asdict(found)
