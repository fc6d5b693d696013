import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.store.db import utils
from mlflow.store.model_registry.dbmodels.models import SqlRegisteredModelAlias
from sqlalchemy import event

from poemerge.errors import SourceError
from tasks import versions
from tasks.tracking import connected

ROOT = Path(__file__).parents[2]
INSERT = """
INSERT INTO registered_model_aliases (workspace, name, alias, version)
VALUES ('default', 'tiny', 'live', 1)
"""

FIRST_USE = """
import sys
import mlflow
from tasks.tracking import connected, ending, experiment_id

print("ready", flush=True)
sys.stdin.readline()
with connected() as client:
    place = experiment_id(client, "shared")
    with ending(client, client.create_run(place).info.run_id) as run:
        print(run)
"""


def test_three_processes_start_on_a_new_database(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_USE],
            cwd=tmp_path, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(3)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all at once
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], told
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    place = client.get_experiment_by_name("shared").experiment_id
    runs = client.search_runs([place])
    assert {run.info.run_id for run in runs} == {out.strip() for out, _ in told}
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_password_in_the_uri_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret-word@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SourceError, match=r"MLflow at http://127\.0\.0\.1:9 refused") as caught:
        connected().__enter__()
    assert "secret-word" not in str(caught.value)


def test_a_database_that_cannot_be_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/nowhere/mlflow.db")
    with pytest.raises(SourceError, match=r"mlflow\.db\.lock cannot be written"):
        connected().__enter__()


def test_an_alias_that_another_sets_at_the_same_moment_is_set(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = shutil.copy(database, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")

    def somebody_else(*_: object) -> None:
        with sqlite3.connect(file) as other:
            other.execute(INSERT)

    with connected() as client:
        client.create_registered_model("tiny")
        for _ in range(2):
            client.create_model_version("tiny", str(tmp_path), await_creation_for=0)
        event.listen(SqlRegisteredModelAlias, "before_insert", somebody_else, once=True)
        versions.point(client, "tiny", "live", 2)
        assert versions.aliases_of(client, "tiny") == {"live": "2"}


def test_a_database_that_was_half_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow itself would go on with the half, and could not (duplicate columns)."""
    monkeypatch.chdir(tmp_path)
    real = utils._upgrade_db

    def stop(engine: object) -> None:
        real(engine)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(utils, "_upgrade_db", stop)
        with pytest.raises(KeyboardInterrupt), connected():
            pass
    assert not (tmp_path / "mlflow.db").exists()
    (tmp_path / "mlflow.db.half.partial").mkdir()
    with connected() as client:
        assert client.search_experiments()[0].name == "Default"
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlflow.db.lock"}
