"""Real servers on free loopback ports, and what waits until they answer."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

PATIENCE = 180.0  # seconds; a busy machine takes its time


@contextmanager
def mlflow_server(folder: Path, *options: str, **environment: str) -> Iterator[str]:
    """`mlflow server` with its database and artifacts in `folder`; yields its URL."""
    port = _free_port()
    store = f"sqlite:///{folder}/mlflow.db"
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), *options]
    command += ["--backend-store-uri", store, "--artifacts-destination", f"{folder}/mlartifacts"]
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    url = f"http://127.0.0.1:{port}"
    with _running(
        [*command, "--workers", "1"], folder / "mlflow.log", environment, f"{url}/health"
    ):
        yield url


@contextmanager
def prefect_server(folder: Path, **environment: str) -> Iterator[str]:
    """`prefect server start` with its home in `folder`; yields the URL of its API."""
    port = _free_port()
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    environment |= {"PREFECT_HOME": f"{folder}/prefect"}
    url = f"http://127.0.0.1:{port}/api"
    with _running(command, folder / "prefect.log", environment, f"{url}/health"):
        yield url


@contextmanager
def _running(
    command: list[str], log: Path, environment: Mapping[str, str], health: str
) -> Iterator[None]:
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=log.parent,
            env={**os.environ, **environment},
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        _wait(health, process, log)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _wait(health: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until it answers, be it that it wants to know who asks."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return urllib.request.urlopen(health, timeout=5).close()
        except urllib.error.HTTPError as error:
            if error.code == 401:
                return None
        except OSError:
            pass
        time.sleep(0.25)
    pytest.fail(log.read_text())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
