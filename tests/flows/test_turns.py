"""One merge at a time on a device: real processes that hold, wait, are killed and give up."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from flows import stage
from flows.cli import main
from flows.places import ARTIFACTS
from flows.turns import tickets, turn
from poemerge.alone import alone

HOLDER = """
import logging, sys
from flows.turns import turn
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
with turn(["cpu"]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a queue for this test alone."""
    monkeypatch.setenv("POEMERGE_QUEUE", str(tmp_path / "queue"))
    return tmp_path / "queue" / "cpu"


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes of Python; what still lives at the end is killed."""
    begun: list[subprocess.Popen[str]] = []

    def begin(*arguments: object) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
        begun.append(process)
        return process

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def pids() -> list[int]:
    return [ticket.pid for ticket in tickets("cpu")]


def test_the_first_holds_it_and_the_others_follow_in_order(
    folder: Path,
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    with turn(["cpu"]):
        (own,) = tickets("cpu")
        assert own.pid == os.getpid()
    processes = []
    for count in range(1, 4):
        processes.append(start("-c", HOLDER))
        until(lambda count=count: len(pids()) == count)
    first, second, third = processes
    assert pids() == [process.pid for process in processes]
    assert first.stdout.readline() == "held\n"
    said = second.stderr.readline()
    assert said.startswith(f"waiting for cpu, held by process {first.pid} (")
    assert str(Path.cwd()) in said
    assert f" since {tickets('cpu')[0].since}; 1 of " in said
    assert "; 2 of 2 in the queue" in third.stderr.readline()

    first.kill()  # SIGKILL: it can let go of nothing itself
    assert second.stdout.readline() == "held\n"
    assert f"held by process {second.pid}" in third.stderr.readline()
    until(lambda: pids() == [second.pid, third.pid])

    third.send_signal(signal.SIGINT)
    _, said = third.communicate(timeout=180)
    assert "KeyboardInterrupt" in said
    assert [path.name for path in folder.iterdir()] == ["00000002"]
    second.communicate("", timeout=180)
    assert second.returncode == 0
    assert list(folder.iterdir()) == []


def test_who_holds_it_does_not_wait_for_itself_and_another_thread_does(folder: Path) -> None:
    reached = threading.Event()

    def other() -> None:
        with turn(["cpu"]):
            reached.set()

    with turn(["cpu"]), turn(["cpu", "cpu"]):
        assert len(pids()) == 1
        thread = threading.Thread(target=other)
        thread.start()
        until(lambda: len(pids()) == 2)
        assert not reached.is_set()
    thread.join(180)
    assert reached.is_set()
    assert list(folder.iterdir()) == []


def test_a_block_that_fails_lets_go(folder: Path) -> None:
    with pytest.raises(ValueError, match="of the block"), turn(["cpu"]):
        raise ValueError("of the block")
    assert list(folder.iterdir()) == []
    with turn(["cpu"]):
        assert len(pids()) == 1


def test_a_merge_waits_its_turn_and_may_be_stopped(
    folder: Path,
    start: Callable[..., subprocess.Popen[str]],
    zoo,  # noqa: ANN001
    tmp_path: Path,
) -> None:
    sources = ["--base", zoo.base(), "--expert", zoo.adapter(1), "--device", "cpu"]
    with turn(["cpu"]):
        waiting = start("-m", "flows.cli", "merge", *sources, "--out", tmp_path / "merged")
        until(lambda: len(pids()) == 2)
        shown = CliRunner().invoke(main, ["queue"], catch_exceptions=False).output
        assert str(os.getpid()) in shown
        assert str(waiting.pid) in shown
        assert shown.index(str(os.getpid())) < shown.index(str(waiting.pid))
        waiting.send_signal(signal.SIGTERM)
        _, said = waiting.communicate(timeout=180)
        assert waiting.returncode == 3
        assert said.splitlines()[-1] == "interrupted: run the same command again to go on."
        assert f"process {os.getpid()}" in " ".join(said.split())
        assert len(list(folder.iterdir())) == 1
    assert not (tmp_path / "merged").exists()
    shown = CliRunner().invoke(main, ["queue"], catch_exceptions=False).output
    assert shown == "Nobody merges on this machine, and nobody waits.\n"


def test_a_stage_of_dvc_does_not_wait_for_a_run(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone(ARTIFACTS):
        assert stage.main(["fetch"]) == 1
    assert f"error: artifacts is held by process {os.getpid()} (" in capsys.readouterr().err
    assert not (project / "artifacts").exists()
    assert stage.main(["fetch"]) == 0
