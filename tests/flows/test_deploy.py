"""The schedule for real: one command brings server and worker, cron starts a run, and it ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from click.testing import CliRunner
from dvc.repo import Repo
from mlflow import MlflowClient, environment_variables
from prefect import settings
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
from ruamel.yaml import YAML

from flows.cli import QUIET, main
from flows.deploy import Deployment
from flows.doctor.services import prefect
from flows.local import server
from tests.flows.conftest import make_project
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
PATIENCE = 240.0  # seconds; a busy machine takes its time
SECRET = "a-secret-of-the-tests"
EVERY_MINUTE = '\nschedule: {cron: "* * * * *", timezone: UTC, timeout: 600}\n'
EVERY_NIGHT = '\nschedule: {cron: "0 3 * * *", timezone: UTC, timeout: 600}\n'
LABEL = "poemerge/scheduled"


def until(found: Callable[[], Any], what: str) -> Any:
    """Look until there is something."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.5)
    raise AssertionError(f"no {what} in {PATIENCE:.0f} s")


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


def test_the_units_of_the_page_are_whole(tmp_path: Path) -> None:
    """systemd itself reads them, where it is installed; Prefect knows every variable."""
    page = (ROOT / "docs/schedule.md").read_text()
    blocks = re.findall(r"```ini\n(.*?)```", page, re.DOTALL)
    names = re.findall(r"`/etc/(systemd/system/[\w-]+\.service|[\w-]+\.env)`", page)
    assert len(blocks) == len(names) == 4
    for name, block in zip(names, blocks, strict=True):
        if name.endswith(".env"):
            keys = [line.partition("=")[0] for line in block.splitlines()]
            assert all(hasattr(settings, key) for key in keys if key.startswith("PREFECT_"))
            assert all(is_known(key) for key in keys if key.startswith("MLFLOW_"))
            continue
        unit = tmp_path / Path(name).name
        unit.write_text(
            re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", block, flags=re.MULTILINE)
        )
        if program := shutil.which("systemd-analyze"):
            command = [program, "verify", str(unit)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout + done.stderr) == (0, "")


def is_known(key: str) -> bool:
    """True for a variable that MLflow reads."""
    found = getattr(environment_variables, key, None)
    return found is not None and found.name == key


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


class TestWithoutServer:
    @staticmethod
    def refusal(*arguments: str) -> str:
        refused = CliRunner().invoke(main, ["deploy", *arguments], catch_exceptions=False)
        assert refused.exit_code == 1
        (line,) = refused.stderr.splitlines()
        assert line.startswith("error: ")
        return line

    @staticmethod
    def project(folder: Path, monkeypatch: pytest.MonkeyPatch, **schedule: str) -> None:
        monkeypatch.chdir(folder)
        (folder / "prefect.yaml").write_text((ROOT / "prefect.yaml").read_text())
        tree = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
        tree["schedule"].update(schedule)
        YAML().dump(tree, folder / "params.yaml")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("cron", "61 * * * *"),
            ("cron", "at noon"),
            ("cron", "0 0 31 2 *"),
            ("timezone", "Mars/Olympus"),
        ],
    )
    def test_a_bad_schedule_is_one_sentence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str
    ) -> None:
        self.project(tmp_path, monkeypatch, **{key: value})
        assert f"params.yaml: schedule.{key} is '{value}'" in self.refusal("--local")

    def test_a_missing_schedule_is_one_sentence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.project(tmp_path, monkeypatch)
        params = tmp_path / "params.yaml"
        params.write_text(params.read_text().partition("schedule:")[0])
        assert "has no section `schedule`" in self.refusal()

    @pytest.mark.parametrize("text", ["deployments: []", "name: x", "deployments: [{name: a}]"])
    def test_a_template_of_no_use_is_one_sentence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
    ) -> None:
        self.project(tmp_path, monkeypatch)
        (tmp_path / "prefect.yaml").write_text(text)
        assert "prefect.yaml must begin `deployments` with" in self.refusal()

    def test_a_server_must_be_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.project(tmp_path, monkeypatch)
        with temporary_settings(restore_defaults={PREFECT_API_URL}):
            assert "set PREFECT_API_URL, or use --local" in self.refusal()

    def test_a_server_that_is_away_is_one_sentence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.project(tmp_path, monkeypatch)
        port = free_port()
        with temporary_settings({PREFECT_API_URL: f"http://me:{SECRET}@127.0.0.1:{port}/api"}):
            said = self.refusal()
        assert f"Prefect at http://127.0.0.1:{port}/api cannot be reached" in said
        assert SECRET not in said

    def test_local_means_this_machine(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.project(tmp_path, monkeypatch)
        with temporary_settings({PREFECT_API_URL: "https://prefect.example.org/api"}):
            assert "names another machine" in self.refusal("--local")


def test_prefect_yaml_agrees_with_the_rest_of_the_house() -> None:
    safe = YAML(typ="safe", pure=True)
    (template,) = safe.load(ROOT / "prefect.yaml")["deployments"]
    schedule = safe.load(ROOT / "params.yaml")["schedule"]
    assert template["schedules"] == [{key: schedule[key] for key in ("cron", "timezone")}]
    assert template["work_pool"]["job_variables"]["env"].items() <= QUIET.items()


def engines(pid: int) -> list[psutil.Process]:
    """The processes of flow runs below this one."""
    below = psutil.Process(pid).children(recursive=True)
    return [process for process in below if "prefect.engine" in " ".join(process.cmdline())]
