"""Two at once, who do not know of each other: on one output, one project, one database, one cache.

Their queue for the device, which would let one wait for the other, is taken from them.
"""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness

from flows.provenance import verify
from poemerge.lineage import Lineage, hash_files
from tasks import promote
from tests.flows.conftest import keep_two_candidates, make_project
from tests.reliability.contest import Arena, Command, Ended
from tests.reliability.trials import Trials

NAME = "tiny"
PROMOTE = """\
promote:
  automatic: true
  min_gain: -1.0
  level: 0.95
  max_drop: 1.0
  certificates: true
  verify: true
"""
RUN = ("run",)
ONCE = Counter([NAME, "base", "red", "blue", "average", "ties"])  # runs of one registration


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    """Where contenders start, with a Prefect server for all."""
    before = dict(os.environ)
    with prefect_test_harness(180):
        os.environ["PREFECT_API_URL"] = PREFECT_API_URL.value()
        yield Arena()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, zoo) -> Path:  # noqa: ANN001
    """A project before its first run, with little to evaluate and to report; for reading only."""
    folder = make_project(tmp_path_factory.mktemp("fresh") / "project", zoo)
    keep_two_candidates(folder)
    params = (folder / "params.yaml").read_text()
    params = params.replace("limit: 6", "limit: 2").replace("detail: 2", "detail: 0")
    (folder / "params.yaml").write_text(params + PROMOTE)
    return folder


@pytest.fixture(scope="module")
def finished(fresh: Path, arena: Arena) -> Path:
    """The same after a run that nobody disturbed; for reading only."""
    folder = copy(fresh, fresh.with_name("finished"))
    (ended,) = arena.contend([Command(RUN, folder)], folder.with_name("log"))
    assert ended.code == 0, ended.said
    return folder


def copy(source: Path, target: Path) -> Path:
    """A clone of a project, but for its MLflow."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("mlflow.db*", "mlruns"))
    return target


def before_registration(finished: Path, target: Path) -> Path:
    """A project in which all is done but registration and report."""
    folder = copy(finished, target)
    for stage in ("register", "report"):
        shutil.rmtree(folder / "artifacts" / stage)
    return folder


def said(ended: list[Ended]) -> str:
    return "\n".join(f"{end.code}:\n{end.said}" for end in ended)


def check_end(ended: list[Ended], codes: list[int]) -> None:
    """They ended so, whoever was first, and none with a traceback."""
    assert sorted(end.code for end in ended) == codes, said(ended)
    assert not any("Traceback" in end.said for end in ended), said(ended)


def check_project(folder: Path, like: Path) -> None:
    """Nothing is half done, DVC is clean, and all bytes are those of an undisturbed run."""
    assert not list(folder.rglob("*.partial"))
    assert (folder / "dvc.lock").read_bytes() == (like / "dvc.lock").read_bytes()
    assert hash_files(folder / "artifacts/merge") == hash_files(like / "artifacts/merge")
    status = [sys.executable, "-m", "dvc", "status"]
    done = subprocess.run(status, cwd=folder, capture_output=True, text=True, check=True)
    assert "up to date" in done.stdout, done.stdout
    for label in ("average", "ties"):
        assert verify(str(folder / "artifacts/merge" / label)).problems == ()


def check_mlflow(database: Path, versions: int = 1) -> MlflowClient:
    """The database is whole, no run is without an end, no bytes have two versions."""
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    client = MlflowClient(f"sqlite:///{database}")
    found = client.search_model_versions(f"name = '{NAME}'")
    digests = Counter(version.tags["poemerge.digest"] for version in found)
    assert list(digests.values()) == [1] * versions
    assert all({"poemerge.key", "poemerge.evaluation"} <= version.tags.keys() for version in found)
    place = client.get_experiment_by_name("tests").experiment_id
    runs = client.search_runs([place])
    assert {run.info.status for run in runs} == {"FINISHED"}
    names = Counter(run.info.run_name for run in runs)
    assert names.keys() == ONCE.keys()
    assert max(names.values()) <= 2 * versions
    return client


def check_live(folder: Path, client: MlflowClient) -> None:
    """Aliases say what the table of decisions says, which is whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
        ledger = promote.audit(NAME)
    assert ledger.problems == ()
    aliases = client.get_registered_model(NAME).aliases
    assert int(aliases["champion"]) == ledger.champions[-1]
    assert "challenger" in aliases


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
            check_end(ended, [0, 0] if number % 2 else [0, 1])
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
            check_end(ended, [0, 0])
            assert "waiting for artifacts, held by process" in said(ended)
            check_project(folder, finished)
            check_live(folder, check_mlflow(folder / "mlflow.db"))


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
            check_end(ended, [0, 0])
            for clone in clones:
                check_project(clone, finished)
            check_live(clones[0], check_mlflow(shared / "mlflow.db"))
