"""Hashes of values, files and folders; a file that has not been touched since is read once."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock, Thread

from poemerge import documents
from poemerge.errors import SourceError
from poemerge.layout import RECORD
from poemerge.remote import stand_ins


def digest(value: object) -> str:
    """sha256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=dict)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_files(folder: Path) -> dict[str, str]:
    """Relative path → sha256 of every file below `folder`, lineage records left out, sorted.

    Raises:
        SourceError: one cannot be read.
    """
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    try:
        return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(files)}
    except OSError as error:
        reason = f"{error.filename} cannot be read ({error.strerror})"
        raise SourceError(f"{reason}; mend its permissions, or take it out.") from error


def check_text(path: Path) -> None:
    """Refuse a text that no model comes with, before hours go into its hash or its copy.

    Raises:
        SourceError: it is far too large.
    """
    if path.is_file() and path.stat().st_size > documents.SIZE:
        raise SourceError(
            f"{path} has {path.stat().st_size} bytes, where {documents.SIZE} are plenty; get it "
            "again, or take it out."
        )


def sha256(path: Path) -> str:
    """sha256 of a file; a file that has not been touched since is not read twice.

    Of what lies elsewhere it is the tag that its storage gave it, with the tag's kind before it.
    """
    if remote := stand_ins.find(path):
        return remote.identity
    stat = path.stat()
    key = (os.fspath(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    with _BUSY[key]:  # who asks for a file that is being hashed waits for that
        return _sha256(*key)


@cache
def _sha256(path: str, _inode: int, _size: int, _mtime_ns: int) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def forget_hashes() -> None:
    """See that every file is read again that is asked for from now on."""
    _sha256.cache_clear()


_BUSY: defaultdict[tuple[str, int, int, int], Lock] = defaultdict(Lock)


def hash_ahead(folders: Iterable[Path]) -> None:
    """Begin to hash what will be asked for, in the background; an error shows when it is."""

    def hash_all() -> None:
        for path in files:
            with suppress(OSError):
                sha256(path)

    found = (path for folder in folders for path in folder.rglob("*.safetensors"))
    files = iter([path for path in found if path.is_file()])
    for _ in range(2):  # daemons: who is refused does not wait for hashes that nobody wants
        Thread(target=hash_all, name="hash-ahead", daemon=True).start()
