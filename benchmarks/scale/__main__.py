"""What merging 70 B and 405 B parameters would take, written to docs/scale.md: a simulation.

python -m benchmarks.scale
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.plan_table import amount, span
from flows.planning import Outlook, Wanted
from poemerge.merging.rates import Rates

HERE = Path(__file__).parent
PAGE = Path("docs/scale.md")
HOUR = 3600.0


@dataclass(frozen=True)
class Machines:
    """Workers that are assumed.

    Attributes:
        name: of one set of them.
        workers: how many.
        rates: of each.
        room: GB of memory that each may use.
        storage: bytes a second that all of them share.
        price: of a worker, in dollars an hour.
        meaning: where the numbers come from.
    """

    name: str
    workers: int
    rates: Rates
    room: float
    storage: float
    price: float
    meaning: str


GPUS = Machines(
    name="8 GPUs",
    workers=8,
    rates=Rates(bandwidth=3e9, hashing=1.8e9, single=36e12, double=40e12, memory=2.5e12),
    room=220.0,
    storage=10e9,
    price=3.0,
    meaning="an H200 each; 70 % of the matmul rates of the benchmarks, copies at 60 %",
)
CPUS = Machines(
    name="16 CPU nodes",
    workers=16,
    rates=Rates(bandwidth=1.25e9, hashing=1.8e9, single=3e12, double=1.5e12, memory=200e9),
    room=220.0,
    storage=10e9,
    price=2.0,
    meaning="64 cores and 256 GB each, on 10 Gbit/s",
)


@dataclass(frozen=True)
class Case:
    """A merge that nobody has to do."""

    model: str
    config: str
    experts: int
    method: str
    rank: int | None = None

    @property
    def title(self) -> str:
        """For the table."""
        kind = "full" if self.rank is None else f"LoRA {self.rank}"
        return f"{self.experts} × {self.model}, {kind}"

    def outlook(self, machines: Machines) -> Outlook:
        """What it takes there."""
        wanted = Wanted(str(HERE / self.config), {}, self.experts, self.rank)
        with wanted.headers() as plan_of, plan_of(self.method, {}) as plan:
            return Outlook.of(
                plan,
                "cpu",
                machines.rates,
                workers=machines.workers,
                memory=machines.room,
                storage=machines.storage,
            )


SMALLER, LARGER = ("70 B", "llama-3.1-70b.json", 8), ("405 B", "llama-3.1-405b.json", 4)
METHODS = ("average", "ties", "gaussian_poe", "cauchy_poe")
CASES = [
    Case(*model, method, rank)
    for model in (SMALLER, LARGER)
    for method, rank in [*((name, None) for name in METHODS), ("cauchy_poe", 16)]
]


def page(cases: list[Case]) -> str:
    """The whole page."""
    parts = [(HERE / "head.md").read_text(encoding="utf-8").strip(), _assumed()]
    for machines in (GPUS, CPUS):
        parts += [f"## {machines.name}", "\n".join(_table(cases, machines))]
    return "\n\n".join(parts) + "\n"


def _assumed() -> str:
    columns = ("disk or network", "shared", "sha256", "fp32", "fp64", "memory", "room", "price")
    head = f"| workers | {' | '.join(columns)} | each |"
    line = f"|:--|{'--:|' * len(columns)}:--|"
    rows = [
        f"| {m.name} | {amount(m.rates.bandwidth, 'B/s')} | {amount(m.storage, 'B/s')} "
        f"| {amount(m.rates.hashing, 'B/s')} | {amount(m.rates.single, 'FLOP/s')} "
        f"| {amount(m.rates.double, 'FLOP/s')} | {amount(m.rates.memory, 'B/s')} "
        f"| {m.room:.0f} GB | {m.price:.2f} $/h | {m.meaning} |"
        for m in (GPUS, CPUS)
    ]
    return "\n".join(["## What is assumed", "", head, line, *rows])


def _table(cases: list[Case], machines: Machines) -> Iterator[str]:
    yield (
        "| merge | method | jobs | read | written | operations | memory of a worker | time "
        "| busy | most of it is | $ |"
    )
    yield "|:--|:--|" + "--:|" * 7 + ":--|--:|"
    for case in cases:
        found = case.outlook(machines)
        made, cost = found.schedules[machines.workers], found.cost
        dollars = machines.price * machines.workers * made.seconds / HOUR
        yield (
            f"| {case.title} | `{case.method}` | {len(found.jobs)} | {amount(cost.read, 'B')} "
            f"| {amount(cost.written, 'B')} | {amount(cost.single + cost.double, 'FLOP')} "
            f"| {amount(found.peak_bytes, 'B')} | {span(made.seconds)} | {made.busy:.0%} "
            f"| {made.bottleneck} | {dollars:.2f} |"
        )


if __name__ == "__main__":
    PAGE.write_text(page(CASES), encoding="utf-8")
