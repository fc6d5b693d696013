"""Whole runs that begin anew: by `dvc repro`, by command, stopped on the way, and refused."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL

from flows.limits import OvertimeError
from flows.pipeline import pipeline
from poemerge.errors import CheckpointError
from tests.flows.conftest import METHODS, TASKS, keep_two_candidates
from tests.flows.dvc_command import dvc

# A task may run code. This one holds the second merge on blue, if it is told to.
GATE = """
import time
from pathlib import Path

def text(doc):
    if Path("hold").exists() and Path("artifacts/evaluate/merges/average").exists():
        Path("held").touch()
        time.sleep(600)
    return doc["text"]
"""
pytestmark = pytest.mark.usefixtures("prefect")


def test_repro_alone_writes_the_same_lock(project: Path) -> None:
    keep_two_candidates(project)  # every stage is a process, which takes seconds to start
    assert len(pipeline()["made"]) == 13
    lock = (project / "dvc.lock").read_bytes()
    shutil.rmtree(project / "artifacts")
    shutil.rmtree(project / ".dvc/cache")
    for name in ("dvc.lock", "mlflow.db"):
        (project / name).unlink()
    dvc("repro")
    assert (project / "dvc.lock").read_bytes() == lock
    assert pipeline()["made"] == []


def test_the_command_runs_with_nothing_started(project: Path) -> None:
    command = [sys.executable, "-m", "flows.cli", "run"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(project / "prefect-home"), "COLUMNS": "160"}
    ran = subprocess.run(
        command, cwd=project, check=False, capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    for word in (*METHODS, *TASKS, "norm", "mlflow ui", "artifacts/report/index.html"):
        assert word in ran.stdout
    refused = subprocess.run(
        [*command, "--set", "merge.methods.ties.kep=1"],
        check=False, cwd=project, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: params.yaml")
    assert "Traceback" not in refused.stderr


def stop(folder: Path, blow: signal.Signals, seen: bytes) -> tuple[int, str]:
    """Run the command on a terminal, and stop it where the gate holds it and so much is seen."""
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
    environment |= {"TERM": "xterm", "COLUMNS": "160"}
    ours, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "run"],
        cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    said, deadline = bytearray(), time.monotonic() + 300

    def read() -> None:
        with os.fdopen(ours, "rb", buffering=0) as screen, suppress(OSError):  # its end
            while chunk := screen.read(4096):
                said.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    while not ((folder / "held").exists() and seen in said):
        assert process.poll() is None, said.decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(blow)
    (folder / "held").unlink()
    code = process.wait(300)
    reader.join()
    return code, said.decode()


def test_what_was_stopped_is_gone_on_with(project: Path) -> None:
    """By Ctrl-C, by SIGTERM and by its own limit, while the second of two is evaluated."""
    keep_two_candidates(project)
    (project / "data/tasks/gate.py").write_text(GATE)
    blue = project / "data/tasks/blue.yaml"
    blue.write_text(blue.read_text().replace('"{{text}}"', "!function gate.text"))
    (project / "hold").touch()
    for blow, seen in ((signal.SIGINT, b"12/24"), (signal.SIGTERM, b"")):  # items, on a bar
        code, said = stop(project, blow, seen)
        assert code == 3
        assert said.rstrip().endswith("interrupted: run the same command again to go on.")
        assert not list(project.rglob("*.partial"))
    params = (project / "params.yaml").read_text()
    limited = params + "schedule: {cron: 0 3 * * *, timezone: UTC, timeout: 3}\n"
    (project / "params.yaml").write_text(limited)
    state = pipeline(return_state=True)
    assert state.name == "TimedOut"
    with pytest.raises(OvertimeError, match=r"stopped after schedule.timeout \(3 s\); run again"):
        state.result()
    (project / "hold").unlink()
    (project / "params.yaml").write_text(params)
    assert pipeline()["made"] == ["evaluate ties", "register", "report"]
    lock = (project / "dvc.lock").read_bytes()

    for folder in ("artifacts", ".dvc/cache"):
        shutil.rmtree(project / folder)
    (project / "dvc.lock").unlink()
    assert len(pipeline()["made"]) == 13
    assert (project / "dvc.lock").read_bytes() == lock


def test_bad_weights_end_in_one_sentence(project: Path) -> None:
    expert = project / "data/experts/blue/adapter_model.safetensors"
    expert.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError):
        pipeline()
