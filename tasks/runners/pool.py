"""Workers for calls that go side by side in threads, each of which has a job or none."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from contextvars import copy_context
from queue import SimpleQueue
from typing import Generic, Self, TypeVar

from tasks.runners.worker import AnswerT, JobT, Worker

MadeT = TypeVar("MadeT")


class Pool(Generic[JobT, AnswerT]):
    """Processes of this machine, one for each device; use as a context, which ends them.

    Args:
        devices: of the workers, one each; a worker starts with its first job, and stays.
        work: what a worker does with a job.
    """

    def __init__(self, devices: Sequence[str], work: Callable[[JobT], AnswerT]) -> None:
        self._workers = [Worker(device, work) for device in devices]
        self._free = SimpleQueue[Worker[JobT, AnswerT]]()
        for worker in self._workers:
            self._free.put(worker)

    def run(self, calls: Sequence[Callable[[], MadeT]]) -> list[MadeT]:
        """Make the calls, as many at once as there are workers; what they return, in order.

        Raises:
            Exception: the first that a call raised; it ends the others too.
        """
        with ThreadPoolExecutor(len(self._workers)) as threads:
            futures = [threads.submit(copy_context().run, call) for call in calls]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                for worker in self._workers:
                    worker.stop()
                raise
        return [future.result() for future in futures]

    def do(self, job: JobT) -> AnswerT:
        """Have the next worker that is free do a job; for the threads of `run`.

        Raises:
            PoemergeError: it was refused; or its workers died, one after another.
        """
        worker = self._free.get()
        try:
            worker.begin(job)
            while (answer := worker.hear()) is None:
                pass
            return answer
        finally:
            self._free.put(worker)

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        for worker in self._workers:
            self._stack.enter_context(worker)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
