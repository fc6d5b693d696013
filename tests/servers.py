"""Real servers on free loopback ports, and what waits until they answer."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

PATIENCE = 180.0  # seconds; a busy machine takes its time


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """`mlflow server` with its database and artifacts in `folder`; yields its URL."""
    port = free_port()
    store = f"sqlite:///{folder}/mlflow.db"
    command = (
        f"{sys.executable} -m mlflow server --host 127.0.0.1 --port {port} --workers 1".split()
    )
    command += ["--backend-store-uri", store, "--artifacts-destination", f"{folder}/mlartifacts"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    url = f"http://127.0.0.1:{port}"
    with running(command, folder / "mlflow.log", environment, f"{url}/health"):
        yield url


@contextmanager
def prefect_server(folder: Path) -> Iterator[str]:
    """`prefect server start` with its database in `folder`; yields the URL of its API."""
    port = free_port()
    command = f"{sys.executable} -m prefect server start --host 127.0.0.1 --port {port}".split()
    environment = {**os.environ, "PREFECT_HOME": str(folder)}
    url = f"http://127.0.0.1:{port}/api"
    with running(command, folder / "prefect.log", environment, f"{url}/health"):
        yield url


@contextmanager
def running(
    command: list[str], log: Path, environment: Mapping[str, str], health: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """A server that writes into `log`, in whose folder it works, from its first answer on."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            env=environment,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        _wait(health, process, log)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _wait(health: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until it answers that it is well."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return urllib.request.urlopen(health, timeout=5).close()
        except OSError:
            pass
        time.sleep(0.25)
    pytest.fail(log.read_text())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
