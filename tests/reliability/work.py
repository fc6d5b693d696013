"""What is done with models, in this process or in one of its own, and what it takes."""

import ctypes
import mmap
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from ctypes import c_int, c_long, c_size_t, c_void_p
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flows.provenance import history, verify
from poemerge.merge import merge_checkpoints
from poemerge.merging.plan import plan_merge
from tasks.report import write_report
from tasks.report.sources import Sources
from tests.reliability.many import Shapes, fine_tuned, normal, write

ROOT = Path(__file__).parents[2]
HANDLES = 256
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # what is freed goes back at once
CLI = "from flows.cli import main; main()"
USAGE = """
import atexit, sys
from pathlib import Path

@atexit.register
def tell():
    facts = Path("/proc/self/status").read_text().splitlines()
    print(*(line.split()[1] for line in facts if line.startswith("VmHWM")), file=sys.stderr)
"""


@dataclass(frozen=True)
class Usage:
    """What a process took.

    Attributes:
        seconds: of the processor.
        peak: largest resident memory in bytes.
    """

    seconds: float
    peak: int


def child(code: str, *arguments: object, end: int = 0) -> Usage:
    """Run Python with few handles.

    Raises:
        AssertionError: it does not exit with `end`.
    """
    few = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (HANDLES, HANDLES))
    before = _children()
    done = subprocess.run(
        [sys.executable, "-c", USAGE + code, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | RETURNED,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=few,
    )
    assert done.returncode == end, done.stdout + done.stderr
    return Usage(_children() - before, int(done.stderr.split()[-1]) << 10)


def cached(file: Path) -> int:
    """Bytes of a file that the system keeps in memory since they were read, mapped or not."""
    system, size = ctypes.CDLL(None, use_errno=True), file.stat().st_size
    system.mmap.restype, system.mmap.argtypes = c_void_p, [c_void_p, c_size_t, *[c_int] * 3, c_long]
    system.mincore.argtypes = [c_void_p, c_size_t, ctypes.c_char_p]
    system.munmap.argtypes = [c_void_p, c_size_t]
    with file.open("rb") as opened:
        start = system.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, opened.fileno(), 0)
    pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    failed = system.mincore(start, size, pages)
    system.munmap(start, size)
    assert not failed, os.strerror(ctypes.get_errno())
    return pages.raw.count(1) * mmap.PAGESIZE


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Work:
    """A base and two experts, and what is done with them."""

    def __init__(self, root: Path, shapes: Shapes) -> None:
        self.root, self.shapes = root, shapes
        base = normal(shapes, 0)
        self.base = write(root / "base", base)
        self.experts = {n: write(root / n, fine_tuned(base, s)) for s, n in ((1, "a"), (2, "b"))}

    def seconds(self, name: str, times: int) -> float:
        """Of the processor; the least of several."""
        return min(_seconds(getattr(self, name)) for _ in range(times))

    def all(self, steps: Iterable[str]) -> list[float]:
        """Seconds of one step after the other."""
        return [self.seconds(step, 1) for step in steps]

    def check(self) -> None:
        with plan_merge(self.base, self.experts, "cauchy_poe", {}) as plan:
            assert len(plan.rules) == len(self.shapes)
            assert plan.peak_bytes() > 0

    def merge(self) -> None:
        out = self.root / "out"
        settings = {"max_steps": 20, "rtol": 1e-2, "ridge": 1.0}
        report = merge_checkpoints(
            self.base, self.experts, out, "cauchy_poe", "cpu", overwrite=True, **settings
        )
        assert report.rules == {"matrix": len(self.shapes)}

    def lineage(self) -> None:
        assert len(history(str(self.root / "out")).as_json()) > 0

    def verify(self) -> None:
        given = [f"{name}={self.root / name}" for name in ("base", *self.experts)]
        assert not verify(str(self.root / "out"), given).problems

    def report(self) -> None:
        sources = Sources.find(self.root / "out", None, {})
        write_report(sources, self.root / "report", detail=0, side="input", seed=0, device="cpu")


def _seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
