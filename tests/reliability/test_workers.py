"""A deployment's processes that are killed, one at a time."""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from dvc.repo import Repo
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness

from flows.deploy import Deployment
from flows.local import worker
from flows.places import PLAIN
from tests.flows.conftest import keep_two_candidates, make_project
from tests.flows.deployments import EVERY_NIGHT, LABEL, PATIENCE, engines, until
from tests.reliability.trials import Trials

ENDS = (StateType.COMPLETED, StateType.FAILED, StateType.CRASHED)


@pytest.fixture(scope="module")
def client() -> Iterator[SyncPrefectClient]:
    with (
        prefect_test_harness(300),
        pytest.MonkeyPatch.context() as patch,
        get_client(sync_client=True) as client,
    ):
        patch.setenv("PREFECT_API_URL", str(PREFECT_API_URL.value()))
        patch.setenv("PREFECT_WORKER_QUERY_SECONDS", "1")
        yield client


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, zoo) -> Path:  # noqa: ANN001
    folder = make_project(tmp_path_factory.mktemp("workers") / "project", zoo)
    keep_two_candidates(folder)
    with (folder / PLAIN).open("a") as file:
        file.write(EVERY_NIGHT)
    return folder


@pytest.fixture
def pool(project: Path, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> str:
    """The work pool of the deployment, and the working directory in the project."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("PREFECT_API_URL", str(PREFECT_API_URL.value()))
    wanted = Deployment.find(PLAIN)
    wanted.apply(client)
    return wanted.pool


@contextmanager
def held(project: Path) -> Iterator[None]:
    """A run that has something to do does not come to its end: it may not commit to DVC."""
    params = project / PLAIN
    before, after = params.read_text().split("keep: ")
    value, rest = after.split("}", 1)
    params.write_text(f"{before}keep: {float(value) * 0.9:.4f}}}{rest}")
    with Repo(project) as repo, repo.lock:
        yield


def reaches(client: SyncPrefectClient, run: FlowRun, *kinds: StateType) -> StateType:
    def look() -> StateType | None:
        now = client.read_flow_run(run.id).state_type
        return now if now in kinds else None

    return until(look, f"{kinds} of {run.name}")


def start(client: SyncPrefectClient, working: Any, number: int) -> tuple[FlowRun, psutil.Process]:
    """A run in its worker, some way into its work, and its process."""
    run = run_deployment(LABEL, parameters={"params": str(PLAIN)}, timeout=0)
    reaches(client, run, StateType.RUNNING)
    (process,) = engines(working.pid)
    time.sleep(3 * random.Random(number).random())
    return run, process


def check(project: Path) -> None:
    """All is well after a run that completed."""
    with Repo(project) as repo:
        assert repo.status() == {}
    assert not list(project.rglob("*.partial"))
    store = MlflowClient(f"sqlite:///{project}/mlflow.db")
    versions = store.search_model_versions("name = 'tiny'")
    digests = [version.tags["poemerge.digest"] for version in versions]
    assert len(set(digests)) == len(digests)


@pytest.mark.usefixtures("long")
def test_a_killed_run(trials: Trials, project: Path, pool: str, client: SyncPrefectClient) -> None:
    """A scheduled run whose process is killed is told as crashed, and the next one completes"""
    with worker(pool) as working:
        for number in trials(short=1, full=10):
            with trials.trial(number):
                with held(project):
                    run, process = start(client, working, number)
                    process.kill()
                    assert reaches(client, run, *ENDS) == StateType.CRASHED
                after = run_deployment(LABEL, parameters={"params": str(PLAIN)}, timeout=0)
                assert reaches(client, after, *ENDS) == StateType.COMPLETED
                check(project)


@pytest.mark.usefixtures("long")
def test_a_killed_worker(
    trials: Trials, project: Path, pool: str, client: SyncPrefectClient
) -> None:
    """A worker that is killed leaves no run without an end, and the next worker's completes"""
    for number in trials(short=1, full=10):
        with trials.trial(number):
            with held(project), worker(pool) as working:
                run, process = start(client, working, number)
                os.kill(working.pid, signal.SIGKILL)
                working.wait()
            reaches(client, run, *ENDS)
            process.wait(PATIENCE)
            with worker(pool):
                after = run_deployment(LABEL, parameters={"params": str(PLAIN)}, timeout=0)
                assert reaches(client, after, *ENDS) == StateType.COMPLETED
            check(project)
