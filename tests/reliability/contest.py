"""Commands of poemerge that start at the same moment, each in a process of its own.

The processes are forked from one that has all imports behind it, so that they meet in the work and
not in the imports; nothing else is shared.
"""

import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE = 900  # seconds; a busy machine takes its time


@dataclass(frozen=True)
class Command:
    """What one contender does.

    Attributes:
        words: of the command line, after `poemerge`; or after `dvc` where `program` is that.
        folder: where.
        environment: what differs from ours.
        program: poemerge or dvc.
    """

    words: tuple[str, ...]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    program: str = "poemerge"


@dataclass(frozen=True)
class Ended:
    """How it ended.

    Attributes:
        code: its exit status; negative for a signal.
        said: its output and its errors.
    """

    code: int
    said: str


class Arena:
    """Where contenders start; its own process imports what they need, once.

    Args:
        environment: of all of them, beside ours.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.reliability.preload"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.fspath(ROOT))  # to it nobody tells sys.path
            for key, value in environment.items():
                patch.setenv(key, value)
            ensure_running()

    def contend(self, commands: Sequence[Command], log: Path) -> list[Ended]:
        """Start them together, and wait for all.

        Args:
            commands: at least one.
            log: folder for what they say.
        """
        log.mkdir(parents=True, exist_ok=True)
        barrier = self._context.Barrier(len(commands))
        files = [log / f"{number}.log" for number in range(len(commands))]
        processes = [
            self._context.Process(target=_run, args=(command, os.fspath(file), barrier))
            for command, file in zip(commands, files, strict=True)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE)
            process.kill()
            process.join()
        return [
            Ended(int(process.exitcode), file.read_text("utf-8", "replace"))
            for process, file in zip(processes, files, strict=True)
        ]


def _run(command: Command, log: str, barrier: Any) -> None:
    """In the new process: as the shell would start it."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.chdir(command.folder)
    os.environ |= {"POEMERGE_QUEUE": f"{log}-queue", "COLUMNS": "200", **command.environment}
    sys.argv = sys.orig_argv = [command.program, *command.words]
    barrier.wait(PATIENCE)
    with _prefect(command.environment):
        if command.program == "dvc":
            from dvc.cli import main

            sys.exit(main(list(command.words)))
        from flows.cli import main

        main(command.words)


@contextmanager
def _prefect(environment: Mapping[str, str]) -> Iterator[None]:
    """Let Prefect know, which has read the environment when it was imported."""
    from prefect import settings

    own = {getattr(settings, k): v for k, v in environment.items() if k.startswith("PREFECT_")}
    with settings.temporary_settings(own):
        yield
