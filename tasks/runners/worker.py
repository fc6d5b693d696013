"""A process of this machine that does jobs on a device of its own; if it dies, it is replaced."""

import logging
import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

from poemerge.errors import MachineError, PoemergeError
from tasks.progress import progress, watched_by

TRIES = 3  # of a job whose worker dies

logger = logging.getLogger(__name__)
_spawn = multiprocessing.get_context("spawn")  # a fork would inherit threads and a GPU


class Job(Protocol):
    """What can be sent to a process; as a string it says what it makes."""

    def on(self, device: str) -> Self:
        """The same on another device of the same kind."""


JobT = TypeVar("JobT", bound=Job)
AnswerT = TypeVar("AnswerT")


class Told(NamedTuple):
    """How far a worker is; see `tasks.progress.Watcher`."""

    step: str
    unit: str
    done: int
    total: int


class Worker(Generic[JobT, AnswerT]):
    """One process, from its first job on; use as a context, which ends it.

    Args:
        device: where it computes.
        work: what it does with a job; never None.

    Attributes:
        job: that it is at, if any.
    """

    def __init__(self, device: str, work: Callable[[JobT], AnswerT]) -> None:
        self.device, self._work = device, work
        self.job: JobT | None = None
        self._died = 0  # how often at this job
        self._process: SpawnProcess | None = None
        self._is_stopped, self._lock = False, threading.Lock()

    def begin(self, job: JobT) -> None:
        """Give it a job; if it is dead, `hear` will find out."""
        self.job = job
        if self._process is None:
            self._start(job)
        with suppress(BrokenPipeError):
            self.pipe.send(job)

    def hear(self) -> AnswerT | None:
        """Wait for the next that it says: None while it is at its job, and then the answer.

        Its progress and its lines of the log are passed on as if they were of this process.

        Raises:
            PoemergeError: what the job was refused for, or any error that it raised; or workers
                died at it, one after another, or were stopped.
        """
        assert self.job is not None
        try:
            said = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._begin_again(self.job)
            return None
        if isinstance(said, logging.LogRecord):
            _log(said)
            return None
        if isinstance(said, Told):
            progress(said.step, said.unit)(said.done, said.total)
            return None
        self.job, self._died = None, 0
        if isinstance(said, BaseException):
            raise said
        answer: AnswerT = said
        return answer

    def stop(self) -> None:
        """End the process, whatever it is at; any thread may ask for it."""
        with self._lock:
            self._is_stopped = True
            if self._process is not None:
                self._process.kill()

    def _start(self, job: JobT) -> None:
        with self._lock:
            if self._is_stopped:
                raise MachineError(f"The worker at {job} was stopped; run again to go on.")
            self.pipe, theirs = _spawn.Pipe()
            # A daemon, for it ends with us; it starts no processes of its own.
            given = (theirs, self.device, self._work)
            self._process = _spawn.Process(target=_serve, args=given, daemon=True)
            self._process.start()
            theirs.close()

    def _begin_again(self, job: JobT) -> None:
        self._end()
        self._died += 1
        if self._died >= TRIES:
            raise MachineError(
                f"{self._died} workers died at {job}, one after another; see whether the system "
                "ended them for want of memory: lower `memory` or `evaluate.batch_size`, or have "
                "fewer workers."
            )
        self.begin(job)
        logger.warning("a worker died at %s; another one is at it", job)

    def _end(self) -> None:
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.join()
                self._process.close()
                self.pipe.close()
                self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()


def _log(record: logging.LogRecord) -> None:
    own = logging.getLogger(record.name)
    if own.isEnabledFor(record.levelno):
        own.handle(record)


class _Line:
    """The worker's end of the pipe, on which one thing is said at a time."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._lock = pipe, threading.Lock()

    def put_nowait(self, said: Any) -> None:
        """Say it; named as of a queue, which a QueueHandler asks for."""
        with self._lock:
            self._pipe.send(said)

    def tell(self, *told: Any) -> None:
        """Say how far it is."""
        self.put_nowait(Told(*told))


def _serve(pipe: Connection, device: str, work: Callable[[Any], Any]) -> None:
    """Do jobs until the other end is closed, as it is when the head dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the head's, which ends us
    line = _Line(pipe)
    logging.root.handlers = [QueueHandler(line)]  # type: ignore[arg-type]
    logging.root.setLevel(logging.INFO)  # the head leaves out what it does not show
    logging.raiseExceptions = False  # a line that a dead head does not take
    with suppress(EOFError, BrokenPipeError), watched_by(line.tell):
        while True:
            line.put_nowait(_answer(pipe.recv().on(device), work))


def _answer(job: Any, work: Callable[[Any], Any]) -> Any:
    try:
        return work(job)
    except PoemergeError as error:
        return error
    except Exception as error:  # noqa: BLE001 - it is raised again by the head
        error.add_note(traceback.format_exc())
        return error
