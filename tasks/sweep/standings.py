"""Who won: the best candidate of every method on test, and which differences are more than chance.

Validation chose the candidates and says which of them is the best; test is only reported. All
differences are taken to that one, so that no luck on test decides what they are compared with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tasks import paired
from tasks.paired import Interval, Outcomes
from tasks.sweep.search import Result

FORMAT = "poemerge/sweep/1"


@dataclass(frozen=True)
class Winner:
    """The best candidate of one method.

    Attributes:
        settings: as the space names them.
        key: names the folder of its scores, on validation and on test.
        validation: its mean score there.
        counts: complete, pruned, refused → how many candidates were.
        scores: task → score on test.
        test: its outcomes there.
        looks: how many of the method's candidates have been scored on test up to now.
    """

    label: str
    method: str
    settings: Mapping[str, Any]
    key: str
    validation: float
    counts: Mapping[str, int]
    scores: Mapping[str, float]
    test: Outcomes
    looks: int

    @property
    def entry(self) -> dict[str, Any]:
        """Its entry in `merge.methods`."""
        named = {} if self.method == self.label else {"method": self.method}
        return {**named, **self.settings}


@dataclass(frozen=True)
class Standing:
    """A winner among the others.

    Attributes:
        test: mean score, with its interval.
        gap: difference to the best; None for the best itself.
    """

    winner: Winner
    test: Interval
    gap: Interval | None

    @property
    def verdict(self) -> str:
        """What the gap means."""
        if self.gap is None:
            return "best on validation"
        return "real" if self.gap.is_real else "not distinguishable"

    def as_json(self) -> dict[str, Any]:
        """Plain data; the outcomes lie with the evaluation."""
        said = {name: value for name, value in vars(self.winner).items() if name != "test"}
        gap = asdict(self.gap) if self.gap else None
        return said | {"test": asdict(self.test), "gap": gap, "verdict": self.verdict}


def counts(results: Sequence[Result]) -> dict[str, int]:
    """How many candidates ended in which way."""
    ended = [result.state for result in results]
    return {state: ended.count(state) for state in ("complete", "pruned", "refused")}


def rank(winners: Sequence[Winner]) -> list[Standing]:
    """Best on validation first, the first of equals.

    All gaps together hold as often as one interval says (Bonferroni).

    Raises:
        SourceError: they were scored on different items.
    """
    ordered = sorted(winners, key=lambda winner: -winner.validation)
    best, *others = ordered
    level = paired.joint_level(len(others))
    gaps = [None, *(paired.difference(other.test, best.test, level=level) for other in others)]
    scores = [paired.score(winner.test) for winner in ordered]
    return [Standing(*row) for row in zip(ordered, scores, gaps, strict=True)]


def as_json(standings: Sequence[Standing], tasks: Sequence[str]) -> dict[str, Any]:
    """sweep.json: the same candidates and scores give the same bytes."""
    rows = [standing.as_json() for standing in standings]
    return {"format": FORMAT, "tasks": list(tasks), "best": rows[0]["label"], "rows": rows}
