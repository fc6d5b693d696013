"""The schedule for real: one command brings server and worker, cron starts a run, and it ends."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from click.testing import CliRunner
from dvc.repo import Repo
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.deployments import run_deployment
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelling

from flows.cli import main
from flows.deploy import Deployment
from flows.doctor.services import prefect
from flows.local import server
from tests.flows.conftest import make_project
from tests.flows.deployments import EVERY_NIGHT, LABEL, PATIENCE, SECRET, engines, until
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
EVERY_MINUTE = '\nschedule: {cron: "* * * * *", timezone: UTC, timeout: 600}\n'


@dataclass
class Running:
    """A `poemerge deploy --local` in a project, and a receiver of its notices."""

    project: Path
    process: subprocess.Popen
    said: Path
    heard: Path
    client: SyncPrefectClient

    def output(self) -> str:
        return self.said.read_text()

    def runs(self, deployment: DeploymentResponse) -> list[FlowRun]:
        mine = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
        return self.client.read_flow_runs(deployment_filter=mine)

    def start(self, **parameters: Any) -> FlowRun:
        """A run of the deployment that is in its worker."""
        run = run_deployment(LABEL, parameters=parameters, timeout=0)
        return self.reaches(run, StateType.RUNNING)

    def reaches(self, run: FlowRun, *kinds: StateType) -> FlowRun:
        def look() -> FlowRun | None:
            now = self.client.read_flow_run(run.id)
            return now if now.state_type in kinds else None

        return until(look, f"{kinds} of {run.name}: {self.output()}")


@contextmanager
def spawned(arguments: list[str], cwd: Path, output: Path) -> Iterator[subprocess.Popen]:
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=cwd, env=os.environ.copy(), stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)


def change(project: Path, keep: float) -> None:
    """Give the next run something to do."""
    params = project / "params.yaml"
    params.write_text(re.sub(r"keep: [\d.]+", f"keep: {keep}", params.read_text()))


@contextmanager
def work_that_waits(project: Path, keep: float) -> Iterator[None]:
    """A run has something to do, and does not come to its end: it may not commit to DVC."""
    change(project, keep)
    with Repo(project) as repo, repo.lock:
        yield


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, zoo) -> Iterator[Running]:  # noqa: ANN001
    folder = tmp_path_factory.mktemp("deploy")
    project = make_project(folder / "project", zoo)
    params = project / "params.yaml"
    text = re.sub(
        r"    (average|dare_ties|gaussian_poe|task_arithmetic): .*\n", "", params.read_text()
    )
    params.write_text(text + EVERY_MINUTE)
    said, heard, port = folder / "said.txt", folder / "heard.txt", free_port()
    with pytest.MonkeyPatch.context() as patch:
        url = f"http://127.0.0.1:{free_port()}/api"
        patch.setenv("PREFECT_API_URL", url)
        patch.setenv("PREFECT_HOME", str(folder / "prefect"))
        patch.setenv("PREFECT_WORKER_QUERY_SECONDS", "2")
        patch.setenv("PYTHONUNBUFFERED", "1")
        patch.setenv("RECEIVER_SECRET", SECRET)
        hook = f"http://127.0.0.1:{port}/prefect/{SECRET}"
        receiver = [str(ROOT / "examples/notifications/receiver.py"), "--port", str(port)]
        patch.setenv("POEMERGE_NOTIFY", hook)
        deploy = ["-m", "flows.cli", "deploy", "--local"]
        with (
            spawned(receiver, folder, heard),
            spawned(deploy, project, said) as process,
            temporary_settings({PREFECT_API_URL: url}),
        ):
            until(lambda: "Ctrl-C" in said.read_text() or process.poll() is not None, "server")
            assert process.poll() is None, said.read_text()
            with get_client(sync_client=True) as client:
                yield Running(project, process, said, heard, client)


@pytest.fixture(scope="module")
def fired(running: Running) -> FlowRun:
    """The first run that cron started, ended; no other will follow."""
    deployment = running.client.read_deployment_by_name(LABEL)
    due = until(lambda: [r for r in running.runs(deployment) if r.auto_scheduled], "scheduled run")
    first = min(due, key=lambda run: run.expected_start_time)
    begun = running.reaches(first, StateType.RUNNING, StateType.COMPLETED, StateType.FAILED)
    for schedule in deployment.schedules:
        running.client.update_deployment_schedule(deployment.id, schedule.id, active=False)
    return running.reaches(begun, StateType.COMPLETED, StateType.FAILED, StateType.CRASHED)


def test_it_says_where_when_and_how_to_stop(running: Running) -> None:
    said = running.output()
    identity = running.client.read_deployment_by_name(LABEL).id
    assert f"deployed: {ui()}/deployments/deployment/{identity}" in said
    assert re.search(r"next runs: (\w{3} \d\d \w{3} \d{4} \d\d:\d\d UTC(, |\n)){3}", said)
    assert "Ctrl-C stops the worker and the server" in said
    assert SECRET not in said


def test_cron_starts_a_run_that_does_the_whole_work(running: Running, fired: FlowRun) -> None:
    assert fired.state_name == "Completed", running.output()
    assert fired.auto_scheduled
    assert fired.expected_start_time.second == 0
    assert fired.parameters["params"] == "params.yaml"
    board = json.loads((running.project / "artifacts/register/leaderboard.json").read_text())
    assert {row["label"] for row in board["rows"] if row["kind"] == "merge"} == {
        "ties",
        "cauchy_poe",
    }
    store = MlflowClient(f"sqlite:///{running.project}/mlflow.db")
    assert store.get_model_version_by_alias("tiny", "challenger").source.startswith("dvc://")
    assert (running.project / "dvc.lock").is_file()


def test_our_lines_are_in_prefects_log(running: Running, fired: FlowRun) -> None:
    mine = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[fired.id]))

    def look() -> bool:
        return any("merge ties done" in log.message for log in running.client.read_logs(mine))

    until(look, "line of ours")


def test_success_and_failure_are_told(running: Running, fired: FlowRun) -> None:
    """Of runs by hand: those due within minutes of their deployment are told late (schedule.md)."""
    change(running.project, keep=0.4)
    for params, end in (("params.yaml", "Completed"), ("nowhere.yaml", "Failed")):
        run = run_deployment(LABEL, parameters={"params": params}, timeout=0)
        ended = running.reaches(run, StateType.COMPLETED, StateType.FAILED, StateType.CRASHED)
        assert ended.state_name == end
        words = f"{LABEL}, run {run.name}: {end} {ui()}/runs/flow-run/{run.id}"
        until(lambda words=words: words in running.heard.read_text().splitlines(), words)
    assert "nowhere.yaml" in ended.state.message


def test_the_page_shows_these_commands(running: Running) -> None:
    page = (ROOT / "docs/schedule.md").read_text()
    shown = re.findall(r"^ExecStart=\S+ (-m prefect .*)$", page, re.MULTILINE)
    port = urlsplit(ui()).port
    commands = [child.cmdline() for child in psutil.Process(running.process.pid).children()]
    run = [" ".join(words[1:]) for words in commands if "prefect" in words]
    assert sorted(line.replace("4200", str(port)) for line in shown) == sorted(run)


def test_a_server_that_runs_is_found(running: Running) -> None:
    with server() as process:
        assert process is None
    assert running.client.api_healthcheck() is None


def test_the_doctor_finds_the_server(running: Running) -> None:
    (found,) = prefect()
    assert (found.status, found.said) == ("ok", f"{ui()}/api answers, anonymously")


def test_prefect_deploy_makes_the_same(running: Running, fired: FlowRun) -> None:
    params = running.project / "params.yaml"
    params.write_text(params.read_text().replace(EVERY_MINUTE, EVERY_NIGHT))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(running.project)
        Deployment.find(Path("params.yaml"), name="ours").apply(running.client)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    environment = {**os.environ, "PREFECT_API_URL": f"{ui()}/api"}
    done = subprocess.run(
        command, cwd=running.project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

    def made(name: str) -> dict[str, Any]:
        found = running.client.read_deployment_by_name(f"poemerge/{name}").model_dump()
        (schedule,) = found["schedules"]
        keys = {"entrypoint", "parameters", "tags", "description", "job_variables", "pull_steps"}
        keys |= {"path", "work_pool_name", "parameter_openapi_schema", "enforce_parameter_schema"}
        return {key: found[key] for key in keys} | {"schedule": schedule["schedule"]}

    assert made("scheduled") == made("ours")


def test_a_second_deploy_updates_the_first(running: Running, fired: FlowRun) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(running.project)
        every_month = EVERY_NIGHT.replace("* * *", "1 * *")
        text = Path("params.yaml").read_text().partition("schedule:")[0]
        Path("monthly.yaml").write_text(text + every_month)
        for params in ("params.yaml", "monthly.yaml"):
            arguments = ["deploy", "--name", "twice", "--pool", "ours", "--params", params]
            done = CliRunner().invoke(main, arguments, catch_exceptions=False)
            assert done.exit_code == 0
            assert "prefect worker start --pool ours --type process" in done.output
    found = running.client.read_deployment_by_name("poemerge/twice")
    assert f"deployed: {ui()}/deployments/deployment/{found.id}" in done.output
    assert [entry.schedule.cron for entry in found.schedules] == ["0 3 1 * *"]
    assert found.parameters["params"] == "monthly.yaml"
    assert running.client.read_work_pool("ours").type == "process"


def test_a_run_is_cancelled_by_the_api(running: Running, fired: FlowRun) -> None:
    with work_that_waits(running.project, keep=0.3):
        run = running.start(params="params.yaml")
        (engine,) = engines(running.process.pid)
        running.client.set_flow_run_state(run.id, Cancelling())
        assert (
            running.reaches(run, StateType.CANCELLED, StateType.CRASHED).state_name == "Cancelled"
        )
        until(lambda: not engine.is_running(), "end of its process")
    assert running.process.poll() is None


def test_ctrl_c_leaves_nothing_running(running: Running, fired: FlowRun) -> None:
    with work_that_waits(running.project, keep=0.2):
        running.start(params="params.yaml")
        family = psutil.Process(running.process.pid).children(recursive=True)
        assert len(family) >= 5  # server, worker, what waits for our end with each, run
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(PATIENCE) == 0
    assert [process for process in family if process.is_running()] == []
    assert running.output().endswith("stopped\n")
    log = (running.project / ".poemerge/log/prefect-server.log").read_text()
    assert SECRET not in running.output() + log
    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(sync_client=True) as client,
    ):
        assert client.api_healthcheck() is not None


def ui() -> str:
    return str(PREFECT_API_URL.value()).removesuffix("/api")
