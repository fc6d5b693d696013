"""Passwords and tokens, planted everywhere: looked for in all that a run leaves and says."""

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.flows.conftest import keep_two_candidates, make_project
from tests.reliability.planted import PLANTED, VARIABLES
from tests.reliability.test_pickles import Payload
from tests.reliability.trials import Trials
from tests.servers import free_port, mlflow_server

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ran:
    """A whole run with secrets everywhere.

    Attributes:
        folder: all that it could write to.
        said: stdout and stderr of its commands.
        listening: addresses on which a process of it listened.
        canary: what a planted pickle would have made.
        kept: what Prefect stored of results.
    """

    folder: Path
    said: str
    listening: frozenset[str]
    canary: Path
    kept: list[str]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, zoo) -> Ran:  # noqa: ANN001
    """`poemerge run --push` to its end, which fails at the remote; then one that fails at once."""
    folder = tmp_path_factory.mktemp("secrets")
    project = make_project(folder / "project", zoo)
    keep_two_candidates(project)
    nobody = f"127.0.0.1:{free_port()}"
    remotes = {
        "dvc": f"{sys.executable} -m dvc remote add -d --local away "
        f"http://me:{PLANTED['dvc-remote']}@{nobody}/dvc",
        "git": f"git remote add origin https://me:{PLANTED['git-remote']}@{nobody}/x.git",
    }
    for command in remotes.values():
        subprocess.run(command.split(), cwd=project, check=True, capture_output=True)
    results = folder / "prefect/storage"
    results.mkdir(parents=True)
    record = {"metadata": {"serializer": {"type": "pickle"}}, "result": ""}
    (results / "planted").write_bytes(pickle.dumps(Payload(folder / "canary")))
    (results / "planted.json").write_text(json.dumps(record))
    environment = {
        **os.environ,
        **{name: PLANTED[name] for name in VARIABLES},
        "POEMERGE_NOTIFY": f"https://hooks.example/{PLANTED['POEMERGE_NOTIFY']}",
        "PREFECT_HOME": str(folder / "prefect"),
        "POEMERGE_QUEUE": str(folder / "queue"),
        "POEMERGE_CACHE": str(folder / "cache"),
        "MLFLOW_TRACKING_USERNAME": "me",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "300",
    }
    with mlflow_server(folder) as url:
        host = url.removeprefix("http://")
        good = f"http://me:{PLANTED['mlflow-uri']}@{host}"
        bad = f"http://me:{PLANTED['mlflow-wrong']}@{nobody}"
        said, listening = _watch(["run", "--push"], project, environment, good)
        assert "could not push" in said, said
        source = f"fetch.base.source=https://me:{PLANTED['set']}@{nobody}/m?k={PLANTED['source']}"
        said += _watch(["run", "--set", source], project, environment, good)[0]
        assert "holds a password" in said, said
        said += _watch(["run"], project, environment, bad)[0]
        assert "MLflow at http://127.0.0.1" in said, said
    kept = [p.read_text() for p in results.iterdir() if not p.name.startswith("planted")]
    return Ran(folder, said, listening, folder / "canary", kept)


def _watch(
    command: list[str], project: Path, environment: dict[str, str], uri: str
) -> tuple[str, frozenset[str]]:
    """What a command says, and where it and its children listen."""
    own = environment | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    log, listening = project.parent / "said.txt", set()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *command],
            cwd=project, env=own, stdout=stream, stderr=stream,
        )  # fmt: skip
        while process.poll() is None:
            listening |= set(_listening(process.pid))
            time.sleep(0.5)
    said = log.read_text()
    log.unlink()
    return said, frozenset(listening)


def _listening(pid: int) -> Iterator[str]:
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            for each in process.net_connections("inet"):
                if each.status == psutil.CONN_LISTEN:
                    yield each.laddr.ip
    except psutil.Error:  # it ended meanwhile
        return


def test_a_run(trials: Trials, ran: Ran) -> None:
    """Secrets of a run that fails late, at once, or without MLflow are in no file and no output"""
    files = [path for path in ran.folder.rglob("*") if path.is_file()]
    files = [p for p in files if p.parts[-2:] not in {(".dvc", "config.local"), (".git", "config")}]
    assert any(path.name == "mlflow.db" for path in files)
    assert any(path.name == "prefect.db" for path in files)
    assert any(path.name == "lineage.json" for path in files)
    contents = [(path, path.read_bytes()) for path in files]
    names = list(PLANTED)
    for number in trials(short=len(names), full=len(names)):
        with trials.trial(names[number]):
            value = PLANTED[names[number]]
            assert value not in ran.said
            assert not [path for path, content in contents if value.encode() in content]


def test_servers(trials: Trials, ran: Ran) -> None:
    """Every server that a run brings listens on loopback alone"""
    assert ran.listening
    for number in trials(short=len(ran.listening), full=len(ran.listening)):
        with trials.trial(number):
            assert sorted(ran.listening)[number] in {"127.0.0.1", "::1"}


def test_results_of_prefect(trials: Trials, ran: Ran) -> None:
    """Prefect stores of a run how it failed, in JSON, and reads nothing that lies there"""
    for _ in trials(short=1, full=1):
        with trials.trial(0):
            for text in ran.kept:  # by Prefect 3.8.0 nothing
                stored = json.loads(text)
                assert stored.keys() == {"__exc_type__", "message"}
                assert stored["__exc_type__"].startswith("poemerge.errors.")
            assert not ran.canary.exists()
