"""The numbers of a report, read from folders: plain data, in the order in which they are shown."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.paired import Interval, Outcomes, difference, joint_level, score
from tasks.report.diagnostics import Detail
from tasks.report.layers import Place, places
from tasks.report.merges import Merge
from tasks.report.sources import BOARD, ENTRY, STATISTICS, Sources, read

FORMAT = "poemerge/report/1"
SPLIT = "test"


@dataclass(frozen=True)
class Candidate:
    """One row of the leaderboard.

    Attributes:
        scores: task → test score.
        mean: over its tasks, with its interval.
        kept: mean of score / that task's expert's score; None where tasks have no expert.
        behind: the best merge's mean less this one's, item by item; None for the best itself and
            for experts.
    """

    label: str
    kind: str
    scores: Mapping[str, float]
    mean: Interval
    kept: float | None
    behind: Interval | None


@dataclass(frozen=True)
class Numbers:
    """Everything that a report shows.

    Attributes:
        title: what the run is about.
        tasks: in the order of params.yaml.
        items: test items in all.
        candidates: base, experts, merges; best merge first.
        best: label of the merge that validation chose, or the only one.
        statistics: of the task vectors, as task_vectors.json has them; empty if unknown.
        merges: label → merge, in an order that scores do not change.
        details: label → what was found inside that merge, best first.
    """

    title: str
    tasks: tuple[str, ...]
    items: int
    candidates: tuple[Candidate, ...]
    best: str
    statistics: Mapping[str, Any]
    merges: Mapping[str, Merge]
    details: Mapping[str, Detail] = field(default_factory=dict)

    def of(self, kind: str) -> tuple[Candidate, ...]:
        """The candidates of one kind."""
        return tuple(each for each in self.candidates if each.kind == kind)

    @property
    def ranked(self) -> tuple[Merge, ...]:
        """The merges, best first on validation."""
        labels = [each.label for each in self.of("merge")] or list(self.merges)
        return tuple(self.merges[label] for label in labels)

    @cached_property
    def places(self) -> Mapping[str, Place]:
        """Matrix → where it stands in the model."""
        return places(m.name for merge in self.merges.values() for m in merge.matrices)

    def has_layers(self, names: Iterable[str]) -> bool:
        """True if any of these matrices stands in a layer."""
        return any(name in self.places for name in names)

    def as_json(self) -> dict[str, Any]:
        """Plain data: the same folders give the same bytes."""
        return {"format": FORMAT, **asdict(self)}


def gather(sources: Sources, *, seed: int) -> Numbers:
    """Read everything but what needs the weights themselves.

    Args:
        sources: folders.
        seed: of the bootstrap.

    Raises:
        SourceError: a file is missing, or two do not belong together.
    """
    sources.check()
    merges = {label: Merge.read(label, folder) for label, folder in sorted(sources.merges.items())}
    statistics = read(sources.task_vectors / STATISTICS) if sources.task_vectors else {}
    if sources.register is None:
        (only,) = merges
        return Numbers(only, (), 0, (), only, statistics, merges)
    board = read(sources.register / BOARD)
    outcomes = _outcomes(board["rows"], sources.evaluations)
    best = outcomes["merge", board["best"]]
    level = joint_level(sum(row["kind"] != "expert" for row in board["rows"]) - 1)
    rows = [
        _candidate(row, outcomes[row["kind"], row["label"]], best, level, seed)
        for row in board["rows"]
    ]
    return Numbers(
        read(sources.register / ENTRY)["name"],
        tuple(board["tasks"]),
        sum(map(len, best.values.values())),
        tuple(rows),
        board["best"],
        statistics,
        merges,
    )


def _outcomes(
    rows: Sequence[Mapping[str, Any]], evaluations: Mapping[str, Mapping[str, Path]]
) -> dict[tuple[str, str], Outcomes]:
    found = {}
    for row in rows:
        tasks = [task for task, by in row["scores"].items() if SPLIT in by]
        folder = evaluations[row["kind"]][row["label"]]
        found[row["kind"], row["label"]] = Outcomes.read(folder, tasks, SPLIT)
    return found


def _candidate(
    row: Mapping[str, Any], own: Outcomes, best: Outcomes, level: float, seed: int
) -> Candidate:
    scores = {task: float(row["scores"][task][SPLIT]["score"]) for task in own.values}
    compared = row["kind"] != "expert" and own is not best
    compared = compared and own.values.keys() == best.values.keys()
    return Candidate(
        row["label"],
        row["kind"],
        scores,
        score(own, seed=seed),
        row["normalised"].get(SPLIT),
        difference(best, own, level=level, seed=seed) if compared else None,
    )
