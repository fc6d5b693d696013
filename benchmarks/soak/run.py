"""One merge after the other, with a look at everything after each."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from prefect.client.schemas.objects import FlowRun

from benchmarks.soak.gauges import gauge
from benchmarks.soak.system import System

SOURCE_EVERY = 4  # merges: an expert is new, else a setting
SCORED_EVERY = 5  # merges: one is evaluated, registered and reported, the others merged alone
IDLE_EVERY = 10  # merges: one more run, which finds nothing to do


@dataclass(frozen=True)
class Merged:
    """One merge, and a run without work where one followed it.

    Attributes:
        run: as Prefect has it at its end.
        idle: that run, or None.
        scored: it was evaluated, registered and reported.
        model: sha256 of the merged weights.
        seconds: from when the merge was due to the end of its process.
        readings: of everything, after both.
    """

    run: FlowRun
    idle: FlowRun | None
    scored: bool
    model: str
    seconds: float
    readings: dict[str, float]


def soak(system: System, merges: int) -> Iterator[Merged]:
    """Merge anew, `merges` times: every merge makes bytes that were not there before."""
    for step in range(merges):
        scored = _falls(step, SCORED_EVERY)
        system.score(wanted=scored)
        if _falls(step, SOURCE_EVERY):
            system.move_source(step)
        else:
            system.move_setting(step)
        start = time.monotonic()
        run = system.run()
        seconds = time.monotonic() - start
        idle = system.run() if _falls(step, IDLE_EVERY) else None
        yield Merged(run, idle, scored, system.model, seconds, gauge(system))


def _falls(step: int, every: int) -> bool:
    """True for the last of every so many steps."""
    return step % every == every - 1
