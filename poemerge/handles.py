"""Files that are read at many places: kept open while few are, else opened anew for each read."""

import os
import resource
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from poemerge.errors import CheckpointError
from poemerge.remote import stand_ins
from poemerge.remote.ranges import RemoteHandle

SHARE = 2  # of the handles that a process may have, the part that is kept open here

_kept: set[int] = set()


def open_handle(path: Path) -> "Handle | RemoteHandle":
    """A file to read from, wherever its bytes lie."""
    remote = stand_ins.find(path)
    return Handle(path) if remote is None else RemoteHandle(remote, path)


class Handle:
    """A file to read from; what it held when it was opened, and nothing else.

    Many experts in many shards are more files than a process may have open at once.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        descriptor = os.open(path, os.O_RDONLY)
        self._was = _identity(descriptor)
        self._kept = descriptor if len(_kept) < _most() else None
        _kept.add(descriptor)
        self._let_go = weakref.finalize(self, _close, descriptor)
        if self._kept is None:
            self.close()

    def read(self, target: memoryview, start: int) -> None:
        """Fill `target` with the bytes from `start` on.

        Raises:
            CheckpointError: the file ends before that, or is another by now.
        """
        done = 0
        with self._descriptor() as descriptor:
            while done < len(target):
                count = os.preadv(descriptor, [target[done:]], start + done)
                if count == 0:
                    raise CheckpointError(f"{self.path} has shrunk; fetch it again.")
                done += count

    @contextmanager
    def _descriptor(self) -> Iterator[int]:
        if self._kept is not None:
            yield self._kept
            return
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            message = f"{self.path} is gone ({error.strerror}); fetch it again."
            raise CheckpointError(message) from error
        try:
            if _identity(descriptor) != self._was:
                raise CheckpointError(f"{self.path} has changed meanwhile; merge again.")
            yield descriptor
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Let go of it."""
        self._let_go()


def _most() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // SHARE


def _identity(descriptor: int) -> tuple[int, int, int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _close(descriptor: int) -> None:
    _kept.discard(descriptor)
    os.close(descriptor)
