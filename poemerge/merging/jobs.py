"""A merge as jobs, one for each shard of the output, and their spread over workers."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from poemerge.merging.cost import Cost, cost_of
from poemerge.merging.groups import Group
from poemerge.merging.plan import Plan
from poemerge.merging.rates import Rates


@dataclass(frozen=True)
class Job:
    """Everything that ends in one shard; it needs nothing of another job.

    Attributes:
        file: name of the shard.
        groups: of tensors, as the plan has them.
        cost: of all of it.
    """

    file: str
    groups: tuple[Group, ...]
    cost: Cost


@dataclass(frozen=True)
class Schedule:
    """Jobs spread over workers.

    Attributes:
        rates: of every worker, with its part of the storage.
        overhead: seconds that a job takes beside its work.
        loads: the jobs of each worker.
    """

    rates: Rates
    overhead: float
    loads: tuple[tuple[Job, ...], ...]

    @classmethod
    def balanced(
        cls, jobs: Sequence[Job], rates: Rates, workers: int, overhead: float = 0.0
    ) -> Self:
        """The longest job first, each to the worker that is free first.

        It ends at most 4/3 - 1/(3 W) times as late as the best spread (Graham 1969, doi
        10.1137/0117039).
        """
        free = [(0.0, worker) for worker in range(workers)]
        loads: list[list[Job]] = [[] for _ in range(workers)]
        for job in longest_first(jobs, rates):
            seconds, worker = heapq.heappop(free)
            loads[worker].append(job)
            heapq.heappush(free, (seconds + rates.total(job.cost) + overhead, worker))
        return cls(rates, overhead, tuple(map(tuple, loads)))

    @property
    def seconds(self) -> float:
        """Until the last worker ends."""
        return max(map(self.of_load, self.loads))

    @property
    def busy(self) -> float:
        """Part of that time in which an average worker has something to do."""
        return sum(map(self.of_load, self.loads)) / (len(self.loads) * self.seconds)

    @property
    def bottleneck(self) -> str:
        """What most of the time goes into."""
        parts = self.rates.seconds(Cost.sum(job.cost for load in self.loads for job in load))
        return max(parts, key=lambda part: parts[part])

    def of_load(self, load: Sequence[Job]) -> float:
        """Seconds of a worker's jobs."""
        return sum(self.rates.total(job.cost) + self.overhead for job in load)


def longest_first(jobs: Sequence[Job], rates: Rates) -> list[Job]:
    """In the order in which workers should begin them, each taking the next when it is free."""
    return sorted(jobs, key=lambda job: (-rates.total(job.cost), job.file))


def jobs(plan: Plan) -> tuple[Job, ...]:
    """The jobs of a plan, in the order of their shards' names."""
    files: dict[str, list[Group]] = {}
    for group in plan.groups:
        files.setdefault(group.file, []).append(group)
    return tuple(
        Job(file, tuple(own), Cost.sum(cost_of(group, plan) for group in own))
        for file, own in sorted(files.items())
    )
