"""Passwords and tokens, planted everywhere: looked for in all that a run leaves and says."""

import json
import logging
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest
from click.testing import CliRunner

from flows.cli import main
from flows.turns import Ticket
from poemerge.errors import PoemergeError, SourceError
from poemerge.redaction import guard_logs, redact
from tasks.fetch import fetch
from tasks.tracking import connected
from tests.flows.conftest import keep_two_candidates, make_project
from tests.reliability.test_pickles import Payload
from tests.reliability.trials import Trials
from tests.servers import free_port, mlflow_server

ROOT = Path(__file__).parents[2]
LETTERS = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"
VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "POEMERGE_NOTIFY",
    "PREFECT_API_KEY",
)
PLANTED = {
    name: f"planted{number}x{name.replace('_', '')}"
    for number, name in enumerate(
        (*VARIABLES, "mlflow-uri", "mlflow-wrong", "dvc-remote", "git-remote", "set", "source")
    )
}


def secret(number: int) -> str:
    drawn = random.Random(number)
    return "".join(drawn.choices(LETTERS, k=drawn.randint(8, 60)))


FORMS = (
    "MLflow at http://me:{}@mlflow.example:5000/x refused",
    "postgresql+psycopg://me:{}@host/mlflow?sslmode=require failed",
    "https://{}@git.example/team/models.git",
    "GET https://hub.example/file?token={}&x=1 → 404",
    "https://store.example/x?X-Amz-Signature={}#part",
    "Max retries exceeded with url: /api?key={} (Caused by ...)",
    "headers {{'Authorization': 'Bearer {}'}}",
    "Authorization: Basic {}",
    "s3://key:{}@bucket/models, s3://key:{}@other/models",
    "hf://me:{}@org/name",
)


def test_texts(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password or token in an address, a header or the environment is in no error or log line"""
    guard_logs()
    for number in trials(short=60, full=1000):
        with trials.trial(number):
            value = secret(number)
            known = number % 2 == 0
            form = "somewhere {} in a text" if known else FORMS[number // 2 % len(FORMS)]
            if known:
                name = VARIABLES[number // 2 % len(VARIABLES)]
                monkeypatch.setenv(name, f"me:{value}" if number % 4 else value)
            text = form.format(value, value)
            assert value not in str(SourceError(text))
            record = logging.getLogRecordFactory()
            try:
                int(text)  # its error quotes it
            except ValueError:
                made = record("x", 20, "f", 1, "said %s", (text,), sys.exc_info())
            assert value not in logging.Formatter().format(made)
            assert redact(redact(text)) == redact(text)
            if known:
                monkeypatch.delenv(name)


INNOCENT = (
    "models:/name@champion",
    "dvc://artifacts/merge@v1",
    "hf://org/name@main",
    "sqlite:////home/a@b/mlflow.db",
    "http://127.0.0.1:5000/api",
    "tokens 3 of 4; tokenizer.json",
    "really? yes",
)


def test_innocent_words(trials: Trials) -> None:
    """References, paths and words that hold no secret are told as they are"""
    for number in trials(short=len(INNOCENT), full=len(INNOCENT)):
        with trials.trial(number):
            assert str(PoemergeError(INNOCENT[number])) == INNOCENT[number]


class Refusing(BaseHTTPRequestHandler):
    """Answers everything with one status, and repeats who asked, as careless servers do."""

    status = 500

    def do_GET(self) -> None:
        body = f"{self.status}: {self.path} {self.headers.get('Authorization')}".encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def refusing(status: int) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Refusing,), {"status": status}))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def ask_mlflow(host: str, value: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://me:{value}@{host}")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(PoemergeError) as caught, connected():
            pass
    return str(caught.value)


def ask_hub(host: str, value: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", f"http://me:{value}@{host}")
        patch.setenv("HF_TOKEN", value)
        with pytest.raises(PoemergeError) as caught:
            fetch.fn("base", "hf://org/name@main", "out")
    return str(caught.value)


def ask_with_a_source(host: str, value: str) -> str:
    with pytest.raises(PoemergeError) as caught:
        fetch.fn("base", f"https://me:{value}@{host}/m?token={value}", "out")
    return str(caught.value)


def ask_by_command(host: str, value: str) -> str:
    given = f"fetch.base.source=https://{value}@{host}/m"
    done = CliRunner().invoke(main, ["run", "--params", str(ROOT / "params.yaml"), "--set", given])
    assert done.exit_code == 1
    return done.output


ASKED = (ask_mlflow, ask_hub, ask_with_a_source, ask_by_command)
STATUS = (401, 404, 403, 500, None)


def test_refusals(
    trials: Trials,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What MLflow, a hub or a command refuses (401, 403, 404, 500, nobody there) tells no secret"""
    monkeypatch.chdir(tmp_path)
    guard_logs()
    cases = [(ask, status) for status in STATUS for ask in ASKED]
    for number in trials(short=8, full=3 * len(cases)):
        with trials.trial(number), caplog.at_level(logging.DEBUG):
            ask, status = cases[number % len(cases)]
            value = secret(number)
            if status is None:
                said = ask(f"127.0.0.1:{free_port()}", value)
            else:
                with refusing(status) as host:
                    said = ask(host, value)
            assert said.strip()
            assert value not in said
            assert value not in caplog.text
            caplog.clear()


def test_tickets(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ticket of the queue, which everybody may read, shows no secret of the command line"""
    for number in trials(short=10, full=100):
        with trials.trial(number):
            value = secret(number)
            form = FORMS[number % len(FORMS)].partition(" ")[0].format(value, value)
            monkeypatch.setattr(sys, "orig_argv", ["python", "poemerge", "merge", "--base", form])
            assert value not in Ticket.drawn("cpu", 1).command


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
    assert ran.kept  # of the run that failed late
    for number in trials(short=len(ran.kept), full=len(ran.kept)):
        with trials.trial(number):
            stored = json.loads(ran.kept[number])
            assert stored.keys() == {"__exc_type__", "message"}
            assert stored["__exc_type__"].startswith("poemerge.errors.")
            assert not ran.canary.exists()
