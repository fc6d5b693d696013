"""Merge on change: what moved since the last complete run, and that nothing did."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import tasks
from flows import changes
from flows.changes import Change, look
from flows.cli import main
from flows.params import load
from flows.places import Places
from flows.steps import STAGES, steps
from poemerge.hashing import digest, sha256
from tasks.tracking import connected
from tasks.versions import KEY, SOURCES, numbered
from tests.flows.conftest import enter_copy, keep_two_candidates, make_project

MODEL = "adapter_model.safetensors"


def places(*overrides: str) -> Places:
    return Places(load(Path("params.yaml"), overrides), load(Path("params.yaml")))


def run(*overrides: str) -> None:
    """A complete run, without Prefect."""
    here = places(*overrides)
    for stage in STAGES:
        for step in steps(stage, here, overrides):
            step.run()
    changes.conclude(here)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, zoo) -> Iterator[Path]:  # noqa: ANN001
    folder = make_project(tmp_path_factory.mktemp("changes") / "project", zoo)
    keep_two_candidates(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert look(places()) == changes.Standing()
        run()
    return folder


@pytest.fixture
def done(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project after its first run, and the working directory in it."""
    return enter_copy(finished, tmp_path, monkeypatch)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def revision(folder: Path) -> str:
    """What a folder's source resolves to, computed anew."""
    return digest({path.name: sha256(path) for path in folder.iterdir() if path.suffix != ".md"})


def test_the_version_says_what_it_was_made_from(done: Path) -> None:
    with connected() as client:
        version = numbered(client, "tiny", 1)
    assert json.loads(version.tags[SOURCES]) == {
        "base": revision(done / "data/base"),
        "red": revision(done / "data/experts/red"),
        "blue": revision(done / "data/experts/blue"),
    }
    assert len(version.tags[KEY]) == 64


def test_nothing_moved(done: Path) -> None:
    """The registry decides: outputs that were deleted do not matter."""
    shutil.rmtree(done / "artifacts")
    before = sorted(done.rglob("*"))
    ran = CliRunner().invoke(main, ["run"], catch_exceptions=False)
    assert ran.exit_code == 0
    assert ran.stdout == (
        "up to date: nothing moved since tiny version 1 (challenger); --force runs all the same.\n"
    )
    assert "Prefect" not in ran.stderr
    assert sorted(done.rglob("*")) == before


def test_a_source_moved(done: Path) -> None:
    expert = done / "data/experts/red"
    was = revision(expert)
    weights = bytearray((expert / MODEL).read_bytes())
    weights[-1] ^= 1
    (expert / MODEL).write_bytes(weights)
    standing = look(places())
    assert not standing.is_current
    assert standing.moved == (Change("red", was[:12], revision(expert)[:12]),)
    assert f"red: {was[:12]} → {revision(expert)[:12]}" in str(standing)


def test_parameters_moved(done: Path) -> None:
    params = done / "params.yaml"
    edit(params, "keep: 0.5", "keep: 0.25")
    assert look(places()).moved == (Change("merge.methods.ties.keep", "0.5", "0.25"),)
    edit(params, "    ties: {keep: 0.25}\n", "")
    assert look(places()).moved == (
        Change("merge.methods.ties.keep", "0.5", ""),
        Change("merge.methods", "average, ties", "average"),
    )


def test_a_candidate_without_settings_is_missed_too(done: Path) -> None:
    edit(done / "params.yaml", "    average: {}\n", "")
    assert look(places()).moved == (Change("merge.methods", "average, ties", "ties"),)


def test_sections_around_the_stages_move_nothing(done: Path) -> None:
    with (done / "params.yaml").open("a") as file:
        file.write("schedule: {cron: '0 3 * * *', timezone: UTC, timeout: 60}\n")
    assert look(places()).is_current


def test_evaluation_data_moved(done: Path) -> None:
    edit(done / "data/tasks/red/test.jsonl", "red test 3", "red test three")
    (change,) = look(places()).moved
    assert change.what == "items of red"
    assert change.was != change.now


def test_code_moved(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project has a copy of the stages; while it is an equal one, nothing moved."""
    monkeypatch.setattr(tasks, "__file__", str(done / "tasks/__init__.py"))
    assert look(places()).is_current
    edit(done / "tasks/report/page.css", "{", "{ ")
    assert [change.what for change in look(places()).moved] == ["code of the stages"]


def test_a_file_of_curvature_is_an_input(done: Path) -> None:
    Path("fisher.safetensors").write_bytes(b"first")
    override = (
        "merge.methods.gaussian_poe={precision: diagonal, curvature: {red: fisher.safetensors}}"
    )
    for content in (b"first", b"second"):
        Path("fisher.safetensors").write_bytes(content)
        (found,) = (c for c in look(places(override)).moved if c.what == "curvature of red")
        assert found.was == ""
        assert found.now == sha256(Path("fisher.safetensors"))[:12]


def test_the_bytes_are_gone(done: Path) -> None:
    cache = done / ".dvc/cache"
    cache.rename(done / "remote")
    standing = look(places())
    assert not standing.is_current
    assert [change.what for change in standing.moved] == ["the bytes of that version"]
    config = done / ".dvc/config"
    config.write_text("[core]\n    remote = r\n['remote \"r\"']\n    url = ../remote\n")
    assert look(places()).is_current


def test_bytes_that_were_copied_into_mlflow(done: Path) -> None:
    override = "register={name: copied, experiment: copied, choose: mean, store: copy}"
    run(override)
    assert look(places(override)).is_current
    assert look(places()).is_current
    (weights,) = (done / "mlruns").rglob("model.safetensors")
    shutil.rmtree(weights.parent)
    assert [c.what for c in look(places(override)).moved] == ["the bytes of that version"]


def test_another_run_in_between(done: Path) -> None:
    """What counts is what was run last, whichever version is the newer one."""
    override = "merge.strength=0.5"
    run(override)
    standing = look(places(override))
    assert standing.is_current
    assert standing.last.number == "2"
    assert not look(places()).is_current
    run()
    standing = look(places())
    assert standing.is_current
    assert standing.last.number == "1"


def test_a_run_that_did_not_end_is_not_the_last(done: Path) -> None:
    edit(done / "params.yaml", "limit: 6", "limit: 5")
    for stage in STAGES[:-1]:
        for step in steps(stage, places()):
            step.run()
    assert [change.what for change in look(places()).moved] == ["evaluate.limit"]


def test_without_tasks_there_is_always_something_to_do(done: Path) -> None:
    override = "evaluate.tasks=[]"
    run(override)
    assert look(places(override)) == changes.Standing()


def test_a_source_that_does_not_answer(done: Path) -> None:
    """HF_HUB_OFFLINE is set in all tests; what was never fetched cannot be current."""
    standing = look(places("fetch.experts.red.source=hf://org/model"))
    assert not standing.is_current
    assert "HF_HUB_OFFLINE" in str(standing)
