"""How sure a mean score is, and the difference of two candidates on the same items: bootstrap.

Items are drawn anew within each task, tasks are fixed: the mean over tasks is what is asked about,
not what other tasks would show.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Self

import numpy as np

from poemerge.documents import read_json
from poemerge.errors import SourceError

ITEMS = "items.json"
LEVEL = 0.95
RESAMPLES = 10_000
FEWEST = 2  # items of a task that resampling can tell apart
BATCH = 500  # resamples in memory at a time


@dataclass(frozen=True)
class Outcomes:
    """What a candidate did on every item of one split.

    Attributes:
        ids: task → hashes of its items, in order.
        values: task → metric of each of them.
    """

    ids: Mapping[str, tuple[str, ...]]
    values: Mapping[str, tuple[float, ...]]

    @classmethod
    def read(cls, folder: Path, tasks: Sequence[str], split: str) -> Self:
        """From items.json in the folder of an evaluation.

        Raises:
            SourceError: the file, a task or the split is missing or damaged.
        """
        try:
            items = read_json(folder / ITEMS)
            cells = {task: items[task][split] for task in tasks}
            found = cls(
                {task: tuple(map(_text, cell["ids"])) for task, cell in cells.items()},
                {task: tuple(map(_number, cell["outcomes"])) for task, cell in cells.items()},
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"{folder / ITEMS} lacks items ({error}); run evaluate again."
            raise SourceError(message) from error
        for task, ids in found.ids.items():
            if len(ids) != len(found.values[task]):
                message = f"{folder / ITEMS} lacks outcomes of {task}; run evaluate again."
                raise SourceError(message)
        return found


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no hash")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        raise TypeError(f"{value!r} is no finite number")
    return float(value)


@dataclass(frozen=True)
class Interval:
    """A mean over tasks, and where it lies in `level` of the resamples."""

    mean: float
    low: float
    high: float
    level: float = LEVEL

    @property
    def is_real(self) -> bool:
        """True if 0 lies outside: of a difference, that it is more than chance."""
        return self.low > 0 or self.high < 0


def joint_level(differences: int) -> float:
    """Level of each of so many intervals, all of which hold as often as LEVEL says (Bonferroni)."""
    return 1 - (1 - LEVEL) / max(1, differences)


def score(outcomes: Outcomes, *, level: float = LEVEL, seed: int = 0) -> Interval:
    """The mean over tasks of the mean outcome, with its interval.

    Raises:
        SourceError: a task has fewer than two items.
    """
    return _bootstrap(outcomes.values, level, seed)


def difference(left: Outcomes, right: Outcomes, *, level: float = LEVEL, seed: int = 0) -> Interval:
    """Mean score of `left` less that of `right`, item by item.

    Args:
        left: of one candidate.
        right: of another.
        level: how often the interval is to hold the difference; `joint_level` where several are
            judged together.
        seed: of the resamples.

    Raises:
        SourceError: they were scored on different tasks or items, or on fewer than two.
    """
    for task in {**left.ids, **right.ids}:
        if left.ids.get(task) != right.ids.get(task):
            message = f"Two candidates were scored on other items of {task}; run evaluate again."
            raise SourceError(message)
    values = {task: np.subtract(own, right.values[task]) for task, own in left.values.items()}
    return _bootstrap(values, level, seed)


def _bootstrap(values: Mapping[str, Any], level: float, seed: int) -> Interval:
    """Percentile interval of the mean of means; tasks are resampled apart."""
    for task, items in values.items():
        if len(items) < FEWEST:
            raise SourceError(f"Task {task} has {len(items)} item; an interval needs {FEWEST}.")
    samples = [np.asarray(items) for items in values.values()]

    from scipy.stats import bootstrap  # noqa: PLC0415 - 1 s

    def mean_of_means(*drawn: Any, axis: int = -1) -> Any:
        return np.mean([each.mean(axis) for each in drawn], axis=0)

    found = bootstrap(
        samples,
        mean_of_means,
        n_resamples=RESAMPLES,
        batch=BATCH,
        vectorized=True,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    return Interval(float(mean_of_means(*samples)), float(low), float(high), level)
