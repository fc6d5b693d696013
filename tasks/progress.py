"""How far a long step is: told to whoever watches, by default to the log every few seconds."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from poemerge.progress import Progress

NEWS_EVERY = 5.0  # seconds between two lines
MB = 1_000_000  # bytes

Watcher = Callable[[str, str, int, int], None]  # step, what is counted, how many done, in all

logger = logging.getLogger(__name__)


class News:
    """A line in the log every few seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, step: str, unit: str, done: int, total: int) -> None:
        """Say how far the step is, unless something was said just now."""
        if time.monotonic() - self._last >= NEWS_EVERY:
            self._last = time.monotonic()
            logger.info("%s: %d of %d %s", step, done, total, unit)


_watchers: ContextVar[tuple[Watcher, ...]] = ContextVar("watchers", default=(News(),))


def watching() -> tuple[Watcher, ...]:
    """Who watches here."""
    return _watchers.get()


@contextmanager
def watched_by(*watchers: Watcher) -> Iterator[None]:
    """Let these watch, and nobody else, what the block does."""
    token = _watchers.set(watchers)
    try:
        yield
    finally:
        _watchers.reset(token)


def progress(step: str, unit: str) -> Progress:
    """What a step is to call with (done, in all).

    Args:
        step: its name, `merge ties` say.
        unit: what it counts, in the plural.
    """
    watchers = watching()

    def tell(done: int, total: int) -> None:
        for watcher in watchers:
            watcher(step, unit, done, total)

    return tell


def megabytes(step: str) -> Progress:
    """What a download is to call with (bytes there, bytes in all)."""
    tell = progress(step, "MB")

    def tell_whole(done: int, total: int) -> None:
        whole = max(1, round(total / MB))
        tell(whole if done >= total else min(done // MB, whole - 1), whole)

    return tell_whole
