"""A candidate of a search: merged, scored task by task, and thrown away."""

import json
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.places import Places
from flows.steps import merge_arguments
from poemerge.errors import PoemergeError
from poemerge.hashing import digest
from tasks.evaluate import RESULTS, evaluate, scoring_key
from tasks.merge import merge, merge_key


class MergeError(PoemergeError):
    """A candidate could not be merged; another one may."""


@dataclass(frozen=True)
class Candidate:
    """Settings of a method that are tried, and a name for people."""

    name: str
    method: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where candidates are merged and scored, one at a time.

    Attributes:
        root: folder of scores and of the one merged model that there is at a time.
    """

    places: Places
    root: Path

    def key(self, candidate: Candidate) -> str:
        """What decides the candidate's scores on validation: all that goes into them."""
        scoring = scoring_key(self.places.base, splits=["validation"], **self._scoring)
        return digest([merge_key(**self._merging(candidate)), scoring])[:16]

    def validate(self, candidate: Candidate) -> Generator[tuple[str, float]]:
        """Task after task with its score; nothing is done that was done before.

        Raises:
            MergeError: the candidate cannot be merged.
            PoemergeError: it cannot be scored.
        """
        out = self.root / "scores" / self.key(candidate)
        tasks = self.places.params.evaluate.tasks
        known = _scores(out, "validation")
        with self._scratch():
            for count, task in enumerate(tasks, start=1):
                if task not in known:
                    self._merge(candidate)
                    self._evaluate(candidate, out, tasks[:count], "validation")
                    known = _scores(out, "validation")
                yield task, known[task]

    def test(self, candidate: Candidate, out: Path) -> dict[str, float]:
        """Task → score on test; `out` is a folder of evaluate's, made if it is not there."""
        if not (out / RESULTS).exists():
            with self._scratch():
                self._merge(candidate)
                self._evaluate(candidate, out, self.places.params.evaluate.tasks, "test")
        return _scores(out, "test")

    @contextmanager
    def _scratch(self) -> Iterator[None]:
        """No merged model before, nor after."""
        try:
            shutil.rmtree(self._merged, ignore_errors=True)  # of a process that was killed
            yield
        finally:
            shutil.rmtree(self._merged, ignore_errors=True)

    @property
    def _merged(self) -> Path:
        return self.root / "merged"

    @property
    def _scoring(self) -> dict[str, Any]:
        evaluate = self.places.params.evaluate
        return {**evaluate.scoring, "tasks": evaluate.tasks}

    def _merge(self, candidate: Candidate) -> None:
        if self._merged.exists():
            return
        try:
            named = merge.with_options(task_run_name=f"merge {candidate.name}")
            named(**self._merging(candidate), out=str(self._merged))
        except PoemergeError as error:
            raise MergeError(str(error)) from error

    def _merging(self, candidate: Candidate) -> dict[str, Any]:
        settings = {"strength": self.places.params.merge.strength, **candidate.settings}
        return merge_arguments(self.places, candidate.method, settings)

    def _evaluate(self, candidate: Candidate, out: Path, tasks: list[str], split: str) -> None:
        """Add scores to `out`; those that are there are kept, weights that are in memory too."""
        named = evaluate.with_options(task_run_name=f"evaluate {candidate.name} on {tasks[-1]}")
        how = {**self._scoring, "tasks": tasks, "splits": [split], "out": str(out)}
        # The method's name, not the candidate's: scores are kept whichever trial asks for them.
        named(candidate.method, "merge", str(self.places.base), str(self._merged), **how)


def _scores(out: Path, split: str) -> dict[str, float]:
    path = out / RESULTS
    if not path.exists():
        return {}
    scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
    return {task: cell[split]["score"] for task, cell in scores.items()}
