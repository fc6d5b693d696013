"""Workers that are processes of this machine, one for each device; who dies is replaced."""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import wait

from poemerge.device import pick_device, split_devices
from poemerge.errors import SettingError
from poemerge.merging.shards import Shard
from poemerge.merging.work import ShardJob, Work, make_shard
from tasks.runners.worker import Worker


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


@dataclass(frozen=True)
class Processes:
    """A runner whose workers are processes.

    Attributes:
        devices: of the workers, one each.
        work: what a worker does with a job.
    """

    devices: Sequence[str]
    work: Work = make_shard

    def __call__(self, jobs: Sequence[ShardJob], done: Callable[[Shard], None]) -> None:
        """Do all jobs, each by the worker that is free first.

        Raises:
            PoemergeError: one was refused; or its workers died, one after another.
        """
        todo, made = deque(jobs), list[Shard]()
        with ExitStack() as stack:
            workers = [stack.enter_context(Worker(d, self.work)) for d in self.devices]
            while todo or made or any(worker.job for worker in workers):
                for worker in (w for w in workers if w.job is None):
                    if todo:
                        worker.begin(todo.popleft())
                while made:  # the head looks at these while the workers are at the next
                    done(made.pop())
                made += [shard for w in _ready(workers) if (shard := w.hear()) is not None]


def _ready(workers: Sequence[Worker[ShardJob, Shard]]) -> list[Worker[ShardJob, Shard]]:
    """Those that have something to say, or have died; waits for the first, if any is at work."""
    busy = [worker for worker in workers if worker.job is not None]
    ready = wait([worker.pipe for worker in busy]) if busy else []
    return [worker for worker in busy if worker.pipe in ready]
