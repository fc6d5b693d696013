"""Passwords and tokens in what is told: errors, log lines, refusals of servers, tickets."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from click.testing import CliRunner

from flows.cli import main
from flows.turns import Ticket
from poemerge.errors import PoemergeError, SourceError
from poemerge.redaction import guard_logs, redact
from tasks.fetch import fetch
from tasks.tracking import connected
from tests.reliability.planted import VARIABLES, secret
from tests.reliability.trials import Trials
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
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
