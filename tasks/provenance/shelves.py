"""Folders with a record that lie about: fetched sources, merges, evaluations of this project."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from poemerge.errors import SourceError
from poemerge.hashing import digest
from poemerge.layout import RECORD
from poemerge.lineage import Lineage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shelves:
    """Records found below some folders, by what they claim to be; nothing is hashed.

    Attributes:
        records: folder → record, in the order of paths.
    """

    records: dict[Path, Lineage]

    @classmethod
    def below(cls, roots: Iterable[Path]) -> Self:
        """Look through `roots`; those that are not there hold nothing."""
        return cls(dict(found for root in roots for found in _records(root)))

    def claiming(self, content: str) -> list[Path]:
        """Folders whose record names exactly these outputs, given as the digest of a source."""
        return self._claims.get(content, [])

    @cached_property
    def _claims(self) -> dict[str, list[Path]]:
        claims: dict[str, list[Path]] = {}
        for folder, record in self.records.items():
            claims.setdefault(digest(dict(record.outputs)), []).append(folder)
        return claims

    def evaluations(self, record: Lineage) -> Iterator[Path]:
        """Folders of evaluations that have read these outputs."""
        made = record.outputs.items()
        for folder, found in self.records.items():
            if found.stage == "evaluate" and any(
                source.files and source.files.items() <= made for source in found.inputs
            ):
                yield folder


def _records(root: Path) -> Iterator[tuple[Path, Lineage]]:
    for path in sorted(root.rglob(RECORD)) if root.is_dir() else ():
        try:
            yield path.parent, Lineage.read(path)
        except SourceError as error:
            logger.warning("passed over: %s", error)
