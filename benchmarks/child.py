"""A child process and what it took. Standard library only.

The peak that wait4 reports is inherited through fork and exec: a parent that is large itself would
show in every child. So whatever starts children here imports no torch.
"""

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.05  # seconds between looks at the child's memory
KIB = 1024


class ChildError(RuntimeError):
    """A child process failed; the message is what it said last."""


@dataclass(frozen=True)
class Usage:
    """What a child process took.

    Attributes:
        seconds: wall time from its start to its end.
        peak: largest resident memory in bytes, mapped files included, as the kernel kept it.
        anonymous: largest memory in bytes that no file backs, as sampled.
        output: what it printed.
    """

    seconds: float
    peak: int
    anonymous: int
    output: str


def run(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Usage:
    """Run a command and wait for it.

    Args:
        command: program and arguments.
        folder: to run in.
        environment: variables beside those of this process.

    Raises:
        ChildError: it did not exit with 0.
    """
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        sampler = _Sampler(child.pid)
        sampler.start()
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        sampler.join()
        output.seek(0)
        text = output.read().decode(errors="replace")
    if child.returncode != 0:
        raise ChildError(
            f"{' '.join(command[:4])} ... ended with {child.returncode}: {text[-2000:]}"
        )
    return Usage(seconds, usage.ru_maxrss * KIB, sampler.peak, text)


class _Sampler(threading.Thread):
    """Looks at a process's anonymous memory until the process is gone.

    In `status`, which the kernel keeps anyway; `smaps_rollup` walks every page, with the process
    waiting, and slows down what it measures.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.status = Path(f"/proc/{pid}/status")
        self.peak = 0

    def run(self) -> None:
        """Keep the largest value seen."""
        while (now := self._anonymous()) is not None:
            self.peak = max(self.peak, now)
            time.sleep(INTERVAL)

    def _anonymous(self) -> int | None:
        try:
            lines = self.status.read_text(encoding="utf-8").splitlines()
        except OSError:  # it has ended
            return None
        return next((KIB * int(x.split()[1]) for x in lines if x.startswith("RssAnon:")), None)
