"""One at a time on a place: real processes that hold it, wait, are refused and are killed."""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from poemerge.alone import alone, clear
from poemerge.errors import SettingError
from poemerge.lineage import Lineage, produce

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys
from pathlib import Path
from poemerge.alone import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(place: Path) -> "subprocess.Popen[str]":
    """A process that holds the place until it is told to end."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(place)],
        cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 180
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_second_waits_and_is_told_for_whom(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "poemerge")
    place = tmp_path / "new" / "model"
    holder = hold(place)
    refused = pytest.raises(SettingError, match=f"held by process {holder.pid} .*; run again")
    with refused, alone(place, patient=False):
        pytest.fail("two hold it")
    release = threading.Thread(
        target=lambda: (until(lambda: "waiting" in caplog.text), holder.communicate(""))
    )
    release.start()
    with alone(place):
        release.join(180)
        assert holder.returncode == 0
    assert f"waiting for {place}, held by process {holder.pid} (python" in caplog.text
    assert list(place.parent.iterdir()) == []


def test_who_is_killed_holds_nothing(tmp_path: Path) -> None:
    holder = hold(tmp_path / "model")
    holder.kill()
    holder.communicate()
    assert [path.name for path in tmp_path.iterdir()] == ["model.lock.partial"]
    with alone(tmp_path / "model", patient=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_locks_of_the_killed_are_cleared_and_others_stay(tmp_path: Path) -> None:
    killed, holder = hold(tmp_path / "a/killed"), hold(tmp_path / "b/held")
    killed.kill()
    killed.communicate()
    clear(tmp_path)
    (lock,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert lock == tmp_path / "b/held.lock.partial"
    with (
        pytest.raises(SettingError, match=f"process {holder.pid}"),
        alone(tmp_path / "b/held", patient=False),
    ):
        pytest.fail("it was taken from its holder")
    holder.communicate("")
    clear(tmp_path / "nowhere")


def test_many_are_never_two(tmp_path: Path) -> None:
    inside = tmp_path / "inside"

    def work() -> None:
        for _ in range(50):
            with alone(tmp_path / "model"):
                inside.open("x").close()  # fails where another is inside
                inside.unlink()
                done.append(1)

    done: list[int] = []
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    assert len(done) == 200
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_the_work_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file"), alone(tmp_path / "file/model"):
        os.mkdir(tmp_path / "file/model")  # noqa: PTH102


def test_what_another_made_meanwhile_is_not_made_again(tmp_path: Path) -> None:
    made: list[Path] = []
    entered, record = threading.Event(), Lineage("stage", {})

    def work(folder: Path) -> None:
        made.append(folder)
        entered.set()
        time.sleep(0.2)

    first = threading.Thread(target=produce, args=(tmp_path / "out", record, work))
    first.start()
    entered.wait(180)
    assert not produce(tmp_path / "out", record, work)
    first.join()
    assert len(made) == 1
