"""A process that is killed, and what it had started."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.watch import WATCH, ending_with_us
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds; a busy machine takes its time
PAUSE = 0.1  # seconds between two looks
FLOW = """
from prefect.client.orchestration import get_client
from flows.prefect_server import asked

with asked():
    get_client(sync_client=True)
"""
LOCAL = """
from pathlib import Path
from flows.local import server

with server():
    input()
"""


def children(run: "subprocess.Popen[bytes]", *words: str) -> list[psutil.Process]:
    """Of a process: one with each of these words in its command, once all are there."""
    while run.poll() is None:
        found = psutil.Process(run.pid).children()
        having = [[child for child in found if word in child.cmdline()] for word in words]
        if all(having):
            return [child for child, *_ in having]
        time.sleep(PAUSE)
    raise AssertionError(f"it ended with {run.returncode}")


def ends(process: psutil.Process) -> bool:
    """Sooner or later; nobody may be there to take note of it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(PAUSE)
    return False


@pytest.mark.parametrize(
    ("code", "word"), [(FLOW, "uvicorn"), (LOCAL, "server")], ids=["run", "deploy --local"]
)
def test_a_server_ends_with_the_command_that_is_killed(
    code: str, word: str, tmp_path: Path
) -> None:
    environment = {key: v for key, v in os.environ.items() if not key.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    if code == LOCAL:
        environment["PREFECT_API_URL"] = f"http://127.0.0.1:{free_port()}/api"
    with subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=tmp_path) as run:
        server, _ = children(run, word, WATCH)
        run.kill()
    assert ends(server)


def test_what_is_left_in_order_is_left_alone() -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        with ending_with_us(other.pid):
            pass
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.2)
        other.kill()
