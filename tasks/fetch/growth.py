"""How far a download is that tells nobody: by what has arrived so far."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from pathlib import Path
from threading import Event, Thread

from tasks.progress import megabytes

EVERY = 0.25  # seconds between two looks


@contextmanager
def growing(folder: Path, source: str, total: int) -> Iterator[None]:
    """Tell whoever watches how much has arrived, while the block downloads.

    Args:
        folder: into which it downloads, whatever it calls its unfinished files.
        source: for people.
        total: bytes that are to come; 0 where nobody knows, and nothing is told.
    """
    tell, over = megabytes(source), Event()

    def watch() -> None:
        while not over.wait(EVERY):
            tell(min(_size(folder), total - 1), total)

    watcher = Thread(target=copy_context().run, args=(watch,), daemon=True)
    if total:
        watcher.start()
    try:
        yield
    finally:
        over.set()
        if total:
            watcher.join()
            tell(total, total)


def _size(folder: Path) -> int:
    """Bytes below a folder that somebody else is filling."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # it got its final name just now
            size += path.stat().st_size if path.is_file() else 0
    return size
