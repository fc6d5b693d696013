"""The whole flow for real: Prefect, lm-eval, MLflow and DVC on tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path
from platform import node

import mlflow
import pytest
from mlflow import MlflowClient
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.settings import PREFECT_API_URL, temporary_settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows import artifacts
from flows.console import console
from flows.outcome_table import show_outcome
from flows.pipeline import pipeline, run_stage
from flows.selection import find_places
from flows.steps import steps
from poemerge.errors import PoemergeError
from poemerge.hashing import hash_files
from poemerge.lineage import Lineage
from tasks.evaluate.work import ScoreJob
from tasks.progress import watched_by
from tasks.register.leaderboard import Leaderboard
from tasks.runners.worker import Worker
from tasks.versions import is_own
from tests.flows.conftest import METHODS, TASKS, enter_copy, make_project
from tests.flows.dvc_command import dvc
from tests.flows.prefect_artifacts import shown

pytestmark = pytest.mark.usefixtures("prefect")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, zoo) -> tuple[Path, dict]:  # noqa: ANN001
    """A project after its first run; for reading only."""
    folder = make_project(tmp_path_factory.mktemp("flow") / "project", zoo)
    before = Path.cwd()
    os.chdir(folder)
    try:
        return folder, pipeline()
    finally:
        os.chdir(before)


@pytest.fixture
def done(finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: ANN001
    """A copy of that project to go on with, and the working directory in it."""
    return enter_copy(finished[0], tmp_path, monkeypatch)


def test_the_first_run_does_everything(finished: tuple[Path, dict]) -> None:
    folder, outcome = finished
    assert outcome["made"] == [
        *("fetch base", "fetch red", "fetch blue", "task_vectors"),
        *(f"merge {method}" for method in METHODS),
        *("evaluate base", "evaluate red", "evaluate blue"),
        *(f"evaluate {method}" for method in METHODS),
        "register",
        "report",
    ]
    board = json.loads((folder / "artifacts/register/leaderboard.json").read_text())
    merges = [row for row in board["rows"] if row["kind"] == "merge"]
    assert {row["label"] for row in merges} == set(METHODS)
    for row in merges:
        assert {task: set(by) for task, by in row["scores"].items()} == {
            task: {"validation", "test"} for task in TASKS
        }
    best = max(row["mean"]["validation"] for row in merges)
    chosen = next(row for row in merges if row["label"] == board["best"])
    assert chosen["mean"]["validation"] == best


def test_every_merge_loads(finished: tuple[Path, dict]) -> None:
    folder, outcome = finished
    for path in outcome["merges"].values():
        AutoModelForCausalLM.from_pretrained(folder / path)
        tokenizer = AutoTokenizer.from_pretrained(folder / path)
        assert tokenizer.decode(tokenizer("a b 12").input_ids) == "a b 12"


def test_mlflow_holds_the_best(finished: tuple[Path, dict], monkeypatch) -> None:  # noqa: ANN001
    folder, outcome = finished
    monkeypatch.chdir(folder)
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    client = MlflowClient()
    assert str(client.get_registered_model("tiny").aliases["challenger"]) == "1"
    challenger = client.get_model_version_by_alias("tiny", "challenger")
    assert challenger.source.startswith("dvc://")
    entry = json.loads(Path(outcome["register"], "registration.json").read_text())
    copy = Path(mlflow.artifacts.download_artifacts("models:/tiny@challenger"))
    (copy / "registered_model_meta").unlink()  # which MLflow adds
    own = {name: content for name, content in hash_files(copy).items() if is_own(name)}
    assert own == hash_files(Path(outcome["merges"][entry["candidate"]]))
    assert (copy / "MLmodel").is_file()  # by which MLflow loads it


def test_prefect_says_where_the_page_is(finished: tuple[Path, dict]) -> None:
    folder, outcome = finished
    page = (folder / outcome["report"] / "index.html").resolve()
    assert page.is_file()
    assert f"On {node()}: `{page}`" in shown("report")


def test_prefect_says_what_came_of_it(finished: tuple[Path, dict]) -> None:
    with get_client(sync_client=True) as client:
        messages = [run.state.message for run in client.read_flow_runs()]
    _, outcome = finished
    best = json.loads(Path(finished[0], "artifacts/register/leaderboard.json").read_text())["best"]
    assert f"{len(outcome['made'])} steps done; best: {best}" in messages


def test_prefect_shows_how_far_it_is_and_who_is_best(finished: tuple[Path, dict]) -> None:
    folder, outcome = finished
    for method in METHODS:
        assert 100 in shown(f"merge-{method.replace('_', '-')}")
        assert 100 in shown(f"evaluate-{method.replace('_', '-')}")
    assert "no complete run has registered anything yet" in shown("moved")
    board = json.loads((folder / outcome["register"] / "leaderboard.json").read_text())
    rows = [json.loads(table) for table in shown("leaderboard")][-1]
    assert [row["candidate"] for row in rows] == [row["label"] for row in board["rows"]]
    best = next(row for row in board["rows"] if row["label"] == board["best"])
    told = next(row for row in rows if row["candidate"] == board["best"])
    assert told["red"] == pytest.approx(best["scores"]["red"]["test"]["score"], abs=1e-4)
    assert told["validation"] == pytest.approx(best["mean"]["validation"], abs=1e-4)


@pytest.mark.filterwarnings("ignore:Artifact creation outside of a flow")
def test_a_server_that_is_away_stops_nothing(
    finished: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, outcome = finished
    monkeypatch.chdir(folder)
    steps = artifacts.Steps()
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        artifacts.show_outcome(outcome, "tests")
        for done in range(4):
            steps("merge ties", "tensors", done, 4)
    said = [record.message for record in caplog.records if record.name == "flows.artifacts"]
    assert len(said) == 2
    assert all("Connection refused" in line for line in said)


def test_candidates_are_spread_over_devices(
    done: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Files, records, task runs, progress and log are those of one process, whoever dies."""
    places = find_places(Path("params.yaml"), ["evaluate.device=cpu,cpu:0"])
    caplog.set_level("INFO", "tasks")
    begun: list[tuple[str, str]] = []
    real = Worker.begin

    def begin(self: Worker, job: ScoreJob) -> None:
        real(self, job)
        begun.append((self.device, str(job)))
        if len(begun) == 1:
            self._process.kill()

    monkeypatch.setattr(Worker, "begin", begin)

    @flow(name="spread")
    def spread() -> list[str]:
        return [step.name for step in run_stage("evaluate", list(steps("evaluate", places)))]

    news = shown("evaluate-ties")
    names = [f"evaluate {name}" for name in ("base", *TASKS, *METHODS)]
    with watched_by(artifacts.Steps()):
        assert spread() == names
    assert contents(places.own / "evaluate") == contents(Path("artifacts/evaluate"))
    lines = [record.message for record in caplog.records]
    assert sum(line.startswith("ties on blue, test: ") for line in lines) == 1
    assert f"a worker died at {begun[0][1]}; another one is at it" in lines
    assert {device for device, _ in begun} == {"cpu", "cpu:0"}
    assert sorted(name for _, name in begun) == sorted([*names, begun[0][1]])
    assert shown("evaluate-ties").count(100) == news.count(100) + 1
    with get_client(sync_client=True) as client:
        by_name = FlowFilter(name=FlowFilterName(any_=["spread"]))
        runs = client.read_task_runs(flow_filter=by_name)
    assert sorted(run.name for run in runs) == sorted(names)
    assert {run.state_name for run in runs} == {"Completed"}
    assert spread() == []
    assert len(begun) == len(names) + 1


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_nothing_is_done_twice_and_dvc_agrees(done: Path) -> None:
    lock = (done / "dvc.lock").read_bytes()
    state = pipeline(return_state=True)
    assert state.name == "UpToDate"
    assert "tiny version 1 (challenger)" in state.message
    assert pipeline()["made"] == []
    assert pipeline(force=True)["made"] == []
    assert (done / "dvc.lock").read_bytes() == lock
    assert "up to date" in dvc("status")
    assert "Data and pipelines are up to date" in dvc("repro")


def test_one_number_changes_one_merge(done: Path) -> None:
    params = done / "params.yaml"
    params.write_text(params.read_text().replace("keep: 0.5", "keep: 0.25"))
    assert pipeline()["made"] == ["merge ties", "evaluate ties", "register", "report"]
    assert shown("moved", "| merge.methods.ties.keep | 0.5 | 0.25 |")
    assert "up to date" in dvc("status")


def test_overrides_leave_params_and_lock_alone(done: Path) -> None:
    before = {name: (done / name).read_bytes() for name in ("dvc.lock", "params.yaml")}
    overrides = ["merge.methods.ties.keep=0.25"]
    outcome = pipeline(overrides=overrides)
    assert outcome["made"] == ["merge ties", "evaluate ties", "register", "report"]
    assert {name: (done / name).read_bytes() for name in before} == before
    assert "up to date" in dvc("status")
    assert Lineage.find(Path(outcome["merges"]["ties"])).params["settings"]["keep"] == 0.25
    assert pipeline(overrides=overrides)["made"] == []


def test_experts_are_scored_on_all_tasks_where_that_is_asked(done: Path) -> None:
    outcome = pipeline(overrides=["evaluate.experts=all"])
    board = Leaderboard.read(Path(outcome["register"]) / "leaderboard.json")
    assert all(set(row.scores) == {"red", "blue"} for row in board.of("expert"))
    assert all(row.mean.keys() == {"test"} for row in board.of("expert"))


def test_another_file_without_tasks_merges_and_chooses_nothing(done: Path) -> None:
    before = {name: (done / name).read_bytes() for name in ("dvc.lock", "params.yaml")}
    text = (done / "params.yaml").read_text().replace("[red, blue]", "[]")
    (done / "other.yaml").write_text(text.replace("keep: 0.5", "keep: 0.25"))
    outcome = pipeline("other.yaml")
    assert outcome["made"] == ["merge ties"]
    assert outcome["register"] is None
    assert {name: (done / name).read_bytes() for name in before} == before
    with console.capture() as shown:
        show_outcome(outcome)
    for label, folder in outcome["merges"].items():
        assert f"{label}: {folder}" in shown.get()
    assert "up to date" in dvc("status")


def test_a_tampered_output_is_made_again(done: Path) -> None:
    weights = done / "artifacts/merge/ties/model.safetensors"
    good = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert pipeline(force=True)["made"] == ["merge ties"]
    assert weights.read_bytes() == good


def test_the_command_line_gives_the_same_bytes(done: Path) -> None:
    merged = done / "artifacts/merge/cauchy_poe"
    command = [
        *(sys.executable, "-m", "flows.cli", "merge", "--base", "artifacts/fetch/base"),
        *("--expert", "artifacts/fetch/experts/red", "--expert", "artifacts/fetch/experts/blue"),
        *("--method", "cauchy_poe", "--device", "cpu", "--out", "by-hand"),
        *("--set", "side=output", "--set", "ridge=1e-2", "--set", "epsilon=0.1"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as tests/conftest.py sets torch
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert hash_files(done / "by-hand") == hash_files(merged)
    assert (done / "by-hand/lineage.json").read_bytes() == (merged / "lineage.json").read_bytes()


def test_a_refusal_leaves_no_output(done: Path) -> None:
    expert = done / "data/experts/blue/adapter_model.safetensors"
    expert.write_bytes(expert.read_bytes()[:-40])
    with pytest.raises(PoemergeError) as caught:
        pipeline()
    assert "adapter_model.safetensors" in str(caught.value)
    assert not list(done.glob("artifacts/**/*.partial"))


def test_lineage_of_what_is_registered(done: Path) -> None:
    entry = json.loads((done / "artifacts/register/registration.json").read_text())
    command = [sys.executable, "-m", "flows.cli", "lineage", "models:/tiny@challenger", "--json"]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    told = json.loads(ran.stdout)
    assert told["key"] == Lineage.find(done / "artifacts/merge" / entry["candidate"]).key
    assert told["versions"][0]["aliases"] == ["challenger"]
    command[-2] = "models:/tiny/99"
    refused = subprocess.run(command, check=False, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
