"""Cases in processes of their own: forked from one that has imported everything, within bounds.

`python -m tests.reliability.corpus.sandbox` reads cases from its standard input, a JSON line each,
and answers each with a line on how it ended.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self

SECONDS = 10  # of its own, computing
PATIENCE = 90  # seconds in all, on a machine that others use too; nothing waits for a FIFO so long
MEMORY = 2 << 30  # bytes of address space beyond what the libraries have taken


@dataclass(frozen=True)
class Ending:
    """How a case ended.

    Attributes:
        error: name of the error of the project's tree that it was refused by; empty if it was not.
        said: the sentence, or what the command wrote on stderr.
        code: exit code of a command; None for a call.
        told: what the command wrote on stdout.
        crash: a traceback, or what killed the process; empty as it should be.
    """

    error: str = ""
    said: str = ""
    code: int | None = None
    told: str = ""
    crash: str = ""


class Sandbox:
    """The process that forks; use as a context."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", __name__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        root = Path(__file__).parents[3]
        self._log = tempfile.TemporaryFile()
        self._server = subprocess.Popen(command, cwd=root, stderr=self._log, text=True, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()
        self._log.close()

    def run(self, way: str, folder: Path) -> Ending:
        """Go a way in, with the working directory in `folder`.

        Args:
            way: name of a function in `ways`.
            folder: of the case.
        """
        self._server.stdin.write(json.dumps([way, str(folder)]) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            self._log.seek(0)
            raise AssertionError(f"the sandbox broke: {self._log.read().decode()}")
        return Ending(**json.loads(answer))


def serve() -> None:
    """Answer every line until there is none."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        way, folder = json.loads(line)
        ways = import_module("tests.reliability.corpus.ways")
        ways.prepare(way)
        answers.write(json.dumps(_fork(ways.WAYS[way], Path(folder))) + "\n")
        answers.flush()


def _fork(go: Any, folder: Path) -> Mapping[str, Any]:
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            with os.fdopen(os.dup(file.fileno()), "w") as stream:
                json.dump(_attempt(go, folder), stream)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return {"crash": f"killed by {signal.Signals(os.WTERMSIG(status)).name}"}
        file.seek(0)
        return json.loads(file.read() or '{"crash": "it ended without a word"}')


def _attempt(go: Any, folder: Path) -> Mapping[str, Any]:
    from poemerge.errors import PoemergeError

    os.chdir(folder)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    used = int(time.process_time()) + 1
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, used + SECONDS + 1))
    signal.alarm(PATIENCE)
    try:
        return go(folder) or {}
    except PoemergeError as error:
        return {"error": type(error).__name__, "said": str(error)}
    except BaseException:  # noqa: BLE001 - whatever it is, the user would see it
        return {"crash": traceback.format_exc()}


if __name__ == "__main__":
    serve()
