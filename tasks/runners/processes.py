"""Workers that are processes of this machine, one for each device; who dies is replaced."""

import logging
import multiprocessing
import signal
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from typing import Self

from poemerge.device import pick_device, split_devices
from poemerge.errors import MachineError, PoemergeError, SettingError
from poemerge.merging.shards import Shard
from poemerge.merging.work import ShardJob, Work, make_shard

TRIES = 3  # of a job whose worker dies

logger = logging.getLogger(__name__)
_spawn = multiprocessing.get_context("spawn")  # a fork would inherit threads and a GPU


def devices_of(device: str, workers: int | None) -> tuple[str, ...]:
    """The device of each worker.

    Raises:
        SettingError: there are fewer GPUs than workers, or more.
    """
    named = split_devices(device)
    if workers in {None, len(named)}:
        return named
    if len(named) > 1 or pick_device(device).type != "cpu":
        raise SettingError(
            f"workers is {workers}, and device names {len(named)}; each worker wants a GPU of its "
            "own: name as many (cuda:0,cuda:1), or leave workers out."
        )
    return named * (workers or 1)


class Processes:
    """A runner whose workers are processes.

    Args:
        devices: of the workers, one each.
        work: what a worker does with a job.
    """

    def __init__(self, devices: Sequence[str], work: Work = make_shard) -> None:
        self.devices, self.work = devices, work

    def __call__(self, jobs: Sequence[ShardJob], done: Callable[[Shard], None]) -> None:
        """Do all jobs, each by the worker that is free first.

        Raises:
            PoemergeError: one was refused; or its workers died, one after another.
        """
        todo, lost, made = deque(jobs), Counter[str](), list[Shard]()
        with ExitStack() as stack:
            count = min(len(self.devices), len(jobs))
            workers = [stack.enter_context(Worker(d, self.work)) for d in self.devices[:count]]
            while todo or made or any(worker.job for worker in workers):
                for worker in (w for w in workers if w.job is None):
                    if todo:
                        worker.begin(todo.popleft())
                while made:  # the head looks at these while the workers are at the next
                    done(made.pop())
                for worker in _ready(workers):
                    job, shard = worker.end()
                    if shard is not None:
                        made.append(shard)
                        continue
                    lost[job.file] += 1
                    _check_tries(job, lost[job.file])
                    todo.appendleft(job)


class Worker:
    """One process; use as a context, which ends it.

    Attributes:
        job: that it is at, if any.
    """

    def __init__(self, device: str, work: Work) -> None:
        self.device, self._work = device, work
        self.job: ShardJob | None = None
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = _spawn.Pipe()
        # A daemon, for it ends with us; it starts no processes of its own.
        given = (theirs, self.device, self._work)
        self._process = _spawn.Process(target=_serve, args=given, daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, job: ShardJob) -> None:
        """Give it a job; if it is dead, `end` will say so."""
        self.job = job
        try:
            self.pipe.send(job)
        except BrokenPipeError:
            logger.debug("the worker on %s was dead already", self.device)

    def end(self) -> tuple[ShardJob, Shard | None]:
        """The job that it was at and the shard, or None if it died; a new one then stands ready.

        Raises:
            PoemergeError: what the job was refused for; or any error that it raised.
        """
        assert self.job is not None
        job, self.job = self.job, None
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.close()
            self._start()
            return job, None
        if isinstance(answer, BaseException):
            raise answer
        return job, answer

    def close(self) -> None:
        """End the process, whatever it is at."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self.pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ready(workers: Sequence[Worker]) -> list[Worker]:
    """Those that have an answer, or have died; waits for the first, if any is at work."""
    busy = [worker for worker in workers if worker.job is not None]
    ready = wait([worker.pipe for worker in busy]) if busy else []
    return [worker for worker in busy if worker.pipe in ready]


def _check_tries(job: ShardJob, died: int) -> None:
    if died >= TRIES:
        raise MachineError(
            f"{died} workers died at {job.file}, one after another; see whether the system ended "
            "them for want of memory, and set `memory`, or have fewer workers."
        )
    logger.warning("a worker died at %s; another one makes it", job.file)


def _serve(pipe: Connection, device: str, work: Work) -> None:
    """Do jobs until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the head's, which ends us
    while True:
        try:
            job: ShardJob = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(job.on(device), work))


def _answer(job: ShardJob, work: Work) -> Shard | Exception:
    try:
        return work(job)
    except PoemergeError as error:
        return error
    except Exception as error:  # noqa: BLE001 - it is raised again by the head
        error.add_note(traceback.format_exc())
        return error
