"""A registration that fails, is killed or is refused, and the next one."""

import shutil

import pytest

from poemerge.errors import SettingError, SourceError
from tests.tasks.stages import Project, client, runs, version


def test_a_dead_server_is_one_sentence(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SourceError, match=r":9 does not answer \(connection refused\)"):
        project.register()
    assert not (project.artifacts / "register").exists()


def test_a_failure_leaves_no_output_and_a_failed_run(project: Project) -> None:
    (project.artifacts / "merge/average/lineage.json").write_text("broken")
    with pytest.raises(SourceError, match="unreadable"):
        project.register()
    assert not (project.artifacts / "register").exists()
    assert {run.info.status for run in runs() if run.info.run_name == "tiny-merged"} == {"FAILED"}


def test_what_broke_off_is_gone_on_with(project: Project) -> None:
    record = project.artifacts / "merge/average/lineage.json"
    whole = record.read_text()
    record.write_text("broken")  # found when the runs of three candidates are complete
    with pytest.raises(SourceError, match="unreadable"):
        project.register()
    before = {run.info.run_id for run in runs()}
    record.write_text(whole)
    assert project.register()
    after = {run.info.run_id: run for run in runs()}
    assert before < after.keys()
    names = sorted(run.info.run_name for run in after.values())
    assert names == ["average", "base", "cauchy", "even", "odd", "tiny-merged"]
    assert {run.info.status for run in after.values()} == {"FINISHED"}


def test_runs_of_a_killed_registration_are_ended_by_the_next(project: Project) -> None:
    """`kill -9` ends no run; of another model's registration nothing is known, and it stays."""
    project.register(name="another")
    project.register()
    first, *_ = [run for run in runs() if run.info.run_name == "another"]
    second, *below = [r for r in runs() if r.info.start_time > first.info.end_time]
    left = [run.info.run_id for run in (first, second, below[0])]
    for run in left:
        client().update_run(run, status="RUNNING")
    shutil.rmtree(project.artifacts / "register")
    project.register(overrides=["merge.seed=1"])  # so that it is no second try of the same
    ended = {run.info.run_id: run.info.status for run in runs()}
    assert [ended[run] for run in left] == ["RUNNING", "KILLED", "KILLED"]
    assert len(client().search_model_versions("name = 'tiny-merged'")) == 1


def test_a_version_that_was_not_registered_to_the_end_is_completed(project: Project) -> None:
    """The output is current, MLflow's database another one, and the process was killed in it."""
    project.register()
    made = version("challenger")
    client().delete_registered_model_alias("tiny-merged", "challenger")
    client().delete_model_version_tag("tiny-merged", made.version, "poemerge.evaluation")
    assert project.register()
    assert version("challenger").version == made.version
    assert "poemerge.evaluation" in version("challenger").tags
    assert not project.register()


def test_changed_weights_are_refused(project: Project) -> None:
    (project.artifacts / "merge/cauchy/model.safetensors").write_text("tampered")
    with pytest.raises(SourceError, match="not what the merge stage left there; run merge again"):
        project.register()


def test_an_evaluation_of_other_weights_is_refused(project: Project) -> None:
    project.merge("cauchy", "newer weights", ridge=0.7)
    with pytest.raises(SourceError, match=r"made from other bytes .* run evaluate again"):
        project.register()


def test_dvc_is_needed_to_point_to_it(project: Project) -> None:
    shutil.rmtree(".dvc")
    with pytest.raises(SettingError, match="run `dvc init`"):
        project.register()
