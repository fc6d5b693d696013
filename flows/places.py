"""Where every step's output lies.

A run with overrides must leave the outputs of the plain params.yaml alone, since dvc.lock speaks of
them. So a step whose parameters, and those of all before it, are the plain ones uses the plain
place; any other goes below `.poemerge/runs/`, in a folder named after the overrides.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.sections import Params
from poemerge.hashing import digest

PLAIN = Path("params.yaml")  # what dvc.yaml and dvc.lock speak of
ARTIFACTS = Path("artifacts")
RUNS = Path(".poemerge/runs")
CACHE = "POEMERGE_CACHE"  # names another folder for copies of what a command alone was given


def cache() -> Path:
    """Where the copies are kept that belong to no run."""
    return Path(os.environ.get(CACHE, Path.home() / ".cache" / "poemerge"))


@dataclass(frozen=True)
class Places:
    """Output folders of a run with `params`, where params.yaml itself says `plain`."""

    params: Params
    plain: Params

    @property
    def is_plain(self) -> bool:
        """True for a run without overrides, or with such as change nothing."""
        return self.params.sections == self.plain.sections

    @property
    def own(self) -> Path:
        """Root of what only this run has."""
        if self.is_plain:
            return ARTIFACTS
        return RUNS / digest(self.params.sections)[:12]

    @property
    def base(self) -> Path:
        """The fetched base."""
        return self._fetched / "base"

    @property
    def experts(self) -> dict[str, Path]:
        """Name → fetched expert, in the order of params."""
        return {name: self._fetched / "experts" / name for name in self.params.fetch.experts}

    @property
    def task_vectors(self) -> Path:
        """Statistics of the task vectors."""
        return self._root(same=self._same_fetch) / "task_vectors"

    def merge(self, label: str) -> Path:
        """The merged model of a candidate."""
        return self._root(same=self._same_merge(label)) / "merge" / label

    def evaluation(self, kind: str, label: str) -> Path:
        """Scores of the `base`, of an `expert` or of a `merge`."""
        same = self._same_fetch and self.params.evaluate == self.plain.evaluate
        if kind == "merge":
            same = same and self._same_merge(label)
        folder = self._root(same=same) / "evaluate"
        return folder / "base" if kind == "base" else folder / f"{kind}s" / label

    @property
    def register(self) -> Path:
        """The leaderboard and what was registered."""
        return self.own / "register"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.own / "report"

    def stale(self) -> list[Path]:
        """Plain outputs of candidates that params.yaml names no more; DVC's cache keeps them."""
        kept = {place(label) for label in self.plain.merge.methods for place in self._of_candidate}
        parents = {folder.parent for folder in kept}
        found = (folder for parent in parents if parent.is_dir() for folder in parent.iterdir())
        return sorted(folder for folder in found if folder.is_dir() and folder not in kept)

    @property
    def _of_candidate(self) -> tuple[Callable[[str], Path], ...]:
        plain = Places(self.plain, self.plain)
        return plain.merge, lambda label: plain.evaluation("merge", label)

    def log(self, stage: str, label: str) -> Path:
        """Seconds and peak memory of a step; no part of what DVC hashes."""
        merged = stage == "merge" and self._same_merge(label)
        return self._root(same=self.is_plain or merged) / "log" / f"{stage}-{label}.json"

    def outcome(self, made: list[str]) -> dict[str, Any]:
        """What a run says of itself.

        Returns:
            `made`: names of the steps that had something to do; `base`: what was merged into;
            `register` and `report`: folders of the leaderboard and of the page, None without tasks
            to score; `merges` and `logs`: where each candidate's model and its cost lie.
        """
        labels, scored = self.params.merge.methods, bool(self.params.evaluate.tasks)
        return {
            "made": made,
            "base": self.params.fetch.base.source,
            "register": str(self.register) if scored else None,
            "report": str(self.report) if scored else None,
            "merges": {label: str(self.merge(label)) for label in labels},
            "logs": {label: str(self.log("merge", label)) for label in labels},
        }

    @property
    def _fetched(self) -> Path:
        return self._root(same=self._same_fetch) / "fetch"

    @property
    def _same_fetch(self) -> bool:
        return self.params.fetch == self.plain.fetch

    def _same_merge(self, label: str) -> bool:
        def decisive(params: Params) -> tuple[object, ...]:
            merge = params.merge
            return merge.candidate(label), merge.device, merge.dtype, merge.seed

        known = label in self.plain.merge.methods
        return self._same_fetch and known and decisive(self.params) == decisive(self.plain)

    def _root(self, *, same: bool) -> Path:
        return ARTIFACTS if same else self.own
