"""A registry to promote in: real versions in MLflow, their tiny bytes in DVC, a real server."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from poemerge.atomic import write_json
from poemerge.lineage import Lineage, Source, produce
from tasks import versions
from tasks.dvc_store.reference import put
from tasks.promote import Limits
from tasks.tracking import experiment_id, tracking_uri

NAME = "tiny"
TASKS = ("odd", "even")
LIMITS = Limits(min_gain=0.0, level=0.95, max_drop=0.1, certificates=True, verify=True)
SETTLED = {"converged": True, "energies": [2.0, 1.0]}


def client() -> MlflowClient:
    return MlflowClient(tracking_uri=tracking_uri())


def aliases() -> dict[str, int]:
    return {alias: int(n) for alias, n in versions.aliases_of(client(), NAME).items()}


def outcomes(right: int, items: int = 40) -> list[float]:
    """The first `right` of `items` answers are right."""
    return [1.0] * right + [0.0] * (items - right)


def write_evaluation(
    folder: Path, values: Mapping[str, Sequence[float]], limit: int = 40, data: str = "first"
) -> None:
    """What the evaluate stage leaves, for the outcomes that are given."""

    def work(out: Path) -> None:
        cells = {
            task: {"test": {"ids": [f"{task} {i}" for i in range(len(v))], "outcomes": list(v)}}
            for task, v in values.items()
        }
        write_json(out / "items.json", cells)

    inputs = [Source(f"task:{task}", {f"{task}.jsonl": data}) for task in values]
    produce(folder, Lineage("evaluate", {"limit": limit, "batch_size": 4}, tuple(inputs)), work)


def add_version(
    text: str, right: Mapping[str, int], *, certificate: Mapping[str, Any] = SETTLED, **how: Any
) -> int:
    """Register a model of these bytes, which is right on so many of 40 items a task."""
    merged, evaluated = Path("artifacts/merge", text), Path("artifacts/evaluate", text)

    def work(out: Path) -> None:
        (out / "model.safetensors").write_text(text)
        tensor = {"name": "up.weight", "certificate": dict(certificate)}
        write_json(out / "merge_report.json", {"method": "cauchy_poe", "tensors": [tensor]})

    produce(merged, Lineage("merge", {"method": "cauchy_poe"}), work)
    write_evaluation(evaluated, {task: outcomes(n) for task, n in right.items()}, **how)
    mlflow = client()
    run = mlflow.create_run(experiment_id(mlflow, "tests")).info.run_id
    mlflow.log_artifacts(run, os.fspath(evaluated), versions.EVALUATION_FOLDER)
    if not mlflow.search_registered_models(f"name = '{NAME}'"):
        mlflow.create_registered_model(NAME)
    tags = {versions.DIGEST: Source.of("model", merged).digest}
    made = mlflow.create_model_version(
        NAME, put(merged).uri, run_id=run, tags=tags, await_creation_for=0
    )
    mlflow.set_registered_model_alias(NAME, versions.CHALLENGER, str(made.version))
    return int(made.version)


def new_repository(folder: Path, database: Path) -> None:
    """Git, DVC and an MLflow database in a folder."""
    shutil.copytree(_template(database), folder, dirs_exist_ok=True)


@cache
def _template(database: Path) -> Path:
    folder = database.with_name("repository")
    folder.mkdir()
    shutil.copy(database, folder / "mlflow.db")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, check=True)
    return folder
