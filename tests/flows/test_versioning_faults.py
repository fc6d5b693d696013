"""Commits to a DVC that is busy, was killed, cannot write, or is not there."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from flows import versioning
from poemerge.errors import SettingError, SourceError
from tests.flows.graph import PARAMS, flow, in_lock, make

HOLDER = {"pid": os.getppid(), "cmd": "dvc repro"}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make(tmp_path / "by_flow")


def test_it_waits_while_dvc_is_busy(project: Path) -> None:
    flow(PARAMS)
    Path("dvc.lock").unlink()
    lock_file = Path(".dvc/tmp/rwlock")
    busy = {"read": {}, "write": {os.fspath(project / "artifacts/fetch"): HOLDER}}
    lock_file.write_text(json.dumps(busy))
    release = threading.Timer(1.0, lock_file.unlink)
    release.start()
    began = time.monotonic()
    versioning.commit(["fetch"], PARAMS)
    release.join()
    assert time.monotonic() - began >= 1
    assert in_lock() == ["fetch"]


def test_it_goes_on_where_dvc_was_killed_while_it_wrote_its_lock(project: Path) -> None:
    """DVC writes that file in place, and refuses everything while it is cut off."""
    flow(PARAMS)
    Path("dvc.lock").unlink()
    Path(".dvc/tmp/rwlock").write_text('{"write": {')
    versioning.commit(["fetch"], PARAMS)
    assert in_lock() == ["fetch"]


def test_it_goes_on_where_a_commit_was_killed_while_dvc_wrote(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC writes dvc.lock in place too; what it was before is kept as long as that takes."""
    flow(PARAMS)
    whole = Path("dvc.lock").read_bytes()
    for before in (whole, b""):
        if not before:
            Path("dvc.lock").unlink()

        def killed(*_: object) -> None:
            Path("dvc.lock").write_bytes(whole[:40])
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(versioning, "_commit", killed)
            with pytest.raises(KeyboardInterrupt):
                versioning.commit(["fetch"], PARAMS)
        versioning.commit(["fetch"], PARAMS)
        assert in_lock()[0] == "fetch"
        assert not list(Path(".dvc/tmp").glob("dvc.lock*"))
        if before:
            assert Path("dvc.lock").read_bytes() == whole


def test_it_does_not_wait_for_ever(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versioning, "PATIENCE", 0.0)
    flow(PARAMS)
    busy = {"read": {}, "write": {os.fspath(project / "artifacts/fetch"): HOLDER}}
    Path(".dvc/tmp/rwlock").write_text(json.dumps(busy))
    with pytest.raises(SourceError, match="DVC is still locked"):
        versioning.commit(["fetch"], PARAMS)


def test_a_cache_that_cannot_be_written_is_refused(project: Path) -> None:
    shutil.rmtree(".dvc/cache", ignore_errors=True)
    Path(".dvc/cache").write_text("no folder")
    with pytest.raises(SourceError, match=r"could not commit|did not get into"):
        flow(PARAMS)
    assert not Path("dvc.lock").exists()


def test_what_is_missing_is_named(project: Path) -> None:
    with pytest.raises(SourceError, match=r"could not commit dvc\.yaml:fetch"):
        versioning.commit(["fetch"], PARAMS)
    with pytest.raises(SettingError, match=r"dvc\.yaml has no usable stage merge@nothing"):
        versioning.commit(["merge@nothing"], PARAMS)
    assert not list(Path(".dvc/tmp").glob("dvc.lock*"))  # a refusal is no kill: nothing to undo
    Path("dvc.yaml").unlink()
    with pytest.raises(SettingError, match=r"has no dvc\.yaml"):
        versioning.check()


def test_a_folder_without_dvc_is_refused(project: Path) -> None:
    versioning.check()
    shutil.rmtree(".dvc")
    with pytest.raises(SettingError, match="no DVC repository; run `dvc init`"):
        versioning.check()
