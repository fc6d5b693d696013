"""What every kind of source comes down to: bytes pinned by hashes, and a way to write them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poemerge.errors import UnreachableError

__all__ = ["OfflineError", "Origin", "UnreachableError"]


class OfflineError(UnreachableError):
    """The network is switched off here, so that trying again is of no use."""


@dataclass(frozen=True)
class Origin:
    """One source, resolved: nothing of it is open to change any more.

    Attributes:
        files: name → sha256 of each file that is read (`git:` and a blob's SHA-1 where a hub states
            no more than that before the download, `etag:` and its tag in an object storage).
        sha256: one hash for all of it: of the single file, or the digest of `files`.
        revision: the immutable name of these bytes: a commit, or a hash of the content.
        write: fills the empty folder that it is given with safetensors, config and tokenizer.
        settings: what else decides the bytes written.
        tools: packages whose versions shape the bytes written, beyond those of every record.
        parent: the lineage record found in the source, if any.
    """

    files: Mapping[str, str]
    sha256: str
    revision: str
    write: Callable[[Path], None]
    settings: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[str, ...] = ()
    parent: Mapping[str, Any] | None = None
