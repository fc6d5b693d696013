"""Seconds and peak memory of a step, in a file beside the outputs."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from poemerge.atomic import write_json

EVERY = 0.02  # seconds between two looks at the memory


@dataclass
class Cost:
    """What a step took.

    Attributes:
        seconds: wall time.
        peak_bytes: resident memory at its highest, above what the process held before.
    """

    seconds: float = 0.0
    peak_bytes: int = 0

    def write(self, path: Path) -> None:
        """Keep it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"seconds": round(self.seconds, 3), "peak_bytes": self.peak_bytes})


@contextmanager
def measure() -> Iterator[Cost]:
    """Yield a Cost that is filled when the block ends."""
    cost, done = Cost(), threading.Event()
    process = psutil.Process()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(EVERY):
            cost.peak_bytes = max(cost.peak_bytes, process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    start = time.perf_counter()
    watcher.start()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - start
        done.set()
        watcher.join()


@dataclass
class Pace:
    """How quick the pieces of a long work are."""

    pieces: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """One piece is done."""
        self.pieces += 1
        self.seconds += seconds

    def left(self, pieces: int) -> str:
        """How long so many more will take, in words."""
        minutes = pieces * self.seconds / max(1, self.pieces) / 60
        return f"about {minutes:.0f} min left" if minutes >= 1 else "less than a minute left"
