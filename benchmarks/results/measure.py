"""One zoo measured: experts against each other, every method as it is and at its best."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.params import load
from flows.places import PLAIN, Places
from flows.steps import steps
from flows.sweep import sweep
from poemerge.device import describe_device, pick_device
from tasks import paired
from tasks.paired import Outcomes
from tasks.register.leaderboard import read_costs, read_scores

PARAMS = Path("benchmarks/results/zoo.yaml")
EXPERTS = Path("data/experts")
TRAINED = Path(".poemerge/zoo")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Zoo:
    """Experts of one kind from one training seed.

    Attributes:
        kind: lora or full.
        seed: of their training.
    """

    kind: str
    seed: int

    @property
    def name(self) -> str:
        """For files and tables."""
        return f"{self.kind}-{self.seed}"

    @property
    def folder(self) -> Path:
        """Where the experts lie; those of one zoo come with the repository."""
        return EXPERTS if self.name == "lora-0" else TRAINED / self.name

    def overrides(self, limit: int | None) -> list[str]:
        """What differs from `PARAMS`."""
        experts = load(PARAMS).fetch.experts
        sources = [f"fetch.experts.{name}.source={self.folder / name}" for name in experts]
        return [*sources, f"evaluate.limit={'null' if limit is None else limit}"]


def measure(zoo: Zoo, limit: int | None) -> Iterator[dict[str, Any]]:
    """Train what is missing, merge, score, search; what was done before is not done again.

    Args:
        zoo: which experts.
        limit: items per task and split; None for all.

    Yields:
        Plain data for page.py: once all is scored, and again once the search is over.
    """
    overrides = zoo.overrides(limit)
    places = Places(load(PARAMS, overrides), load(PLAIN))
    _run("fetch", places, only="base")
    _train(zoo, places.base)
    for stage in ("fetch", "merge", "evaluate"):
        _run(stage, places)
    facts = _facts(zoo, places)
    yield facts | {"tuned": []}
    yield facts | _tuned(Path(sweep(str(PARAMS), overrides)["folder"]), facts)


def _run(stage: str, places: Places, only: str = "") -> None:
    for step in steps(stage, places):
        if not only or step.label == only:
            made = step.run()
            logger.info("%s %s", step.name, "done" if made else "is up to date")


def _train(zoo: Zoo, base: Path) -> None:
    """Hours for all four zoos; an expert that is complete is left alone."""
    if zoo.folder == EXPERTS:
        return
    command = [sys.executable, "data/experts/train.py", "--kind", zoo.kind, "--seed", str(zoo.seed)]
    subprocess.run([*command, "--base", str(base), "--out", str(zoo.folder)], check=True)


def _facts(zoo: Zoo, places: Places) -> dict[str, Any]:
    tasks, params = places.params.evaluate.tasks, places.params
    plain = {label: places.evaluation("merge", label) for label in params.merge.methods}
    logs = {label: str(places.log("merge", label)) for label in plain}
    return {
        "zoo": asdict(zoo),
        "tasks": tasks,
        "limit": params.evaluate.limit,
        "device": describe_device(pick_device(params.evaluate.device)),
        "base": _test(places.evaluation("base", "base"), tasks),
        "experts": {name: _test(places.evaluation("expert", name), tasks) for name in tasks},
        "untuned": _untuned(plain, tasks),
        "costs": {label: asdict(cost) for label, cost in read_costs(logs).items()},
        "settings": {label: dict(params.merge.methods[label]) for label in plain},
        "cauchy": {"untuned": _cauchy_less_gaussian(plain, tasks)},
    }


def _tuned(swept: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    rows = json.loads((swept / "sweep.json").read_text(encoding="utf-8"))["rows"]
    best = {row["label"]: swept / "test" / row["label"] / row["key"] for row in rows}
    cauchy = facts["cauchy"] | {"tuned": _cauchy_less_gaussian(best, facts["tasks"])}
    return {"tuned": rows, "cauchy": cauchy}


def _test(folder: Path, tasks: Sequence[str], split: str = "test") -> dict[str, float]:
    scores = read_scores(folder, tasks, [split])
    return {task: scores[task][split]["score"] for task in tasks}


def _untuned(folders: Mapping[str, Path], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Best on validation first; the others' gaps to it on test, judged together (Bonferroni)."""
    validation = {
        label: sum(_test(folder, tasks, "validation").values()) / len(tasks)
        for label, folder in folders.items()
    }
    ordered = sorted(folders, key=lambda label: -validation[label])
    outcomes = {label: Outcomes.read(folders[label], tasks, "test") for label in ordered}
    level = paired.joint_level(len(ordered) - 1)
    return [
        {
            "label": label,
            "validation": validation[label],
            "scores": _test(folders[label], tasks),
            "test": asdict(paired.score(outcomes[label])),
            "gap": _difference(outcomes[label], outcomes[ordered[0]], level),
        }
        for label in ordered
    ]


def _cauchy_less_gaussian(folders: Mapping[str, Path], tasks: Sequence[str]) -> dict[str, Any]:
    """Side → paired difference on test; the claim that heavy tails merge better."""
    sides = {"input": "", "output": "_out"}
    return {
        side: _difference(
            Outcomes.read(folders[f"cauchy_poe{suffix}"], tasks, "test"),
            Outcomes.read(folders[f"gaussian_poe{suffix}"], tasks, "test"),
            paired.LEVEL,
        )
        for side, suffix in sides.items()
    }


def _difference(left: Outcomes, right: Outcomes, level: float) -> dict[str, Any]:
    found = paired.difference(left, right, level=level)
    return asdict(found) | {"is_real": found.is_real}
