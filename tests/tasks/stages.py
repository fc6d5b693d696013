"""Folders as the stages before registration leave them, all tiny and real; and what it leaves."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvc.repo import Repo
from mlflow import MlflowClient

from poemerge.atomic import write_json
from poemerge.lineage import Lineage, Source, produce
from tasks.register import register

TASKS = ("odd", "even")
SETTINGS: dict[str, Any] = {
    "tasks": TASKS,
    "name": "tiny-merged",
    "experiment": "tests",
    "choose": "mean",
    "store": "dvc",
    "params": {"merge": {"strength": 1.0}},
    "overrides": ("merge.strength=1.0",),
}


class Project:
    """In the working directory."""

    artifacts = Path("artifacts")

    def fetch(self) -> None:
        record = Lineage("fetch", {}, uri="hf://org/tiny@1")
        produce(self.artifacts / "fetch/base", record, lambda f: write_json(f / "config.json", {}))

    def merge(self, label: str, text: str, **settings: Any) -> None:
        def work(folder: Path) -> None:
            (folder / "model.safetensors").write_text(text)
            write_json(folder / "merge_report.json", {"tensors": 1})

        record = Lineage("merge", {"method": f"{label}_poe", "settings": settings})
        produce(self.artifacts / "merge" / label, record, work)
        write_json(self.artifacts / f"log/merge-{label}.json", {"seconds": 2.5, "peak_bytes": 1024})

    def evaluate(self, place: str, candidate: Path, scores: Mapping[str, Any]) -> None:
        record = Lineage("evaluate", {"scores": scores}, (Source.of("candidate", candidate),))
        out = self.artifacts / "evaluate" / place
        produce(out, record, lambda f: write_json(f / "results.json", {"scores": scores}))

    def evaluate_merge(self, label: str, score: float) -> None:
        both = {split: {"score": score} for split in ("validation", "test")}
        folder = self.artifacts / "merge" / label
        self.evaluate(f"merges/{label}", folder, dict.fromkeys(TASKS, both))

    def register(self, **changes: Any) -> bool:
        root = os.fspath(self.artifacts)
        labels = ("average", "cauchy")
        evaluations = {
            "base": {"base": f"{root}/evaluate/base"},
            "expert": {task: f"{root}/evaluate/experts/{task}" for task in TASKS},
            "merge": {label: f"{root}/evaluate/merges/{label}" for label in labels},
        }
        places = {
            "base": f"{root}/fetch/base",
            "merges": {label: f"{root}/merge/{label}" for label in labels},
            "evaluations": evaluations,
            "logs": {label: f"{root}/log/merge-{label}.json" for label in labels},
            "out": f"{root}/register",
        }
        return register.fn(**places | SETTINGS | changes)


def new_project() -> Project:
    """Two merges of two experts, evaluated, in a git and DVC repository."""
    subprocess.run(["git", "init", "-q"], check=True)
    Repo.init().close()
    made = Project()
    made.artifacts.joinpath("log").mkdir(parents=True)
    made.fetch()
    base = made.artifacts / "fetch/base"
    made.evaluate("base", base, {task: {"test": {"score": 0.25}} for task in TASKS})
    for task in TASKS:
        made.evaluate(f"experts/{task}", base, {task: {"test": {"score": 0.8}}})
    made.merge("average", "mean weights")
    made.merge("cauchy", "robust weights", ridge=0.5, weights=[1, 2])
    made.evaluate_merge("average", 0.4)
    made.evaluate_merge("cauchy", 0.6)
    return made


def client() -> MlflowClient:
    local = f"sqlite:///{Path('mlflow.db').resolve()}"
    return MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", local))


def runs() -> list[Any]:
    place = client().get_experiment_by_name("tests").experiment_id
    return list(client().search_runs([place], order_by=["attributes.start_time ASC"]))


def version(alias: str) -> Any:
    return client().get_model_version_by_alias("tiny-merged", alias)
