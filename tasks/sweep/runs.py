"""The MLflow side of a sweep: one run for all of it, and a run below it for every candidate."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tasks.sweep.search import Result
from tasks.sweep.standings import Standing
from tasks.tracking import PARENT, bury, connected, ending, experiment_id, flat, marked_run

SWEEP, STATE, KIND = "poemerge.sweep", "poemerge.state", "poemerge.kind"
WINNER = "poemerge.winner"


@dataclass(frozen=True)
class Run:
    """One candidate's run."""

    client: Any
    id: str

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Add metrics now."""
        now = int(time.time() * 1000)
        for name, value in metrics.items():
            self.client.log_metric(self.id, name, value, now, step)

    def end(self, result: Result) -> None:
        """Say what became of the candidate."""
        self.client.set_tag(self.id, STATE, result.state)
        self.log({"seconds": result.seconds})
        if result.refused:
            self.client.set_tag(self.id, "poemerge.refused", result.refused)
        if result.state == "complete":
            self.log({"validation/mean": result.mean})


@dataclass(frozen=True)
class Runs:
    """The run of a sweep, and those below it."""

    client: Any
    place: str  # the experiment
    parent: str

    @contextmanager
    def candidate(
        self, name: str, kind: str, method: str, settings: Mapping[str, Any]
    ) -> Iterator[Run]:
        """A run below, which ends with the block."""
        tags = {PARENT: self.parent, KIND: kind, "poemerge.method": method}
        tags["poemerge.stage"] = "sweep"
        run = self.client.create_run(self.place, run_name=name, tags=tags).info.run_id
        with ending(self.client, run):
            for key, value in flat({"method": method, **settings}).items():
                self.client.log_param(run, key, value)
            yield Run(self.client, run)

    def winner(self, standing: Standing) -> None:
        """Log what a winner scored on test, once."""
        winner, test = standing.winner, standing.test
        if self._below(f"tags.`{WINNER}` = '{winner.label} {winner.key}'"):
            return
        name = f"{winner.label} on test"
        with self.candidate(name, "winner", winner.method, winner.settings) as run:
            self.client.set_tag(run.id, WINNER, f"{winner.label} {winner.key}")
            run.log({"validation/mean": winner.validation, "test/mean": test.mean})
            run.log({"test/low": test.low, "test/high": test.high})
            run.log({f"test/{task}": score for task, score in winner.scores.items()})

    def close(self, outcome: Mapping[str, Any]) -> None:
        """Keep the leaderboard with the sweep."""
        self.client.log_dict(self.parent, dict(outcome), "sweep.json")

    def _below(self, which: str) -> list[Any]:
        found = f"tags.`{PARENT}` = '{self.parent}' and {which}"
        return list(self.client.search_runs([self.place], found))


@contextmanager
def open_runs(experiment: str, sweep: str, params: Mapping[str, Any]) -> Iterator[Runs]:
    """The run of this sweep, gone on with where there is one.

    Args:
        experiment: its name.
        sweep: says which sweep it is.
        params: effective parameters of all stages and of the sweep, for the record.

    Raises:
        SourceError: MLflow refused something or cannot be reached.
    """
    with connected() as client:
        place = experiment_id(client, experiment)
        tags = {"poemerge.stage": "sweep"}
        parent = marked_run(client, place, "sweep", (SWEEP, sweep), tags).info.run_id
        client.update_run(parent, status="RUNNING")
        runs = Runs(client, place, parent)
        with ending(client, parent):
            bury(client, place, f"tags.`{PARENT}` = '{parent}'")
            client.log_dict(parent, dict(params), "params.yaml")
            yield runs
            bury(client, place, f"tags.`{PARENT}` = '{parent}'")  # and those that were begun twice
