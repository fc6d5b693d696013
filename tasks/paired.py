"""How sure a mean score is, and the difference of two candidates on the same items: bootstrap.

Items are drawn anew within each task, tasks are fixed: the mean over tasks is what is asked about,
not what other tasks would show.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from poemerge.errors import SourceError

ITEMS = "items.json"
LEVEL = 0.95
RESAMPLES = 10_000
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
            SourceError: the file, a task or the split is missing.
        """
        try:
            items = json.loads((folder / ITEMS).read_text(encoding="utf-8"))
            cells = {task: items[task][split] for task in tasks}
        except (OSError, ValueError, KeyError) as error:
            message = f"{folder / ITEMS} lacks items ({error}); run evaluate again."
            raise SourceError(message) from error
        return cls(
            {task: tuple(cell["ids"]) for task, cell in cells.items()},
            {task: tuple(map(float, cell["outcomes"])) for task, cell in cells.items()},
        )


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


def score(outcomes: Outcomes, *, seed: int = 0) -> Interval:
    """The mean over tasks of the mean outcome, with its interval."""
    return _bootstrap([np.asarray(values) for values in outcomes.values.values()], seed)


def difference(left: Outcomes, right: Outcomes, *, seed: int = 0) -> Interval:
    """Mean score of `left` less that of `right`, item by item.

    Raises:
        SourceError: they were scored on different items.
    """
    for task, ids in left.ids.items():
        if right.ids.get(task) != ids:
            message = f"Two candidates were scored on other items of {task}; run evaluate again."
            raise SourceError(message)
    values = left.values.items()
    return _bootstrap([np.subtract(own, right.values[task]) for task, own in values], seed)


def _bootstrap(samples: Sequence[Any], seed: int) -> Interval:
    """Percentile interval of the mean of means; samples are resampled apart."""
    from scipy.stats import bootstrap  # noqa: PLC0415 - 1 s

    def mean_of_means(*drawn: Any, axis: int = -1) -> Any:
        return np.mean([each.mean(axis) for each in drawn], axis=0)

    found = bootstrap(
        samples,
        mean_of_means,
        n_resamples=RESAMPLES,
        batch=BATCH,
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    return Interval(float(mean_of_means(*samples)), float(low), float(high))
