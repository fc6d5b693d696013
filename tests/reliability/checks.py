"""What must hold after two who clashed, and after a server that was away."""

import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.provenance import verify
from poemerge.hashing import hash_files
from tasks import promote
from tests.reliability.contest import Ended

NAME = "tiny"
ONCE = {NAME, "base", "red", "blue", "average", "ties"}  # runs of one registration


def said(ended: Sequence[Ended]) -> str:
    """All that they said, for people and for searching."""
    return "\n".join(f"{end.code}:\n{end.said}" for end in ended)


def check_end(ended: Sequence[Ended], *codes: int) -> None:
    """They ended so, whoever was first, and none with a traceback."""
    assert sorted(end.code for end in ended) == sorted(codes), said(ended)
    assert "Traceback" not in said(ended), said(ended)


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


def check_database(file: Path) -> MlflowClient:
    """MLflow's database is whole; a client of it."""
    connection = sqlite3.connect(file)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    return MlflowClient(f"sqlite:///{file}")


def check_records(client: MlflowClient, *, versions: int = 1, tries: int = 1) -> None:
    """No bytes have two versions, no version is half described, no run is without an end.

    Args:
        client: of MLflow.
        versions: that there should be.
        tries: how often the same may have been recorded.
    """
    found = client.search_model_versions(f"name = '{NAME}'")
    digests = Counter(version.tags["poemerge.digest"] for version in found)
    assert list(digests.values()) == [1] * versions
    assert all({"poemerge.key", "poemerge.evaluation"} <= version.tags.keys() for version in found)
    place = client.get_experiment_by_name("tests").experiment_id
    runs = client.search_runs([place])
    assert {run.info.status for run in runs} == {"FINISHED"}
    names = Counter(run.info.run_name for run in runs)
    assert names.keys() == ONCE
    assert versions <= min(names.values()) <= max(names.values()) <= versions * tries


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
