"""A real run on tiny models for what reads one, and what else several files of tests share."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import pytest
from dvc.repo import Repo

from tests.flows.conftest import make_project
from tests.tasks.registry import new_repository

if TYPE_CHECKING:
    from tests.tasks.hub import Hub
    from tests.tasks.letters import Run
    from tests.tasks.stages import Project


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database with nothing in it; to make one takes seconds, to copy it none."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path) -> Path:
    """A git and DVC repository with MLflow's database, and the working directory in it."""
    root = tmp_path / "registry"
    root.mkdir()
    monkeypatch.chdir(root)
    subprocess.run(["git", "init", "-q"], check=True)
    Repo.init().close()
    shutil.copyfile(empty_database, root / "mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{root}/mlflow.db")
    return root


@pytest.fixture
def in_a_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Path) -> None:
    """The working directory in such a repository, which nothing is registered in."""
    monkeypatch.chdir(tmp_path)
    new_repository(tmp_path, database)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, zoo) -> Path:  # noqa: ANN001
    """The project after every stage, as `dvc repro` calls it; for reading only."""
    from flows.params import load
    from flows.places import Places
    from flows.steps import STAGES, steps

    folder = make_project(tmp_path_factory.mktemp("run") / "project", zoo)
    file = folder / "params.yaml"
    file.write_text(file.read_text().replace("detail: 0", "detail: 2"))
    before = Path.cwd()
    os.chdir(folder)
    try:
        params = load(Path("params.yaml"))
        for stage in STAGES:
            for step in steps(stage, Places(params, params)):
                step.run()
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished run, for reading, and the working directory in it."""
    monkeypatch.chdir(finished_run)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return finished_run


@pytest.fixture
def mine(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, to spoil, and the working directory in it."""
    copy = shutil.copytree(finished_run, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(copy)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("POEMERGE_CACHE", str(tmp_path / "cache"))
    return copy


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Path) -> "Project":
    """All that comes before a registration, and the working directory beside it."""
    from tests.tasks.stages import new_project

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(database, "mlflow.db")
    return new_project()


@pytest.fixture
def include(tmp_path: Path) -> Path:
    """A folder with one task, `letters`."""
    from tests.tasks.letters import write_task  # imports lm-eval, which not every test needs

    return write_task(tmp_path / "tasks", "letters")


@pytest.fixture
def score(tmp_path: Path, include: Path, zoo) -> "Run":  # noqa: ANN001
    """Run the evaluate stage; returns whether work was done, results and items."""
    from tests.tasks.letters import stage

    return stage(tmp_path, include, zoo)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> "Iterator[Hub]":
    """A hub with the model `org/model`, reached through HF_ENDPOINT."""
    from tests.tasks.hub import serving

    with serving(monkeypatch) as state:
        yield state


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two experts of several shards."""
    from tests.tasks.sharded import write_models

    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def here(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this process makes of them alone."""
    from tests.tasks.sharded import merge

    out = tmp_path_factory.mktemp("here") / "out"
    merge(models, out, None)
    return out
