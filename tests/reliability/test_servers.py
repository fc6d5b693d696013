"""Servers that fail: once at one request, or from one request on; MLflow's, and Prefect's."""

import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

from poemerge.errors import SourceError
from poemerge.lineage import Source
from tasks.register import last
from tasks.versions import CHALLENGER, DIGEST, EVALUATION, KEY, paged
from tests.reliability.checks import (
    check_database,
    check_end,
    check_live,
    check_project,
    check_records,
)
from tests.reliability.contest import Arena, Command
from tests.reliability.projects import before_registration
from tests.reliability.proxy import FAULTS, Proxy, proxy
from tests.reliability.trials import Trials
from tests.servers import mlflow_server
from tests.tasks.stages import Project, new_project

INPUTS = {"sources": {"base": "1"}}


class Registration:
    """A registration under a name of its own, on a server behind a proxy.

    Args:
        project: with everything before registration done.
        between: the proxy.
        name: of the registered model and of the experiment.
    """

    def __init__(self, project: Project, between: Proxy, name: str) -> None:
        self.project, self.between, self.name = project, between, name
        self.names = {"name": name, "experiment": name, "out": f"artifacts/register-{name}"}

    def __call__(self) -> None:
        """As the flow does it: the stage, and the note that a run was complete."""
        self.project.register(**self.names)
        last.keep(Path(self.names["out"]), "the key", INPUTS)

    def check(self, client: MlflowClient) -> None:
        """One version with all that belongs to it, and one run for each candidate."""
        (version,) = client.search_model_versions(f"name = '{self.name}'")
        found = client.get_model_version(self.name, version.version)
        place = client.get_experiment_by_name(self.name).experiment_id
        runs = client.search_runs([place], run_view_type=ViewType.ACTIVE_ONLY)
        names = Counter(run.info.run_name for run in runs)
        assert names == Counter([self.name, "base", "odd", "even", "average", "cauchy"])
        assert {run.info.status for run in runs} == {"FINISHED"}
        (own,) = [run for run in runs if run.info.run_name == "cauchy"]
        assert found.aliases == [CHALLENGER]
        assert found.run_id == own.info.run_id
        content = Source.of("cauchy", Path("artifacts/merge/cauchy")).digest
        expected = {DIGEST: content, KEY: "the key", EVALUATION: own.info.run_id}
        assert expected.items() <= found.tags.items()
        for run in runs:
            files = {file.path for file in client.list_artifacts(run.info.run_id)}
            assert ("leaderboard.json" if run.info.run_name == self.name else "evaluation") in files
        assert last.last(self.name).number == version.version


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Proxy, str]]:
    """MLflow's own address, a proxy before it, and the proxy's."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as url, proxy(url) as (between, address):
        yield url, between, address


@pytest.fixture
def registering(
    server: tuple[str, Proxy, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Makes registrations, and the numbers of an undisturbed one's requests in random order."""
    url, between, address = server
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    project = new_project()
    calm = Registration(project, between, f"calm-{tmp_path.name}")
    between.heal()
    calm()
    asked = between.heal()
    calm.check(MlflowClient(url))
    order = random.Random(0).sample(range(len(asked)), len(asked))
    return lambda name: Registration(project, between, name), order


def test_one_fault(trials: Trials, registering: Any, server: tuple[str, Proxy, str]) -> None:
    """A registration whose MLflow server fails once, at any request, is as one without a fault"""
    url, between, _ = server
    make, order = registering
    for number in trials(short=4, full=2 * len(order)):
        with trials.trial(number):
            # The second time round, every answer is lost: the fault that makes things twice.
            fault = FAULTS[number % len(FAULTS)] if number < len(order) else "lost"
            registration = make(f"once-{number}")
            between.fail(fault, order[number % len(order)], 1)
            try:
                registration()
            finally:
                between.heal()
            registration.check(MlflowClient(url))


def test_away(
    trials: Trials,
    registering: Any,
    server: tuple[str, Proxy, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A registration whose MLflow server goes away at any request goes on once it is back"""
    url, between, address = server
    make, order = registering
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the test is to end today
    for number in trials(short=4, full=len(order)):
        with trials.trial(number):
            fault = FAULTS[number % len(FAULTS)]
            registration = make(f"away-{number}")
            between.fail(fault, order[number % len(order)], 10**9)
            try:
                with pytest.raises(SourceError, match=f"MLflow at {address} ") as caught:
                    registration()
            finally:
                between.heal()
            assert "\n" not in str(caught.value)
            registration()
            registration.check(MlflowClient(url))


@pytest.mark.usefixtures("long")
def test_run_without_mlflow(
    trials: Trials,
    arena: Arena,
    finished: Path,
    server: tuple[str, Proxy, str],
    tmp_path: Path,
) -> None:
    """A run whose MLflow server goes away keeps its merges; the next run registers and promotes"""
    url, between, address = server
    environment = {"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    for number in trials(short=1, full=10):
        with trials.trial(number):
            client = MlflowClient(url)
            forget(client)
            folder = before_registration(finished, tmp_path / f"{number}")
            run = [Command(("run",), folder, environment)]
            start = random.Random(number).randrange(3, 60)
            between.fail(FAULTS[number % len(FAULTS)], start, 10**9)
            try:
                ended = arena.contend(run, tmp_path / f"log-{number}")
            finally:
                between.heal()
            check_end(ended, 1)
            assert re.search(rf"^error: MLflow at {address} .*\.$", ended[0].said, re.MULTILINE)
            ended = arena.contend(run, tmp_path / f"log-{number}")
            check_end(ended, 0)
            assert "merge: 2 of 2 were up to date" in ended[0].said
            check_project(folder, finished)
            check_records(client)
            check_live(folder, client)


def forget(client: MlflowClient) -> None:
    """Let the server have nothing under the names that a project uses."""
    for model in paged(client.search_registered_models, ""):
        client.delete_registered_model(model.name)
    if place := client.get_experiment_by_name("tests"):
        client.rename_experiment(place.experiment_id, f"tests {place.experiment_id}")


@pytest.mark.usefixtures("long")
def test_run_without_prefect(
    trials: Trials, arena: Arena, prefect: str, finished: Path, tmp_path: Path
) -> None:
    """A run whose Prefect server goes away ends well, or says so and the next run goes on"""
    for number in trials(short=1, full=10):
        with trials.trial(number), proxy(prefect) as (between, address):
            folder = before_registration(finished, tmp_path / f"{number}")
            environment = {"PREFECT_API_URL": f"{address}/api", "PREFECT_CLIENT_MAX_RETRIES": "1"}
            run = [Command(("run",), folder, environment)]
            between.fail(FAULTS[number % len(FAULTS)], random.Random(number).randrange(20), 10**9)
            try:
                ended = arena.contend(run, tmp_path / f"log-{number}")
            finally:
                between.heal()
            if ended[0].code:
                check_end(ended, 1)
                assert re.search(f"^error: Prefect at {address}", ended[0].said, re.MULTILINE)
                ended = arena.contend(run, tmp_path / f"log-{number}")
            check_end(ended, 0)
            check_project(folder, finished)
            client = check_database(folder / "mlflow.db")
            check_records(client)
            check_live(folder, client)
