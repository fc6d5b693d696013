"""How far a pull from a DVC remote is, in bytes."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from fsspec.callbacks import Callback

from tasks.progress import megabytes


class Pulled(Callback):  # type: ignore[misc]  # fsspec has no types
    """Adds up what has arrived of every file, for whoever watches.

    Args:
        source: for people.
        remote: of DVC, which is asked how large the files are.
        files: hashes of those that are to come.
    """

    def __init__(self, source: str, remote: Any, files: Iterable[str]) -> None:
        super().__init__()
        self._tell, self._parts = megabytes(source), list[_Part]()
        self._sizes = {path: _size(remote, path) for path in map(remote.oid_to_path, files)}

    def branched(self, path_1: str, *_to: str, **_options: Any) -> "_Part":
        """What the transfer of one file calls."""
        part = _Part(self._sizes.get(path_1, 0), hooks={"sum": self._sum})
        self._parts.append(part)
        return part

    def _sum(self, *_counts: int) -> None:
        whole = sum(self._sizes.values())
        self._tell(min(sum(part.value for part in self._parts), whole), whole)


class _Part(Callback):  # type: ignore[misc]  # as above
    """One file; of a copy from a folder nothing is heard before its end."""

    def close(self) -> None:
        self.absolute_update(self.size)


def _size(remote: Any, path: str) -> int:
    with suppress(FileNotFoundError):  # the transfer will say so
        return int(remote.fs.size(path) or 0)
    return 0
