import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo

from flows import versioning
from poemerge.errors import SettingError, SourceError

# The shape of the project's own graph.
GRAPH = """
stages:
  fetch:
    cmd: python code/stage.py fetch
    deps: [code]
    params: [fetch]
    outs: [artifacts/fetch: {persist: true}]
  task_vectors:
    cmd: python code/stage.py task_vectors
    deps: [code, artifacts/fetch]
    params: [task_vectors]
    outs: [artifacts/task_vectors: {persist: true}]
  merge:
    foreach: ${merge.methods}
    do:
      cmd: python code/stage.py merge ${key}
      deps: [code, artifacts/fetch]
      params: ["merge.strength", "merge.methods.${key}"]
      outs: ["artifacts/merge/${key}": {persist: true}]
  evaluate:
    cmd: python code/stage.py evaluate
    deps: [code, artifacts/fetch, artifacts/merge]
    params: [evaluate, merge.methods]
    outs: [artifacts/evaluate: {persist: true}]
  register:
    cmd: python code/stage.py register
    deps: [code, artifacts/fetch/base, artifacts/merge, artifacts/evaluate]
    params: [register, merge.methods]
    outs: [artifacts/register: {persist: true}]
"""
CONFIG = """
[core]
    analytics = false
    autostage = false
[cache]
    type = "hardlink,copy"
"""
HOLDER = {"pid": os.getppid(), "cmd": "dvc repro"}
PARAMS: dict[str, Any] = {
    "fetch": {"base": "tiny"},
    "task_vectors": {},
    "merge": {"strength": 1.0, "methods": {"ties": {"density": 0.2}, "average": {}}},
    "evaluate": {"limit": 4},
    "register": {"choose": "mean"},
}
STAGE = """
import json, sys, yaml
from pathlib import Path
from poemerge.lineage import Lineage, Source, produce

INPUTS = {"task_vectors": "fetch", "merge": "fetch", "evaluate": "merge", "register": "evaluate"}

def stage(params, name, label=""):
    "What came in and the settings, written down."
    settings = params[name]["methods"][label] if label else params[name]
    inputs = [Source.of(name, Path("artifacts", INPUTS[name]))] if name in INPUTS else []
    text = json.dumps([settings, [dict(source.files) for source in inputs]])
    record = Lineage(name, {"settings": settings, "label": label}, tuple(inputs))
    inner = "base/out.json" if name == "fetch" else "out.json"

    def work(folder):
        (folder / inner).parent.mkdir(exist_ok=True)
        (folder / inner).write_text(text)

    return produce(Path("artifacts", name, label), record, work)

if __name__ == "__main__":
    made = stage(yaml.safe_load(Path("params.yaml").read_text()), *sys.argv[1:])
    print("made" if made else "current", *sys.argv[1:])
"""


def names(params: dict[str, Any]) -> list[str]:
    merges = [f"merge@{label}" for label in params["merge"]["methods"]]
    return ["fetch", "task_vectors", *merges, "evaluate", "register"]


def flow(params: dict[str, Any]) -> list[str]:
    """Run every stage function, committing each as it is done; the stages that did work."""
    stage = runpy.run_path("code/stage.py")["stage"]
    busy = []
    for name in names(params):
        if stage(params, *name.split("@")):
            busy.append(name)
        versioning.commit([name], params)
    return busy


def write(params: dict[str, Any]) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def changed(density: float) -> dict[str, Any]:
    merge = PARAMS["merge"] | {"methods": {"ties": {"density": density}, "average": {}}}
    return PARAMS | {"merge": merge}


def dvc(*arguments: str) -> str:
    """The command line, as a user has it."""
    path = os.pathsep.join([os.fspath(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        env=os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make(root: Path) -> Path:
    """A git and DVC repository set up as the project's own."""
    (root / "code").mkdir(parents=True)
    os.chdir(root)
    subprocess.run(["git", "init", "-q"], check=True)
    Repo.init().close()
    Path(".dvc/config").write_text(CONFIG)
    Path(".dvcignore").write_text("__pycache__\n*.partial\n")
    Path(".gitignore").write_text("/artifacts/\n__pycache__/\n")
    Path("dvc.yaml").write_text(GRAPH)
    Path("code/stage.py").write_text(STAGE)
    write(PARAMS)
    return root


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make(tmp_path / "by_flow")


def lock() -> bytes:
    return Path("dvc.lock").read_bytes()


def in_lock() -> list[str]:
    return list(yaml.safe_load(lock())["stages"])


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


def test_committing_again_is_cheap_and_changes_nothing(project: Path) -> None:
    flow(PARAMS)
    before = Path("dvc.lock").stat().st_mtime_ns, lock()
    began = time.monotonic()
    versioning.commit(names(PARAMS), PARAMS)
    assert time.monotonic() - began < 3
    assert lock() == before[1]


def test_params_edited_during_the_run_are_not_blessed(project: Path) -> None:
    flow(PARAMS)
    before = lock()
    write(changed(0.9))
    versioning.commit(["merge@average"], PARAMS)
    with pytest.raises(SettingError, match=r"merge\.methods\.ties .* not what merge@ties was made"):
        versioning.commit(["merge@ties"], PARAMS)
    assert lock() == before


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


def test_it_is_silent(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flow(PARAMS)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
