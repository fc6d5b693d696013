"""Two processes promote at once, round after round: on a database, and on a server that they share.

Both have judged against the same champion before either may decide.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from poemerge.hashing import hash_files
from tasks import promote
from tasks.promote import evidence
from tasks.tracking import connected
from tasks.versions import resolve
from tests.servers import mlflow_server
from tests.tasks.registry import (
    NAME,
    TASKS,
    add_version,
    aliases,
    client,
    new_repository,
)

ROOT = Path(__file__).parents[2]
ROUNDS = 3
PATIENCE = 180  # s, of a busy machine

PROMOTER = """
import sys, time
from pathlib import Path
from tasks.promote import Limits, judge, promote
me, rounds = sys.argv[1], int(sys.argv[2])
limits = Limits(min_gain=-1.0, level=0.95, max_drop=1.0, certificates=True, verify=True)

def wait_for(*files):
    while not all(Path(file).exists() for file in files):
        time.sleep(0.001)

for turn in range(rounds):
    wait_for(f"go-{turn}")
    number = int(Path(f"{me}-{turn}").read_text())
    checks = {"verify": lambda ref: (), "rescore": None}
    found = judge("tiny", number, limits, by_hand=True, **checks)
    Path(f"judged-{me}-{turn}").touch()
    wait_for(f"judged-left-{turn}", f"judged-right-{turn}")
    row = promote(found, f"{me} wants it")
    Path(f"done-{me}-{turn}.part").write_text(f"{row.decision.kind}\\n{row.decision.reason}")
    Path(f"done-{me}-{turn}.part").rename(f"done-{me}-{turn}")
"""


@pytest.fixture
def database_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Path) -> None:
    monkeypatch.chdir(tmp_path)
    new_repository(tmp_path, database)


@pytest.fixture
def server(
    database_alone: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    with mlflow_server(tmp_path) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        yield


def _until(true: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert all(process.poll() in {None, 0} for process in processes), "a promoter failed"
        assert time.monotonic() < end, "a promoter hangs"
        time.sleep(0.01)


@pytest.mark.parametrize("registry", ["database_alone", "server"])
def test_exactly_one_wins_and_the_other_is_told(
    registry: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(registry)
    add_version("first", dict.fromkeys(TASKS, 20))
    env = os.environ | {"PYTHONPATH": os.fspath(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-c", PROMOTER, me, str(ROUNDS)], env=env)
        for me in ("left", "right")
    ]
    try:
        before: int | None = None
        for turn in range(ROUNDS):
            before = _one_round(turn, before, processes)
        for process in processes:
            assert process.wait(PATIENCE) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    ledger = promote.audit(NAME)
    assert ledger.problems == ()
    kinds = [row.decision.kind for row in ledger.rows if not row.void]
    assert sorted(kinds) == sorted(["promotion", "lost"] * ROUNDS)


def _one_round(turn: int, before: int | None, processes: list[subprocess.Popen]) -> int:
    """Two new versions for two promoters; the number of the winner."""
    numbers = {}
    for me in ("left", "right"):
        numbers[me] = add_version(f"{me} {turn}", dict.fromkeys(TASKS, 20))
        Path(f"{me}-{turn}").write_text(str(numbers[me]))
    Path(f"go-{turn}").touch()
    done = {me: Path(f"done-{me}-{turn}") for me in numbers}
    _until(lambda: all(path.exists() for path in done.values()), processes)
    told = {me: path.read_text().split("\n") for me, path in done.items()}
    assert sorted(kind for kind, _ in told.values()) == ["lost", "promotion"], told
    (winner,) = [me for me, (kind, _) in told.items() if kind == "promotion"]
    (reason,) = [reason for kind, reason in told.values() if kind == "lost"]
    assert f"promotion of version {numbers[winner]}" in reason

    found = aliases()
    assert found["champion"] == numbers[winner]
    assert found.get("previous") == before
    with connected() as mlflow:
        champion = resolve(mlflow, f"models:/{NAME}@champion")
        assert evidence.damage(champion) == ()
        copy = evidence.copy_to(Path(f"copy-{turn}"), champion)
    assert hash_files(copy) == hash_files(Path("artifacts/merge", f"{winner} {turn}"))
    assert client().get_model_version(NAME, str(numbers[winner])).tags["poemerge.promoted"]
    return numbers[winner]
