"""Bytes of files elsewhere, read by ranges: large ones in parts at a time, small ones in company.

A tensor that is smaller than a block comes with the block that it lies in. What is read next is
often its neighbour, and a request takes as long as many bytes do.
"""

from functools import lru_cache
from pathlib import Path

from poemerge.errors import CheckpointError
from poemerge.remote.places import Place, Span
from poemerge.remote.stand_ins import Remote

BLOCK = 512 << 10
KEPT = 128  # blocks, of all files together
PART = 8 << 20
PARTS = 8  # read at a time; what waits beside the tensor itself is no more than these


class RemoteHandle:
    """A file elsewhere to read from.

    That it stays as it was is for `unchanged` to see, as for files here.

    Args:
        remote: the file.
        path: of what stands for it here, which has its header.
    """

    def __init__(self, remote: Remote, path: Path) -> None:
        self._remote, self._path = remote, path
        with path.open("rb") as file:
            self._header = 8 + int.from_bytes(file.read(8), "little")

    def read(self, target: memoryview, start: int) -> None:
        """Fill `target` with the bytes from `start` on.

        Raises:
            CheckpointError: the file ends before that.
            SourceError: it is gone, or closed.
            UnreachableError: the storage does not answer.
        """
        if start + len(target) <= self._header:
            with self._path.open("rb") as file:
                file.seek(start)
                self._fill(target, file.read(len(target)))
        elif len(target) < BLOCK:
            self._read_blocks(target, start)
        else:
            for first in range(0, len(target), PARTS * PART):
                self._read_parts(target[first : first + PARTS * PART], start + first)

    def close(self) -> None:
        """Nothing is held open."""

    def _read_blocks(self, target: memoryview, start: int) -> None:
        end = start + len(target)
        numbers = range(start // BLOCK, -(-end // BLOCK))
        data = b"".join(_block(self._remote, number) for number in numbers)
        skipped = start - numbers.start * BLOCK
        self._fill(target, data[skipped : skipped + len(target)])

    def _read_parts(self, target: memoryview, start: int) -> None:
        cuts = [(cut, min(cut + PART, len(target))) for cut in range(0, len(target), PART)]
        spans = [(self._remote.name, start + first, start + end) for first, end in cuts]
        for (first, end), data in zip(cuts, _read(self._remote, spans), strict=True):
            self._fill(target[first:end], data)

    def _fill(self, target: memoryview, data: bytes) -> None:
        if len(data) != len(target):
            where = f"{self._remote.folder}/{self._remote.name}"
            raise CheckpointError(f"{where} has shrunk; merge again.")
        target[:] = data


def _read(remote: Remote, spans: list[Span]) -> list[bytes]:
    return Place(remote.folder).read(spans)


@lru_cache(maxsize=KEPT)
def _block(remote: Remote, number: int) -> bytes:
    start = number * BLOCK
    (data,) = _read(remote, [(remote.name, start, min(start + BLOCK, remote.size))])
    return data
