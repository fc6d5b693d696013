"""A registration: versions, runs and artifacts in MLflow, and what a fresh process gets of them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from poemerge.hashing import digest
from poemerge.lineage import Source
from tasks.register.leaderboard import Leaderboard
from tests.servers import mlflow_server
from tests.tasks.stages import TASKS, Project, client, runs, version

ROOT = Path(__file__).parents[2]


def test_the_best_becomes_a_version_with_everything_about_it(project: Project) -> None:
    assert project.register()
    best = version("challenger")
    assert client().get_registered_model("tiny-merged").aliases == {"challenger": best.version}
    source = Source.of("cauchy", project.artifacts / "merge/cauchy")
    assert best.tags == {
        "poemerge.digest": source.digest,
        "poemerge.loader": digest({}),  # no architecture that MLflow could load
        "poemerge.candidate": "cauchy",
        "poemerge.evaluation": best.run_id,
        "poemerge.method": "cauchy_poe",
        "poemerge.base": "hf://org/tiny@1",
        "poemerge.overrides": "merge.strength=1.0",
    }
    assert "`poemerge audit`" in client().get_registered_model("tiny-merged").description
    assert best.description == (
        "Merge `cauchy` (method cauchy_poe) of experts of hf://org/tiny@1. Test: odd 60.0%, "
        "even 60.0%; mean 60.0%. On average 75.0% of what each task's own expert scores."
    )
    assert best.source.startswith("dvc://artifacts/merge/cauchy/")
    assert client().get_run(best.run_id).info.run_name == "cauchy"


def test_every_candidate_is_a_run_below_one_parent(project: Project) -> None:
    project.register()
    parent, *children = runs()
    assert [run.info.run_name for run in children] == ["base", "odd", "even", "cauchy", "average"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
    said = parent.data.tags["mlflow.note.content"]
    assert said.startswith("Best on validation: **cauchy**.")
    assert "| cauchy | 60.0 | 60.0 | 60.0 | 75.0 | 60.0 |" in said
    best = children[3]
    assert best.data.params == {
        "method": "cauchy_poe",
        "settings.ridge": "0.5",
        "settings.weights": "[1, 2]",
    }
    assert best.data.metrics == pytest.approx(
        {
            **{f"{split}/{name}": 0.6 for split in ("test", "validation")
               for name in (*TASKS, "mean")},
            "test/normalised": 0.75, "validation/normalised": 0.75,
            "seconds": 2.5, "peak_bytes": 1024,
        }
    )  # fmt: skip
    assert best.data.tags["poemerge.stage"] == "merge"
    assert best.data.tags["poemerge.digest"] == version("challenger").tags["poemerge.digest"]
    logged = {f.path for f in client().list_artifacts(parent.info.run_id)}
    assert logged == {"leaderboard.json", "leaderboard.png", "params.yaml"}
    kept = {f.path for f in client().list_artifacts(best.info.run_id)}
    assert kept == {"evaluation", "lineage.json", "merge_report.json"}
    assert Path("mlruns").is_dir()


def test_the_output_holds_nothing_that_changes_by_itself(project: Project) -> None:
    project.register()
    out = project.artifacts / "register"
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.rmtree(out)
    project.artifacts.joinpath("log/merge-cauchy.json").unlink()
    assert project.register()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert set(first) == {"leaderboard.json", "registration.json", "lineage.json"}
    board = Leaderboard.read(out / "leaderboard.json")
    made = json.loads(first["registration.json"])
    assert made["candidate"] == board.best.label == "cauchy"
    assert made["source"] == version("challenger").source


def test_nothing_to_do_touches_nothing(project: Project) -> None:
    assert project.register()
    before = len(runs())
    assert not project.register()
    assert len(runs()) == before


def test_the_same_bytes_keep_their_version(project: Project) -> None:
    project.register()
    project.evaluate_merge("average", 0.3)
    assert project.register()
    assert len(client().search_model_versions("name = 'tiny-merged'")) == 1
    assert len([run for run in runs() if run.info.run_name == "tiny-merged"]) == 2


def test_the_outcomes_of_every_candidate_are_kept(project: Project, tmp_path: Path) -> None:
    project.register()
    places = ["base", "experts/odd", "experts/even", "merges/cauchy", "merges/average"]
    for run, place in zip(runs()[1:], places, strict=True):
        copy = client().download_artifacts(run.info.run_id, "evaluation", str(tmp_path))
        kept, ours = Path(copy), project.artifacts / "evaluate" / place
        assert {f.name: f.read_bytes() for f in kept.iterdir()} == {
            f.name: f.read_bytes() for f in ours.iterdir()
        }
        shutil.rmtree(kept)


def test_the_outcomes_are_those_of_the_last_evaluation(project: Project) -> None:
    project.register()
    first = version("challenger")
    project.evaluate_merge("average", 0.3)
    project.register()
    again = version("challenger")
    assert again.version == first.version
    (newest,) = [run for run in runs()[5:] if run.info.run_name == "cauchy"]
    assert again.tags["poemerge.evaluation"] == newest.info.run_id != first.run_id


def test_a_new_best_is_challenger_and_the_champion_stays(project: Project) -> None:
    project.register()
    client().set_registered_model_alias("tiny-merged", "champion", "1")
    project.evaluate_merge("average", 0.9)
    assert project.register()
    assert str(version("champion").version) == "1"
    assert version("challenger").tags["poemerge.method"] == "average_poe"


def test_another_database_is_filled_although_the_output_is_current(
    project: Project, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.register()
    shutil.copy(database, "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path('other.db').resolve()}")
    assert project.register()
    assert version("challenger").tags["poemerge.method"] == "cauchy_poe"
    assert not project.register()


def test_copy_puts_the_bytes_into_mlflow(project: Project) -> None:
    shutil.rmtree(".dvc")
    assert project.register(store="copy")
    assert Path(version("challenger").source, "model.safetensors").read_text() == "robust weights"
    made = json.loads((project.artifacts / "register/registration.json").read_text())
    assert made["source"] == ""


def downloaded(*uris: str, cwd: Path | None = None, **env: str) -> list[str]:
    """The weights below each URI, downloaded by a fresh process that imports MLflow alone."""
    code = """
import sys
from pathlib import Path
from mlflow.artifacts import download_artifacts
for uri in sys.argv[1:]:
    path = Path(download_artifacts(uri))
    print((path / "model.safetensors" if path.is_dir() else path).read_text())
"""
    command = [sys.executable, "-c", code, *uris]
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_fresh_process_downloads_it(project: Project) -> None:
    project.register()
    shutil.rmtree(project.artifacts / "merge")
    folder = "models:/tiny-merged@challenger"
    assert downloaded(folder, f"{folder}/model.safetensors") == ["robust weights"] * 2


def test_a_fresh_process_elsewhere_needs_the_variable(project: Project, tmp_path: Path) -> None:
    project.register()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    env = {"MLFLOW_TRACKING_URI": uri, "POEMERGE_DVC_ROOT": os.fspath(tmp_path)}
    assert downloaded("models:/tiny-merged/1", cwd=elsewhere, **env) == ["robust weights"]


@pytest.fixture
def server(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`mlflow server` on a free loopback port."""
    with mlflow_server(Path.cwd()) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri


def test_the_same_over_a_server(project: Project, server: str) -> None:
    assert project.register()
    assert not project.register()
    assert version("challenger").version == "1"
    assert version("challenger").source.startswith("dvc://artifacts/merge/cauchy/")
    project.evaluate_merge("average", 0.9)
    assert project.register(store="copy")
    assert version("challenger").source.startswith("mlflow-artifacts:/")
    first, challenger = "models:/tiny-merged/1", "models:/tiny-merged@challenger"
    assert downloaded(first, f"{first}/model.safetensors", challenger) == [
        *("robust weights", "robust weights", "mean weights")
    ]


def test_importing_the_stage_imports_neither_mlflow_nor_dvc() -> None:
    code = "import sys, tasks.register; print({'mlflow', 'dvc', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
