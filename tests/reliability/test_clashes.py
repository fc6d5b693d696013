"""Two at once, who do not know of each other: on one output, one project, one database, one cache.

Their queue for the device, which would let one wait for the other, is taken from them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.provenance import verify
from poemerge.hashing import hash_files
from poemerge.lineage import Lineage
from tests.reliability.checks import (
    check_database,
    check_end,
    check_live,
    check_project,
    check_records,
    said,
)
from tests.reliability.contest import PATIENCE, Arena, Command, Ended
from tests.reliability.projects import before_registration, copy
from tests.reliability.trials import Trials

RUN = ("run",)

pytestmark = pytest.mark.usefixtures("long")


def test_one_output(trials: Trials, arena: Arena, fresh: Path, tmp_path: Path) -> None:
    """Two merges into one folder at once: the second waits, and is then told that it exists"""
    sources = ["--base", "data/base", "--expert", "data/experts/red"]
    sources += ["--expert", "data/experts/blue", "--method", "ties", "--device", "cpu"]
    for number in trials(short=2, full=20):
        with trials.trial(number):
            out = tmp_path / f"{number}/merged"
            words = ["merge", *sources, "--out", str(out)]
            words += ["--overwrite"] if number % 2 else []
            both = [Command(tuple(words), fresh)] * 2
            ended = arena.contend(both, tmp_path / f"log-{number}")
            check_end(ended, 0, 0 if number % 2 else 1)
            if number % 2 == 0:
                assert f"error: {out} exists already" in said(ended)
            assert [path.name for path in out.parent.iterdir()] == ["merged"]
            assert dict(Lineage.find(out).outputs) == hash_files(out)
            assert verify(str(out)).problems == ()


def test_one_project(
    trials: Trials, arena: Arena, fresh: Path, finished: Path, tmp_path: Path
) -> None:
    """Two runs in one project at once, with no MLflow database yet: one waits, both end well"""
    for number in trials(short=1, full=20):
        with trials.trial(number):
            folder = copy(fresh, tmp_path / f"{number}")
            ended = arena.contend([Command(RUN, folder)] * 2, tmp_path / f"log-{number}")
            check_end(ended, 0, 0)
            assert "waiting for artifacts, held by process" in said(ended)
            check_project(folder, finished)
            client = check_database(folder / "mlflow.db")
            check_records(client)
            check_live(folder, client)


def test_one_registry(trials: Trials, arena: Arena, finished: Path, tmp_path: Path) -> None:
    """Two clones register the same at once, in one new MLflow database and one DVC cache"""
    for number in trials(short=1, full=20):
        with trials.trial(number):
            shared = tmp_path / f"{number}"
            shared.mkdir()
            environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{shared}/mlflow.db"}
            clones = [before_registration(finished, shared / name) for name in ("left", "right")]
            for clone in clones:
                cache = ["cache", "dir", "--local", str(shared / "cache")]
                subprocess.run([sys.executable, "-m", "dvc", *cache], cwd=clone, check=True)
            commands = [Command(RUN, clone, environment) for clone in clones]
            ended = arena.contend(commands, tmp_path / f"log-{number}")
            check_end(ended, 0, 0)
            for clone in clones:
                check_project(clone, finished)
            client = check_database(shared / "mlflow.db")
            check_records(client, tries=2)
            check_live(clones[0], client)


def test_one_dvc(
    trials: Trials, arena: Arena, finished: Path, database: Path, tmp_path: Path
) -> None:
    """A run that commits beside two `dvc add` in one DVC repository: it ends well, DVC is clean"""
    for number in trials(short=1, full=20):
        with trials.trial(number):
            folder = copy(finished, tmp_path / f"{number}")
            shutil.copy(database, folder / "mlflow.db")
            (folder / "dvc.lock").unlink()
            added = [f"data-{name}.bin" for name in ("left", "right")]
            for name in added:
                (folder / name).write_text(f"{name} {number}")
            commands = [Command(("add", name), folder, program="dvc") for name in added]
            log = tmp_path / f"log-{number}"
            run, *others = arena.contend([Command(RUN, folder), *commands], log)
            check_end([run], 0)
            for other, command in zip(others, commands, strict=True):
                if other.code:
                    assert "lock" in other.said, other.said
                    check_end(arena.contend([command], log), 0)
            check_project(folder, finished)
            check_records(check_database(folder / "mlflow.db"))


@pytest.fixture(scope="module")
def changed(finished: Path, arena: Arena) -> Path:
    """A finished project with another strength, and so another best model."""
    folder = copy(finished, finished.with_name("changed"))
    params = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(params.replace("strength: 1.0", "strength: 0.9"))
    check_end(arena.contend([Command(RUN, folder)], folder.with_name("log")), 0)
    return folder


def test_promotion(
    trials: Trials, arena: Arena, finished: Path, changed: Path, tmp_path: Path
) -> None:
    """`poemerge promote` while a run registers and promotes: one champion, every decision kept"""
    for number in trials(short=1, full=20):
        with trials.trial(number):
            folder = before_registration(changed, tmp_path / f"{number}")
            database = shutil.copy(finished / "mlflow.db", tmp_path / f"{number}.db")
            environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{database}"}
            commands = [Command(words, folder, environment) for words in (RUN, ("promote",))]
            run, promotion = arena.contend(commands, tmp_path / f"log-{number}")
            check_end([run], 0)
            check_end([promotion], promotion.code)
            assert promotion.code in {0, 1}
            check_project(folder, changed)
            client = check_database(Path(database))
            check_records(client, versions=2)
            check_live(folder, client)
            assert int(client.get_registered_model("tiny").aliases["champion"]) == 2


def test_own_prefect(trials: Trials, finished: Path, tmp_path: Path) -> None:
    """Two runs at once that bring their own Prefect servers, with no database yet: both end well"""
    for number in trials(short=1, full=20):
        with trials.trial(number):
            clones = [
                before_registration(finished, tmp_path / f"{number}/{name}")
                for name in ("left", "right")
            ]
            home = {"PREFECT_HOME": str(tmp_path / f"home-{number}")}
            processes = [
                subprocess.Popen(
                    [sys.executable, "-m", "flows.cli", "run"],
                    cwd=clone,
                    env={**os.environ, **home, "POEMERGE_QUEUE": f"{clone}-queue"},
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
                for clone in clones
            ]
            told = [process.communicate(timeout=PATIENCE)[0] for process in processes]
            ended = [Ended(p.returncode, t) for p, t in zip(processes, told, strict=True)]
            check_end(ended, 0, 0)
            for clone in clones:
                check_project(clone, finished)
                check_records(check_database(clone / "mlflow.db"))
