"""Shards that a merge has finished: sealed records, by which the next try keeps what holds.

A record is trusted if its seal fits and it speaks of this very merge, a shard if it has the hash of
its record. Nothing else in the folder is.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from poemerge.atomic import PARTIAL, write_json
from poemerge.checkpoint import read_json
from poemerge.errors import CheckpointError
from poemerge.hashing import digest, sha256
from poemerge.layout import FINISHED
from poemerge.lineage import Lineage
from poemerge.merging.shards import Shard
from poemerge.remote.delivery import hand_over
from poemerge.remote.stand_ins import url_of
from poemerge.report import TensorReport


class Journal:
    """The records of one merge, in a folder among its shards; use as a context.

    Args:
        folder: of the shards.
        lineage: of the merge, once its inputs are hashed; no shard is recorded before.
    """

    def __init__(self, folder: Path, lineage: "Future[Lineage]") -> None:
        self._folder, self._lineage = folder, lineage
        self._waiting: dict[str, Shard] = {}

    def find(self, files: Iterable[str]) -> list[Shard]:
        """Shards that were finished before and still hold; all else in the folder is deleted.

        Args:
            files: names of the merge's shards.
        """
        found = [shard for file in sorted(files) if (shard := self._read(file))]
        self._clear(shard.file for shard in found)
        return found

    def note(self, shard: Shard) -> None:
        """Record a shard that is complete, or see that it will be."""
        self._waiting[shard.file] = shard
        if self._lineage.done() or url_of(self._folder):  # what goes elsewhere is to take no room
            self._flush()

    def close(self) -> None:
        """Delete the records, and what workers left that died: the merge is complete."""
        self._waiting.clear()
        records = self._folder / FINISHED
        for path in (*records.glob("*"), *self._folder.glob(f"*{PARTIAL}")):
            if path != records:
                path.unlink()
        with suppress(FileNotFoundError):
            records.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave finished shards to the next try, and nothing else."""
        if kind is not None:
            recorded = [path.stem for path in self._folder.glob(f"{FINISHED}/*.json")]
            self._clear([*recorded, *self._waiting])  # first: the disk may be full
            if self._waiting and self._lineage.exception() is None:
                self._flush()

    def _flush(self) -> None:
        while self._waiting:
            file, shard = self._waiting.popitem()
            fields = {"merge": self._merge, **asdict(shard)}
            self._path(file).parent.mkdir(exist_ok=True)
            write_json(self._path(file), fields | {"seal": digest(fields)})
            hand_over(self._folder / file, shard.sha256, self._path(file))

    def _read(self, file: str) -> Shard | None:
        """A shard that was finished, if it and its record can be trusted."""
        try:
            fields = read_json(self._path(file))
        except CheckpointError:
            return None
        seal, path = fields.pop("seal", None), self._folder / file
        if not path.is_file() or seal != digest(fields) or fields["merge"] != self._merge:
            return None
        known = _shard(fields)
        return known if (known.file, known.sha256) == (file, sha256(path)) else None

    @property
    def _merge(self) -> str:
        """Sources, settings, code, packages and device: all that decides the bytes."""
        return digest(asdict(self._lineage.result()))

    def _path(self, file: str) -> Path:
        return self._folder / FINISHED / f"{file}.json"

    def _clear(self, kept: Iterable[str]) -> None:
        """Delete what belongs to no shard that is kept."""
        spared = {path for file in kept for path in (self._folder / file, self._path(file))}
        for path in sorted(self._folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                with suppress(OSError):  # it is not empty
                    path.rmdir()
            elif path not in spared:
                path.unlink()


def _shard(fields: Mapping[str, Any]) -> Shard:
    tensors = tuple(TensorReport.of(tensor) for tensor in fields["tensors"])
    return Shard(fields["file"], fields["sha256"], tensors, tuple(fields["spilled"]))
