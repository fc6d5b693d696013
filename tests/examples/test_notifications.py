"""The receiver hears what is genuine; what README.md says of MLflow makes it hear of promotions."""

import base64
import hashlib
import hmac
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from cryptography.fernet import Fernet
from mlflow import MlflowClient

from flows.doctor.services import mlflow as examine
from tests.servers import free_port

FOLDER = Path(__file__).parents[2] / "examples" / "notifications"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
PATIENCE = 240.0  # seconds; a busy machine takes its time
SECRET = "a-secret-of-the-tests"
PREFECT = {
    "text": "poemerge/scheduled, run amber-fox: Completed",
    "url": "http://127.0.0.1:4200/runs/flow-run/1",
}


def until(done: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, f"no {what} in {PATIENCE:.0f} s"
        time.sleep(0.2)


@contextmanager
def spawned(arguments: list[str], output: Path, **environment: str) -> Iterator[None]:
    """A server of its own process, gone at the end with all it started."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=output.parent, env={**os.environ, **environment},
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(PATIENCE)


class Heard:
    """The receiver's address, and what it wrote."""

    def __init__(self, output: Path, port: int) -> None:
        self.output, self.url = output, f"http://127.0.0.1:{port}"

    def lines(self) -> list[str]:
        return self.output.read_text().splitlines()


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Heard]:
    heard = Heard(tmp_path_factory.mktemp("receiver") / "heard.txt", port := free_port())
    command = [str(FOLDER / "receiver.py"), "--port", str(port)]
    with spawned(command, heard.output, RECEIVER_SECRET=SECRET):
        until(lambda: "listening" in heard.output.read_text(), "receiver")
        yield heard


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server that may send to this machine."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    allowed = dict(
        re.findall(r"^\| `(MLFLOW_WEBHOOK_ALLOW\w+)` \| `\w+` \| `([\w,]+)`", README, re.MULTILINE)
    )
    assert allowed == {
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
    }
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    environment = {
        **allowed,
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    url = f"http://127.0.0.1:{port}"
    with spawned(command, folder / "log.txt", **environment):
        until(lambda: answers(f"{url}/health"), "MLflow server")
        yield url


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.HTTPError:
        return False


def test_versions_and_promotions_arrive(
    receiver: Heard, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("RECEIVER_URL", f"{receiver.url}/mlflow")
    monkeypatch.setenv("RECEIVER_SECRET", SECRET)
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    subprocess.run([sys.executable, "-c", code], check=True)
    client = MlflowClient(store)
    client.create_registered_model("tiny")
    client.create_model_version(
        "tiny", "dvc://artifacts/merge/ties/0123456789abcdef0123456789abcdef.dir"
    )
    client.set_registered_model_alias("tiny", "champion", "1")
    expected = {"tiny version 1 is registered", "tiny version 1 is now champion"}
    until(lambda: expected <= set(receiver.lines()), f"{expected}: {receiver.lines()}")
    (found,) = examine()
    assert found.status == "ok"


def test_how_a_run_ended_arrives(receiver: Heard) -> None:
    answer = httpx.post(f"{receiver.url}/prefect/{SECRET}", json=PREFECT)
    assert answer.status_code == 204
    until(lambda: f"{PREFECT['text']} {PREFECT['url']}" in receiver.lines(), "line")


class TestForged:
    """Nothing is heard of what is not genuine."""

    BODY = json.dumps(
        {
            "entity": "model_version_alias",
            "action": "created",
            "data": {"name": "evil", "version": "1", "alias": "champion"},
        }
    ).encode()

    def post(self, receiver: Heard, secret: str, moment: float, body: bytes | None = None) -> int:
        """A notice signed by the rule of MLflow's documentation."""
        stamp = str(int(moment))
        signature = hmac.new(secret.encode(), f"id.{stamp}.".encode() + self.BODY, hashlib.sha256)
        headers = {
            "x-mlflow-delivery-id": "id",
            "x-mlflow-timestamp": stamp,
            "x-mlflow-signature": f"v1,{base64.b64encode(signature.digest()).decode()}",
        }
        url = f"{receiver.url}/mlflow"
        return httpx.post(url, content=body or self.BODY, headers=headers).status_code

    def test_only_the_right_secret_time_and_body_pass(self, receiver: Heard) -> None:
        now = time.time()
        assert self.post(receiver, "guessed", now) == 403
        assert self.post(receiver, SECRET, now - 3600) == 403
        assert self.post(receiver, SECRET, now + 3600) == 403
        assert self.post(receiver, SECRET, now, self.BODY.replace(b"evil", b"vile")) == 403
        assert httpx.post(f"{receiver.url}/mlflow", content=self.BODY).status_code == 403
        assert not [line for line in receiver.lines() if "evil" in line or "vile" in line]
        assert self.post(receiver, SECRET, now) == 204

    def test_a_wrong_path_is_refused(self, receiver: Heard) -> None:
        for path in ("/prefect/guessed", "/prefect/", "/", f"/{SECRET}"):
            assert httpx.post(receiver.url + path, json=PREFECT).status_code == 403
        assert SECRET not in receiver.output.read_text()


def test_it_wants_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECEIVER_SECRET", raising=False)
    done = subprocess.run(
        [sys.executable, str(FOLDER / "receiver.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "set RECEIVER_SECRET" in done.stderr
