import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Param
from mlflow.store.db import utils
from mlflow.store.model_registry.dbmodels.models import SqlRegisteredModel, SqlRegisteredModelAlias
from mlflow.store.tracking.dbmodels.models import SqlParam
from prefect.exceptions import TerminationSignal
from sqlalchemy import event
from sqlalchemy.orm import loading

from poemerge.errors import SourceError
from tasks import tracking, versions
from tasks.tracking import connected, ending, experiment_id, marked_run, upsert

ROOT = Path(__file__).parents[2]
INSERT = """
INSERT INTO registered_model_aliases (workspace, name, alias, version)
VALUES ('default', 'tiny', 'live', 1)
"""

MODEL = "INSERT INTO registered_models (workspace, name) VALUES ('default', 'tiny')"
KIND = """
INSERT INTO registered_model_tags (workspace, name, key, value)
VALUES ('default', 'tiny', 'poemerge.kind', 'expert')
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
    with pytest.raises(SourceError, match=r":9 does not answer \(connection refused\)") as caught:
        connected().__enter__()
    assert "secret-word" not in str(caught.value)


def test_a_server_that_never_answers_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(SourceError, match=f"MLflow at {uri} does not answer") as caught:
            connected().__enter__()
    assert "\n" not in str(caught.value)


def test_a_database_that_cannot_be_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/nowhere/mlflow.db")
    with pytest.raises(SourceError, match=r"mlflow\.db\.lock cannot be written"):
        connected().__enter__()


@pytest.fixture
def file(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database of this test alone."""
    file = Path(shutil.copy(database, tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    return file


def meanwhile(file: Path, table: type, *statements: str) -> None:
    """Let somebody else write just before the next row of a table is."""

    def somebody_else(*_: object) -> None:
        with sqlite3.connect(file) as other:
            for statement in statements:
                other.execute(statement)
        other.close()

    event.listen(table, "before_insert", somebody_else, once=True)


def test_an_alias_that_another_sets_at_the_same_moment_is_set(file: Path) -> None:
    with connected() as client:
        client.create_registered_model("tiny")
        for _ in range(2):
            client.create_model_version("tiny", str(file.parent), await_creation_for=0)
        meanwhile(file, SqlRegisteredModelAlias, INSERT)
        versions.point(client, "tiny", "live", 2)
        assert versions.aliases_of(client, "tiny") == {"live": "2"}


def test_a_name_that_another_takes_at_the_same_moment_is_shared_or_refused(file: Path) -> None:
    with connected() as client:
        meanwhile(file, SqlRegisteredModel, MODEL)
        versions.claim(client, "tiny", versions.MERGE)
        client.delete_registered_model("tiny")
        meanwhile(file, SqlRegisteredModel, MODEL, KIND)
        with pytest.raises(SourceError, match="tiny is the name of a registered expert"):
            versions.claim(client, "tiny", versions.MERGE)


def test_bytes_that_another_registers_at_the_same_moment_have_one_version(file: Path) -> None:
    with connected() as client:
        client.create_registered_model("tiny")
        tags = {versions.DIGEST: "these bytes"}
        other = client.create_model_version("tiny", "dvc://x", tags=tags, await_creation_for=0)
        made = versions.create(client, "tiny", "dvc://x", tags)
        assert made.version == other.version == versions.find(client, "tiny", "these bytes").version
        assert len(versions.every(client, "tiny")) == 1
        new = versions.create(client, "tiny", "dvc://y", {versions.DIGEST: "others"})
        assert int(new.version) == 3  # the number of what was deleted is not given again


def test_a_marked_run_is_found_again_and_made_once(file: Path) -> None:
    with connected() as client:
        place = experiment_id(client, "tests")
        first = marked_run(client, place, "name", ("mark", "one"), {"more": "tags"})
        again = marked_run(client, place, "another", ("mark", "one"), {})
        other = marked_run(client, place, "name", ("mark", "two"), {})
        assert first.info.run_id == again.info.run_id != other.info.run_id
        assert first.data.tags["more"] == "tags"
        assert len(client.search_runs([place])) == 2


def test_a_run_that_cannot_be_ended_does_not_hide_why_it_failed(file: Path) -> None:
    with connected() as client:
        run = client.create_run(experiment_id(client, "tests")).info.run_id
        client.delete_run(run)  # which MLflow then refuses to end
        with pytest.raises(KeyboardInterrupt), ending(client, run):
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [KeyboardInterrupt, TerminationSignal])
def test_a_run_that_is_interrupted_in_any_query_is_ended_at_once(
    stop: type[BaseException],
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is left of the query would lock the database, for itself too."""
    with connected() as client:
        place = experiment_id(client, "tests")
        for queries in count():
            run = client.create_run(place).info.run_id
            with monkeypatch.context() as patch, suppress(stop), ending(client, run):
                patch.setattr(loading, "_new_runid", interrupted_after(queries, stop))
                client.log_param(run, "key", "value")
                patch.undo()
            status = client.get_run(run).info.status
            assert status in {"KILLED", "FINISHED"}
            if status == "FINISHED":
                break
    assert queries > 1
    assert "locked" not in caplog.text


def interrupted_after(queries: int, stop: type[BaseException]) -> Callable[[], object]:
    """What SQLAlchemy numbers its queries by; one of them is interrupted."""
    numbers = count()

    def number() -> object:
        if next(numbers) == queries:
            raise stop(signal.SIGTERM)
        return object()

    return number


def test_params_that_another_logs_at_the_same_moment_are_logged(file: Path) -> None:
    with connected() as client:
        run = client.create_run(experiment_id(client, "tests")).info.run_id
        meanwhile(file, SqlParam, f"INSERT INTO params VALUES ('key', 'value', '{run}')")
        upsert(client.log_batch, run, params=[Param("key", "value")])
        assert client.get_run(run).data.params == {"key": "value"}


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
