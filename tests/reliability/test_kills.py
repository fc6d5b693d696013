"""Commands that are killed or stopped at random moments, and the same command once more."""

import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import pytest
import torch
from dvc.repo import Repo
from mlflow import MlflowClient
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness
from safetensors.torch import save_file

from flows import versioning
from flows.params import read
from flows.places import PLAIN
from flows.selection import find_places
from flows.steps import STAGES, steps
from poemerge.hashing import hash_files
from poemerge.lineage import Lineage
from tasks.versions import CHALLENGER
from tests.flows.conftest import keep_two_candidates, make_project
from tests.reliability.commands import HINT, Blow, Ended, command
from tests.reliability.trials import Trials

SHARDS, SIDE = 60, 96
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


class Subject(Protocol):
    """Something that is done by one command, and may be disturbed."""

    sources: Path  # of all that the command needs
    words: tuple[str, ...]

    def fresh(self, folder: Path) -> None:
        """Make a copy of the sources to work in."""

    def is_done(self, folder: Path) -> bool:
        """True if the command would have nothing to do; nothing half done may look like that."""

    def check(self, folder: Path, undisturbed: Path) -> None:
        """Assert that both are the same, and that nothing is left of what was disturbed."""


@dataclass(frozen=True)
class Merge:
    """`poemerge merge` of two experts, of many shards each."""

    sources: Path
    words = (
        *("merge", "--base", "base", "--expert", "a", "--expert", "b", "--out", "out"),
        *("--method", "gaussian_poe", "--device", "cpu"),
    )

    def fresh(self, folder: Path) -> None:
        shutil.copytree(self.sources, folder)

    def is_done(self, folder: Path) -> bool:
        out = folder / "out"
        if out.exists():
            assert dict(Lineage.find(out).outputs) == hash_files(out)
        return out.exists()

    def check(self, folder: Path, undisturbed: Path) -> None:
        assert {path.name for path in folder.iterdir()} == {"base", "a", "b", "out"}
        for path in ("out/lineage.json", "out/merge_report.json"):
            assert (folder / path).read_bytes() == (undisturbed / path).read_bytes()
        assert hash_files(folder / "out") == hash_files(undisturbed / "out")


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
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two experts of 60 shards each."""
    folder = tmp_path_factory.mktemp("kills") / "sources"
    for seed, name in enumerate(("base", "a", "b")):
        write_shards(folder / name, seed)
    return folder


def write_shards(folder: Path, seed: int) -> None:
    """A checkpoint of SHARDS files with two square matrices and a vector each."""
    folder.mkdir(parents=True)
    common, own = (torch.Generator().manual_seed(each) for each in (100, seed))
    placed = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        shapes = {"up": (SIDE, SIDE), "down": (SIDE, SIDE), "norm": (SIDE,)}
        tensors = {f"layers.{shard}.{name}.weight": shape for name, shape in shapes.items()}
        save_file(
            {
                name: torch.randn(shape, generator=common)
                + bool(seed) * 0.1 * torch.randn(shape, generator=own)
                for name, shape in tensors.items()
            },
            folder / file,
        )
        placed |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (folder / "config.json").write_text("{}")


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


@cache
def left_alone(subject: Subject) -> tuple[Path, float]:
    """The folder of an undisturbed command, and the seconds that it took."""
    folder = subject.sources.parent / f"{subject.sources.name}-undisturbed"
    subject.fresh(folder)
    return folder, done(command(subject.words, folder)).seconds


def disturb(
    trials: Trials, counts: Mapping[str, int], subject: Subject, root: Path, *blows: signal.Signals
) -> None:
    """Strike at a random moment, do the same once more, and compare with what was left alone."""
    undisturbed, seconds = left_alone(subject)
    for number in trials(**counts):
        folder = root / str(number)
        subject.fresh(folder)
        with trials.trial(number):
            dice = random.Random(number)
            blow = Blow(dice.choice(blows), dice.random() * seconds)
            struck = command(subject.words, folder, blow=blow)
            check_end(struck, blow)
            if not subject.is_done(folder):
                done(command(subject.words, folder))
            subject.check(folder, undisturbed)
        shutil.rmtree(folder)


def done(ended: Ended) -> Ended:
    assert ended.code == 0, ended.said
    return ended


def check_end(ended: Ended, blow: Blow) -> None:
    """Killed without a word; stopped in order; or it was quicker."""
    if ended.code == 0:
        return
    if blow.signal == signal.SIGKILL:
        assert ended.code == -signal.SIGKILL, ended.said
        return
    assert ended.code == 3, ended.said
    assert HINT in ended.said.splitlines(), ended.said  # Prefect may say something after it
    assert "Traceback" not in ended.said


@pytest.mark.usefixtures("long")
def test_a_killed_first_use(trials: Trials, tmp_path: Path) -> None:
    """MLflow's database, killed while it is made, is made by the next command"""
    words, seconds = ("lineage", "models:/tiny/1"), 0.0
    for number in trials(short=1, full=50):
        folder = tmp_path / str(number)
        folder.mkdir()
        seconds = seconds or ask(words, tmp_path)
        with trials.trial(number):
            blow = Blow(signal.SIGKILL, random.Random(number).random() * seconds)
            assert command(words, folder, blow=blow).code in {1, -signal.SIGKILL}
            ask(words, folder)


def ask(words: tuple[str, ...], folder: Path) -> float:
    """Ask MLflow for a version that is not there; seconds that the answer took."""
    asked = command(words, folder)
    assert asked.code == 1
    assert "models:/tiny/1: it has no version" in asked.sentence, asked.said
    return asked.seconds


STOPS = (signal.SIGINT, signal.SIGTERM)
COUNTS = {"short": 3, "full": 50}


def test_a_killed_merge(trials: Trials, sources: Path, tmp_path: Path) -> None:
    """A merge killed at a random moment is gone on with, to the same bytes"""
    disturb(trials, COUNTS, Merge(sources), tmp_path, signal.SIGKILL)


def test_a_stopped_merge(trials: Trials, sources: Path, tmp_path: Path) -> None:
    """A merge stopped by Ctrl-C or SIGTERM at a random moment says how to go on, and does"""
    disturb(trials, COUNTS, Merge(sources), tmp_path, *STOPS)


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
