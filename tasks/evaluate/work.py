"""A candidate to score as a job that any process of this machine can do: paths in, scores out."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from tasks.evaluate.task_files import TaskFiles

Cells = dict[str, dict[str, Any]]  # task → split → what is said of it


class Scores(NamedTuple):
    """What a candidate reached, as results.json and items.json have it."""

    results: Cells
    items: Cells


@dataclass(frozen=True)
class ScoreJob:
    """A candidate, and the tasks and splits that it is scored on.

    Attributes:
        candidate: its name.
        kind: as in `evaluate`.
        weights: as in `evaluate`.
        content: digest of the candidate's files.
        base: folder of the base.
        digest: of the base's files.
        splits: as in `evaluate`.
        how: the other settings of `evaluate`, with the one device on which it is done.
        threads: of the CPU; sums round by how they are split.
    """

    candidate: str
    kind: str
    weights: Path | None
    content: str
    base: Path
    digest: str
    tasks: tuple[TaskFiles, ...]
    splits: tuple[str, ...]
    how: Mapping[str, Any]
    threads: int

    def __str__(self) -> str:
        return f"evaluate {self.candidate}"

    def on(self, device: str) -> Self:
        """The same on another device of the same kind."""
        return replace(self, how={**self.how, "device": device})


def score(job: ScoreJob) -> Scores:
    """Do a job in this process, whose model stays in memory for the next.

    Raises:
        PoemergeError: see `evaluate`.
    """
    import torch  # noqa: PLC0415 - 1 s

    from tasks.evaluate.harness import Harness  # noqa: PLC0415 - lm-eval: 5 s

    if torch.get_num_threads() != job.threads:
        torch.set_num_threads(job.threads)
    found = Harness(job.base, job.digest, **job.how).score(
        job.candidate, job.kind, job.weights, job.tasks, job.splits, content=job.content
    )
    return Scores(
        {task: {split: by[split].summary() for split in by} for task, by in found.items()},
        {task: {split: by[split].items() for split in by} for task, by in found.items()},
    )
