"""Sweeps and registrations of a project that are killed or stopped at random moments."""

import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from dvc.repo import Repo
from mlflow import MlflowClient
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness

from flows import versioning
from flows.params import read
from flows.places import PLAIN
from flows.selection import find_places
from flows.steps import STAGES, steps
from poemerge.hashing import hash_files
from tasks.versions import CHALLENGER
from tests.flows.conftest import keep_two_candidates, make_project
from tests.reliability.disturbed import STOPS, disturb
from tests.reliability.trials import Trials

SWEEP = """
sweep:
  sampler: grid
  trials: 4
  prune: false
  seed: 0
  storage: .poemerge/sweep/optuna.db
  space:
    task_arithmetic: {strength: [0.5, 1.0]}
    average: {}
"""


@dataclass(frozen=True)
class Sweep:
    """`poemerge sweep` over three candidates."""

    sources: Path
    words = ("sweep",)

    def fresh(self, folder: Path) -> None:
        shutil.copytree(self.sources, folder, symlinks=True)

    def is_done(self, folder: Path) -> bool:
        return any(folder.glob(".poemerge/sweep/*/sweep.json"))

    def check(self, folder: Path, undisturbed: Path) -> None:
        assert contents(folder) == contents(undisturbed)
        assert not list(folder.rglob("*.partial"))
        ended = statuses(folder)
        assert "RUNNING" not in {status for _, status in ended}
        finished = Counter(name for name, status in ended.elements() if status == "FINISHED")
        assert finished["sweep"] == 1
        assert max(finished.values()) == 1


@dataclass(frozen=True)
class Registration:
    """`poemerge run` where everything up to the evaluation is done."""

    sources: Path
    words = ("run",)

    def fresh(self, folder: Path) -> None:
        shutil.copytree(self.sources, folder, symlinks=True)

    def is_done(self, folder: Path) -> bool:  # noqa: ARG002 - it looks for itself
        return False

    def check(self, folder: Path, undisturbed: Path) -> None:
        assert (folder / "dvc.lock").read_bytes() == (undisturbed / "dvc.lock").read_bytes()
        with Repo(folder) as repo:
            assert repo.status() == {}
        assert not list(folder.rglob("*.partial"))
        client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
        (version,) = client.search_model_versions("name = 'tiny'")
        assert client.get_model_version_by_alias("tiny", CHALLENGER).version == version.version
        (same,) = MlflowClient(f"sqlite:///{undisturbed}/mlflow.db").search_model_versions("")
        assert version.tags.keys() == same.tags.keys()
        assert version.source == same.source
        assert "RUNNING" not in {status for _, status in statuses(folder)}


def contents(folder: Path) -> Mapping[str, str]:
    """Scores and boards of a sweep."""
    found = hash_files(folder / ".poemerge/sweep")
    return {name: h for name, h in found.items() if name.endswith(("s.json", "sweep.json"))}


def statuses(folder: Path) -> Counter[tuple[str, str]]:
    """(name, status) of all runs, counted."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (place,) = [e.experiment_id for e in client.search_experiments() if e.name == "tests"]
    found = client.search_runs([place], max_results=1000)
    return Counter((run.info.run_name, run.info.status) for run in found)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with prefect_test_harness(300):
        yield str(PREFECT_API_URL.value())


@pytest.fixture
def api(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", server)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, zoo, database: Path) -> Path:  # noqa: ANN001
    """A project of two candidates with MLflow's database; nothing has been run in it."""
    folder = make_project(tmp_path_factory.mktemp("kills") / "project", zoo)
    keep_two_candidates(folder)
    with (folder / "params.yaml").open("a") as file:
        file.write(SWEEP)
    shutil.copyfile(database, folder / "mlflow.db")
    return folder


@pytest.fixture(scope="module")
def evaluated(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with all that comes before the registration, and DVC told of it."""
    folder = tmp_path_factory.mktemp("kills") / "evaluated"
    shutil.copytree(project, folder, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        places = find_places(PLAIN)
        for stage in STAGES[: STAGES.index("register")]:
            todo = list(steps(stage, places))
            for step in todo:
                step.run()
            names = [f"merge@{step.label}" for step in todo] if stage == "merge" else [stage]
            versioning.commit(names, read(PLAIN))
    return folder


@pytest.mark.usefixtures("api")
@pytest.mark.usefixtures("long")
def test_a_killed_sweep(trials: Trials, project: Path, tmp_path: Path) -> None:
    """A sweep killed at a random moment is gone on with, to the same scores and winners"""
    disturb(trials, {"short": 1, "full": 50}, Sweep(project), tmp_path, signal.SIGKILL)


@pytest.mark.usefixtures("api")
@pytest.mark.usefixtures("long")
def test_a_stopped_sweep(trials: Trials, project: Path, tmp_path: Path) -> None:
    """A sweep stopped by Ctrl-C or SIGTERM at a random moment says how to go on, and does"""
    disturb(trials, {"short": 1, "full": 50}, Sweep(project), tmp_path, *STOPS)


@pytest.mark.usefixtures("api")
@pytest.mark.usefixtures("long")
def test_a_killed_registration(trials: Trials, evaluated: Path, tmp_path: Path) -> None:
    """A registration killed at a random moment ends in one version, one challenger, a clean DVC"""
    disturb(trials, {"short": 1, "full": 50}, Registration(evaluated), tmp_path, signal.SIGKILL)


@pytest.mark.usefixtures("api")
@pytest.mark.usefixtures("long")
def test_a_stopped_registration(trials: Trials, evaluated: Path, tmp_path: Path) -> None:
    """A registration stopped by Ctrl-C or SIGTERM at a random moment likewise says how to go on"""
    disturb(trials, {"short": 1, "full": 50}, Registration(evaluated), tmp_path, *STOPS)
