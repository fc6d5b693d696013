"""What a merge would take on other machines: jobs, bytes, operations, memory, time."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from flows.overrides import in_bytes
from poemerge.device import pick_device
from poemerge.errors import SettingError
from poemerge.ghosts import adapter_expert, full_expert
from poemerge.merging.cost import Cost
from poemerge.merging.jobs import Job, Schedule, jobs
from poemerge.merging.plan import Plan, plan_merge
from poemerge.merging.rates import Rates
from poemerge.merging.terms import HEADERS
from tasks.fetch.headers import open_headers

GIGA = 1e9
GOOD = 0.9  # of the time that a worker has something to do: fewer workers are then no better split


@dataclass(frozen=True)
class Wanted:
    """What is to be merged.

    Attributes:
        base: a checkpoint, or its headers (`open_headers`).
        experts: name → likewise.
        count: experts of which there is nothing yet, like the base in all but their numbers.
        rank: of those, if they are LoRA adapters on every matrix; None for full fine-tunes.
    """

    base: str
    experts: Mapping[str, str]
    count: int
    rank: int | None

    @contextmanager
    def headers(self) -> Iterator[Callable[[str, Mapping[str, Any]], Plan]]:
        """What plans a method with its settings, over headers that the block has at hand."""
        with tempfile.TemporaryDirectory(prefix="poemerge-plan-") as room:
            folder = Path(room)
            base = open_headers(self.base, folder / "base")
            experts = {n: open_headers(s, folder / n) for n, s in self.experts.items()}
            for index in range(self.count):
                name = f"expert-{index}"
                experts[name] = self._imagined(base, folder / name)
            yield partial(plan_merge, base, experts, terms=HEADERS)

    def _imagined(self, base: Path, folder: Path) -> Path:
        if self.rank is None:
            return full_expert(base, folder)
        return adapter_expert(base, folder, self.rank)


@dataclass(frozen=True)
class Outlook:
    """What a planned merge would take.

    Attributes:
        jobs: one for each shard.
        peak_bytes: of the largest worker.
        schedules: by number of workers.
        notes: of the plan.
    """

    jobs: tuple[Job, ...]
    peak_bytes: int
    schedules: Mapping[int, Schedule]
    notes: tuple[str, ...]

    @property
    def cost(self) -> Cost:
        """Of all jobs."""
        return Cost.sum(job.cost for job in self.jobs)

    @property
    def longest(self) -> Job:
        """The job that no number of workers makes shorter."""
        rates = self.schedules[1].rates
        return max(self.jobs, key=lambda job: rates.total(job.cost))

    @property
    def best(self) -> int:
        """The most workers that are kept busy."""
        return max(n for n, each in self.schedules.items() if n == 1 or each.busy >= GOOD)

    @classmethod
    def of(
        cls,
        plan: Plan,
        device: str,
        rates: Rates,
        *,
        workers: int,
        memory: float | None = None,
        storage: float | None = None,
        overhead: float = 0.0,
    ) -> Self:
        """Spread a plan over 1, 2, 4 ... and `workers` workers.

        Args:
            plan: of the merge.
            device: of each worker: auto, cpu or cuda[:i].
            rates: of each worker.
            workers: how many there are.
            memory: GB that each may use.
            storage: bytes a second that all of them share, to where the checkpoints lie.
            overhead: seconds a job, beside its work.

        Raises:
            SettingError: the largest tensor group does not fit in `memory`.
        """
        plan = plan.fitted(pick_device(device), in_bytes(memory))
        todo = jobs(plan)
        counts = sorted({workers, *(2**i for i in range(workers.bit_length()))})
        schedules = {
            count: Schedule.balanced(todo, rates.sharing(storage, count), count, overhead)
            for count in counts
        }
        peak = plan.peak_bytes(pick_device(device), in_bytes(memory))
        return cls(todo, peak, schedules, plan.notes)

    def as_json(self) -> dict[str, Any]:
        """For scripts: bytes, operations, seconds."""
        return {
            "jobs": len(self.jobs),
            "cost": asdict(self.cost),
            "peak_bytes": self.peak_bytes,
            "best_workers": self.best,
            "schedules": {
                count: {
                    "seconds": each.seconds,
                    "busy": each.busy,
                    "bottleneck": each.bottleneck,
                    "jobs": [[job.file for job in load] for load in each.loads],
                }
                for count, each in self.schedules.items()
            },
            "notes": list(self.notes),
        }


def rates_of(given: Sequence[str], device: str) -> Rates:
    """Rates from `name=billions a second` texts; what is not given is measured here.

    Raises:
        SettingError: a name or a number is wrong.
    """
    names = [field.name for field in fields(Rates)]
    known: dict[str, float] = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            known[name] = float(value) * GIGA
        except ValueError:
            known[name] = 0.0
        if name not in names or not known[name] > 0:
            raise SettingError(
                f"{text!r} is no rate; write {'|'.join(names)}=N, in billions a second."
            )
    if len(known) == len(names):
        return Rates(**known)
    return replace(Rates.measured(pick_device(device)), **known)
