"""What is done with models, in this process or in one of its own, and what it takes."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
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
    facts = [*Path("/proc/self/status").read_text().split("\\n"),
             *Path("/proc/self/io").read_text().split("\\n")]
    found = dict(line.split(":") for line in facts if line.startswith(("VmHWM", "rchar")))
    print(found["VmHWM"].split()[0], found["rchar"].strip(), file=sys.stderr)
"""


@dataclass(frozen=True)
class Usage:
    """What a process took.

    Attributes:
        seconds: of the processor.
        peak: largest resident memory in bytes.
        read: bytes, from files and all else.
    """

    seconds: float
    peak: int
    read: int


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
    peak, read = done.stderr.split()[-2:]
    return Usage(_children() - before, int(peak) << 10, int(read))


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
