"""Commands in processes of their own, forked from one that has imported everything.

So a blow comes in the midst of the work, and not of the imports.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

PATIENCE = 600.0  # seconds; a busy machine takes its time
HINT = "interrupted: run the same command again to go on."
FORKING = get_context("forkserver")
FORKING.set_forkserver_preload(
    [
        "flows.cli",
        "flows.pipeline",
        "flows.sweep",
        "poemerge.merge",
        "tasks.evaluate.harness",
        "tasks.register.registry",
        "tasks.tracking",
        "mlflow.store.tracking.sqlalchemy_store",
        "tests.reliability.commands",
    ]
)


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (minus the signal that killed it), what it said, seconds."""

    code: int
    said: str
    seconds: float

    @property
    def sentence(self) -> str:
        """Its last words."""
        return self.said.strip().rpartition("\n")[2]


@dataclass(frozen=True)
class Blow:
    """A signal to a command and all that it has started, so many seconds after its start."""

    signal: signal.Signals
    after: float


def command(
    arguments: Sequence[str | Path],
    folder: Path,
    *,
    blow: Blow | None = None,
    meanwhile: Callable[[], bool] | None = None,
) -> Ended:
    """Run `poemerge` with these arguments in a folder.

    Args:
        arguments: of the command.
        folder: working directory.
        blow: to strike, if it is still running then.
        meanwhile: called again and again while the command runs, until it returns True.
    """
    words = [os.fspath(word) for word in arguments]
    said = folder.parent / f"{folder.name}.said"
    begun = FORKING.Event()
    process = FORKING.Process(target=_child, args=(words, folder, said, dict(os.environ), begun))
    process.start()
    assert begun.wait(PATIENCE)
    start = time.monotonic()
    while meanwhile is not None and process.exitcode is None and not meanwhile():
        time.sleep(0.001)
    if blow is not None:
        process.join(blow.after)
        if process.exitcode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, blow.signal)
    process.join(PATIENCE)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"{words} did not end in {PATIENCE:.0f} s: {said.read_text()}")
    return Ended(process.exitcode, said.read_text(), time.monotonic() - start)


def _child(
    words: list[str], folder: Path, said: Path, environment: Mapping[str, str], begun: object
) -> None:
    """What happens in the process."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with said.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        temporary_settings,
    )

    from flows.cli import main

    settings = {
        PREFECT_API_URL: environment.get("PREFECT_API_URL"),
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
    }
    with temporary_settings(settings):
        begun.set()
        try:
            main(words, prog_name="poemerge")
        finally:  # it has ended; a blow from now on comes too late
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
