"""Who is best: scores of base, experts and merges as one table, and the choice among the merges.

The choice looks at the validation split only; the test split is what is reported.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self, get_args

from poemerge.errors import SourceError

Kind = Literal["base", "expert", "merge"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Choice = Literal["mean", "normalised"]
Scores = Mapping[
    str, Mapping[str, Mapping[str, Any]]
]  # task → split → score, stderr, items, metric
RESULTS = "results.json"
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Row:
    """One candidate.

    Attributes:
        label: `base`, an expert's name, or the name of a merge in params.yaml.
        scores: task → split → what results.json says.
        mean: split → mean score over all tasks; left out where a task has no score.
        normalised: split → mean of score / that task's expert's test score.
    """

    label: str
    kind: Kind
    scores: Scores
    mean: Mapping[str, float]
    normalised: Mapping[str, float]

    def score(self, task: str, split: str = "test") -> float | None:
        """The score on one task, or None where it was not evaluated."""
        cell = self.scores.get(task, {}).get(split)
        return None if cell is None else float(cell["score"])

    def summary(self) -> dict[str, dict[str, float]]:
        """Split → task, `mean` and `normalised` → score; splits without scores are left out."""
        summary: dict[str, dict[str, float]] = {}
        for split in SPLITS:
            cells = {task: by[split]["score"] for task, by in self.scores.items() if split in by}
            for name, means in (("mean", self.mean), ("normalised", self.normalised)):
                if split in means:
                    cells[name] = means[split]
            if cells:
                summary[split] = cells
        return summary


@dataclass(frozen=True)
class Leaderboard:
    """Base, experts in task order, then merges, best first on validation."""

    tasks: tuple[str, ...]
    choose: Choice
    rows: tuple[Row, ...]

    @property
    def best(self) -> Row:
        """The merge that validation chose."""
        return self.of("merge")[0]

    def of(self, kind: Kind) -> tuple[Row, ...]:
        """The rows of one kind, in order."""
        return tuple(row for row in self.rows if row.kind == kind)

    def as_json(self) -> dict[str, Any]:
        """Plain data: the same scores give the same bytes."""
        return asdict(self) | {"best": self.best.label}

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read leaderboard.json back.

        Raises:
            SourceError: the file is missing or is no leaderboard.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            rows = tuple(Row(**row) for row in raw["rows"])
            return cls(tuple(raw["tasks"]), raw["choose"], rows)
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"{path} is no leaderboard ({error}); run the register stage."
            raise SourceError(message) from error


@dataclass(frozen=True)
class Cost:
    """What a merge took: shown beside the scores, never stored with them, as it always differs."""

    seconds: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Comparison:
    """What one registration compares, and what MLflow is told besides.

    Attributes:
        merges: label → folder of the merged model.
        costs: label → what that merge took.
        params: effective parameters of the whole pipeline.
        overrides: `a.b=c` settings that params.yaml does not have.
        evaluations: (kind, label) → folder of the outcomes, item by item.
    """

    board: Leaderboard
    merges: Mapping[str, Path]
    costs: Mapping[str, Cost]
    params: Mapping[str, Any]
    overrides: tuple[str, ...]
    evaluations: Mapping[tuple[Kind, str], Path]


def leaderboard(
    scores: Mapping[tuple[Kind, str], Scores], tasks: Sequence[str], choose: Choice
) -> Leaderboard:
    """Rank the merges on validation.

    Args:
        scores: (kind, label) → scores, in the order in which equals are to stand.
        tasks: the columns.
        choose: `mean` of the scores, or mean of the scores `normalised` by the experts'.

    Raises:
        SourceError: there is no merge, or no expert to normalise by.
    """
    experts = {
        label: cells[label]["test"]["score"]
        for (kind, label), cells in scores.items()
        if kind == "expert" and cells[label]["test"]["score"] > 0
    }
    rows = [_row(kind, label, cells, tasks, experts) for (kind, label), cells in scores.items()]
    merges = [row for row in rows if row.kind == "merge"]
    if not all("validation" in getattr(row, choose) for row in merges):
        message = "No expert has a test score above zero; set register.choose to mean."
        raise SourceError(message)
    if not merges:
        message = "There is no merge to register; name one under merge.methods and run merge."
        raise SourceError(message)
    merges.sort(key=lambda row: -getattr(row, choose)["validation"])
    others = [row for row in rows if row.kind != "merge"]
    return Leaderboard(tuple(tasks), choose, (*others, *merges))


def _row(
    kind: Kind, label: str, cells: Scores, tasks: Sequence[str], experts: Mapping[str, float]
) -> Row:
    mean, normalised = {}, {}
    for split in SPLITS:
        found = {
            task: cells[task][split]["score"] for task in tasks if split in cells.get(task, {})
        }
        if len(found) == len(tasks):
            mean[split] = fmean(found.values())
        if experts and experts.keys() <= found.keys():
            normalised[split] = fmean(found[task] / expert for task, expert in experts.items())
    return Row(label, kind, cells, mean, normalised)


def read_scores(
    folder: Path, tasks: Iterable[str], splits: Sequence[str], maybe: Iterable[str] = ()
) -> Scores:
    """The scores in results.json.

    Args:
        folder: of an evaluation.
        tasks: must be there.
        splits: of each task; must be there.
        maybe: tasks that are taken too if they are there.

    Raises:
        SourceError: the file is missing, or a score is missing, or is no finite number.
    """
    path = folder / RESULTS
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
        tasks = dict.fromkeys((*tasks, *(task for task in maybe if task in scores)))
        chosen = {task: {split: scores[task][split] for split in splits} for task in tasks}
        finite = [math.isfinite(cell["score"]) for by in chosen.values() for cell in by.values()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path} lacks a score ({type(error).__name__}: {error}); run evaluate again."
        raise SourceError(message) from error
    if not all(finite):
        message = f"{path} holds a score that is not finite; run evaluate again."
        raise SourceError(message)
    return chosen


def read_costs(logs: Mapping[str, str]) -> dict[str, Cost]:
    """What each merge took, where its log is there."""
    costs = {}
    for label, path in logs.items():
        raw = json.loads(Path(path).read_text("utf-8")) if Path(path).is_file() else {}
        costs[label] = Cost(raw.get("seconds"), raw.get("peak_bytes"))
    return costs
