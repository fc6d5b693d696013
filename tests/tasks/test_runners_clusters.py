"""The same merge by clusters of Dask and Ray, with workers that die or are not there."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from poemerge.errors import CheckpointError, SettingError
from poemerge.merge import merge_checkpoints
from tasks.runners import open_runner
from tests.tasks.sharded import merge, survives, with_a_hole

PYTHON = (sys.executable, "-m")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a cluster of three workers, each a process of its own."""
    folder = tmp_path_factory.mktemp("dask")
    found = folder / "scheduler.json"
    how = ["--no-dashboard", "--scheduler-file", str(found)]
    local = ["--host", "127.0.0.1"]
    commands = [["scheduler", *local, "--port", "0", *how]]
    commands += [["worker", *local, "--no-nanny", "--nthreads", "1", *how]] * 3
    log = (folder / "log").open("wb")
    started = [
        subprocess.Popen(
            [*PYTHON, "dask", *command], stdout=log, stderr=log, cwd=folder, env=_environment()
        )
        for command in commands
    ]
    try:
        deadline = time.monotonic() + 120
        while not found.exists() or not found.read_text():
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield json.loads(found.read_text())["address"]
    finally:
        for process in started:
            process.kill()
            process.wait()
        log.close()


def _environment() -> dict[str, str]:
    """Workers find the very code that is tested."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


class TestDask:
    def test_a_cluster_of_which_one_worker_is_killed(
        self, models: Path, here: Path, tmp_path: Path, cluster: str
    ) -> None:
        runner = open_runner("dask", address=cluster, device="cpu")
        survives(models, tmp_path / "out", here, runner)

    def test_a_refusal_is_its_own_sentence(
        self, models: Path, tmp_path: Path, cluster: str
    ) -> None:
        merging = (models / "base", {"hole": with_a_hole(tmp_path / "hole")}, tmp_path / "out")
        with pytest.raises(CheckpointError) as alone:
            merge_checkpoints(*merging, "average", "cpu")
        runner = open_runner("dask", address=cluster, device="cpu")
        with pytest.raises(CheckpointError) as sent:
            merge_checkpoints(*merging, "average", "cpu", runner=runner)
        assert str(sent.value) == str(alone.value)

    @pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
    def test_a_listener_that_is_no_scheduler(
        self, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: bytes
    ) -> None:
        """One that speaks another language, and one that never says a word."""

        def answer() -> None:
            with suppress(OSError):  # it is closed
                while True:
                    callers.append(listener.accept()[0])
                    callers[-1].sendall(says)

        callers: list[socket.socket] = []
        monkeypatch.setattr("tasks.runners.on_dask.ANSWER", 2)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=answer, daemon=True).start()
            url = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
            with pytest.raises(SettingError, match=f"No scheduler of Dask answers at {url}"):
                merge(models, tmp_path / "out", open_runner("dask", None, url, device="cpu"))


class TestRay:
    def test_workers_here_of_which_one_is_killed(
        self, models: Path, here: Path, tmp_path: Path
    ) -> None:
        survives(models, tmp_path / "out", here, open_runner("ray", 2, device="cpu"))


@pytest.mark.parametrize(
    ("runner", "address"),
    [("dask", "tcp://127.0.0.1:9"), ("ray", "127.0.0.1:9"), ("ray", "ray://127.0.0.1:9")],
)
def test_no_cluster_is_there(models: Path, tmp_path: Path, runner: str, address: str) -> None:
    with pytest.raises(SettingError, match=f"No cluster answers at {address} .*refused"):
        merge(models, tmp_path / "out", open_runner(runner, None, address, device="cpu"))
