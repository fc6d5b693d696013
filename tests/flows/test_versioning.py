"""What the flow commits to DVC is what `dvc repro` would have written."""

from pathlib import Path

import dvc_data.hashfile.hash
import pytest

from flows import versioning
from poemerge.errors import SettingError
from tests.flows.dvc_command import dvc
from tests.flows.graph import PARAMS, STAGE, changed, flow, in_lock, lock, make, names, write


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make(tmp_path / "by_flow")


def test_flow_and_repro_write_the_same_lock(project: Path) -> None:
    """The first run, and the one after a number of one method changed; either way round."""
    assert flow(PARAMS) == names(PARAMS) == in_lock()
    first = lock()
    assert "up to date" in dvc("status")
    assert "Running stage" not in dvc("repro")
    write(changed(0.5))
    assert flow(changed(0.5)) == ["merge@ties", "evaluate", "register"]
    second = lock()
    assert "up to date" in dvc("status")
    assert not list(Path("artifacts").rglob(".gitignore"))

    make(project.parent / "by_repro")
    dvc("repro")
    assert lock() == first
    assert flow(PARAMS) == []
    assert lock() == first
    write(changed(0.5))
    told = dvc("repro")
    ran = [name for name in names(PARAMS) if f"Running stage '{name}'" in told]
    assert ran == ["merge@ties", "evaluate", "register"]
    assert lock() == second


def test_touched_code_keeps_what_is_current(project: Path) -> None:
    """DVC runs the stages again, deletes nothing before, and they find that nothing is to do."""
    flow(PARAMS)
    Path("code/__pycache__").mkdir()
    Path("code/__pycache__/stage.pyc").write_text("changes at every run")
    assert "up to date" in dvc("status")
    Path("code/stage.py").write_text(f"{STAGE}# a remark\n")
    told = dvc("repro").splitlines()
    assert [line for line in told if line.startswith(("made", "current"))] == [
        f"current {name.replace('@', ' ')}" for name in names(PARAMS)
    ]
    by_repro = lock()
    Path("dvc.lock").unlink()
    assert flow(PARAMS) == []
    assert lock() == by_repro


def test_a_stage_that_is_current_but_not_in_the_lock_is_committed(project: Path) -> None:
    flow(PARAMS)
    whole = lock()
    Path("dvc.lock").unlink()
    assert flow(PARAMS) == []
    assert lock() == whole


def test_only_the_named_stages_are_committed(project: Path) -> None:
    flow(PARAMS)
    Path("dvc.lock").unlink()
    versioning.commit(["fetch", "merge@average"], PARAMS)
    assert in_lock() == ["fetch", "merge@average"]


def test_committing_again_hashes_and_changes_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = dvc_data.hashfile.hash.file_md5

    def spy(path: str, *arguments: object, **named: object) -> str:
        if Path(path).exists():  # lists of folders are hashed in memory
            hashed.append(path)
        return real(path, *arguments, **named)

    monkeypatch.setattr(dvc_data.hashfile.hash, "file_md5", spy)
    flow(PARAMS)
    assert hashed
    hashed.clear()
    before = lock()
    versioning.commit(names(PARAMS), PARAMS)
    assert hashed == []
    assert lock() == before


def test_params_edited_during_the_run_are_not_blessed(project: Path) -> None:
    flow(PARAMS)
    before = lock()
    write(changed(0.9))
    versioning.commit(["merge@average"], PARAMS)
    with pytest.raises(SettingError, match=r"merge\.methods\.ties .* not what merge@ties was made"):
        versioning.commit(["merge@ties"], PARAMS)
    assert lock() == before


def test_it_is_silent(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flow(PARAMS)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
