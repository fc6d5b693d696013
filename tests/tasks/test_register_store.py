import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from poemerge.errors import SettingError, SourceError
from tasks.dvc_store.artifacts import DvcArtifactRepository
from tasks.dvc_store.reference import Reference, contents, put
from tasks.dvc_store.remote import check_remote, push
from tasks.progress import watched_by

FILES = {"config.json": "{}", "model.safetensors": "weights", "extra/100%.txt": "deep"}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git and DVC repository with one model folder that is an output of its dvc.yaml."""
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.chdir(root)
    subprocess.run(["git", "init", "-q"], check=True)
    Repo.init().close()
    Path(".gitignore").write_text("/artifacts/\n")
    Path("dvc.yaml").write_text("stages: {merge: {cmd: 'true', outs: [artifacts/merge/ties]}}\n")
    for name, text in FILES.items():
        path = Path("artifacts/merge/ties", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def cached(root: Path) -> set[Path]:
    return {path for path in (root / ".dvc/cache/files").rglob("*") if path.is_file()}


def test_uri_round_trip() -> None:
    reference = Reference("artifacts/merge/a b@c", "0" * 32 + ".dir")
    assert reference.uri == f"dvc://artifacts/merge/a%20b%40c/{reference.oid}"
    assert Reference.parse(reference.uri) == (reference, "")
    assert Reference.parse(f"{reference.uri}/extra/100%.txt") == (reference, "extra/100%.txt")


@pytest.mark.parametrize("uri", ["dvc://artifacts/merge/ties", "dvc://", "dvc://a/123.dir"])
def test_a_uri_without_content_is_refused(uri: str) -> None:
    with pytest.raises(SourceError, match="names no content"):
        Reference.parse(uri)


def test_put_has_the_hash_of_dvc_lock_and_is_what_commit_does(project: Path) -> None:
    reference = put(Path("artifacts/merge/ties"))
    assert not Path("dvc.lock").exists()
    before = {path: path.stat().st_mtime_ns for path in cached(project)}
    with Repo() as repo:
        repo.commit("merge", force=True)
    (out,) = yaml.safe_load(Path("dvc.lock").read_text())["stages"]["merge"]["outs"]
    assert (reference.path, reference.oid) == (out["path"], out["md5"])
    assert {path: path.stat().st_mtime_ns for path in cached(project)} == before
    assert put(project / "artifacts/merge/ties") == reference


def test_a_reference_keeps_its_meaning(project: Path) -> None:
    reference = put(Path("artifacts/merge/ties"))
    Path("artifacts/merge/ties/config.json").write_text("other")
    assert contents(reference)["config.json"].path.read_text() == "{}"
    assert put(Path("artifacts/merge/ties")) != reference


def test_put_outside_the_repository_is_refused(project: Path) -> None:
    (project.parent / "elsewhere").mkdir()
    with pytest.raises(SourceError, match="outside the DVC repository"):
        put(project.parent / "elsewhere")


def test_without_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match="no DVC repository; run `dvc init`"):
        put(tmp_path)


def test_a_cache_that_cannot_be_written_is_refused(project: Path) -> None:
    (project / ".dvc/cache").mkdir(exist_ok=True)
    (project / ".dvc/cache/files").write_text("no folder")
    with pytest.raises(SourceError, match=r"could not get into .* mend that folder"):
        put(Path("artifacts/merge/ties"))


def add_remote(project: Path) -> None:
    with Repo() as repo, repo.config.edit() as config:
        config["remote"]["store"] = {"url": str(project.parent / "remote")}
        config["core"]["remote"] = "store"


def test_missing_content_is_pulled_from_the_remote(project: Path) -> None:
    reference = put(Path("artifacts/merge/ties"))
    add_remote(project)
    with Repo() as repo:
        repo.commit("merge", force=True)
        repo.push()
    for path in cached(project):
        path.unlink()
    assert {name: blob.path.read_text() for name, blob in contents(reference).items()} == FILES


def test_a_pull_tells_how_many_bytes_have_come(project: Path) -> None:
    Path("artifacts/merge/ties/second.safetensors").write_bytes(bytes(3_000_000))
    Path("artifacts/merge/ties/model.safetensors").write_bytes(bytes(4_000_000))
    reference = put(Path("artifacts/merge/ties"))
    add_remote(project)
    push(reference)
    shutil.rmtree(project / ".dvc/cache")
    told: list[tuple[str, str, int, int]] = []
    with watched_by(lambda *news: told.append(news)):
        contents(reference)
    assert {(step, unit, total) for step, unit, _, total in told} == {
        ("dvc://artifacts/merge/ties", "MB", 7)
    }
    counts = [done for _, _, done, _ in told]
    assert counts == sorted(counts)
    assert counts[-1] == 7
    assert any(0 < count < 7 for count in counts)


def test_a_reference_has_what_lies_beside_and_is_pushed_whole(project: Path) -> None:
    beside = project.parent / "beside"
    (beside / "deep").mkdir(parents=True)
    more = {"MLmodel": "flavors", "deep/model.safetensors": "weights"}
    for name, text in more.items():
        (beside / name).write_text(text)
    reference = put(Path("artifacts/merge/ties"), beside)
    add_remote(project)
    check_remote()
    assert push(reference) == len({*FILES.values(), *more.values()}) + 1  # blobs, and the tree
    assert push(reference) == 0
    shutil.rmtree(project / ".dvc/cache")
    found = {name: blob.path.read_text() for name, blob in contents(reference).items()}
    assert found == FILES | more


def test_a_push_without_a_remote_is_one_sentence(project: Path) -> None:
    reference = put(Path("artifacts/merge/ties"))
    with pytest.raises(SettingError, match="no default DVC remote to push to; add one: `dvc rem"):
        push(reference)
    with Repo() as repo, repo.config.edit() as config:
        config["remote"]["store"] = {"url": "/proc/nobody/writes/here"}
        config["core"]["remote"] = "store"
    with pytest.raises(SourceError, match=r"could not be pushed .* mend the DVC remote"):
        push(reference)


def test_missing_content_without_a_remote_is_one_sentence(project: Path) -> None:
    reference = put(Path("artifacts/merge/ties"))
    contents(reference)["model.safetensors"].path.unlink()
    with pytest.raises(SourceError, match="is not in the DVC cache and could not be pulled"):
        contents(reference)


def test_content_that_the_remote_lacks_too(project: Path) -> None:
    add_remote(project)
    with pytest.raises(SourceError, match="neither in the DVC cache nor in its remote"):
        contents(Reference("artifacts/merge/ties", "0" * 32 + ".dir"))


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_mlflow_may_cut_the_uri_anywhere(project: Path, tmp_path: Path, cut: int) -> None:
    parts = put(Path("artifacts/merge/ties")).uri.split("/")
    root, path = "/".join(parts[: len(parts) - cut]), "/".join(parts[len(parts) - cut :])
    repository = DvcArtifactRepository(root)
    listed = {(info.path.removeprefix(f"{path}/"), info.is_dir, info.file_size)
              for info in repository.list_artifacts(path)}  # fmt: skip
    assert listed == {
        ("extra", True, None),
        ("config.json", False, 2),
        ("model.safetensors", False, 7),
    }
    target = tmp_path / "target"
    target.mkdir()
    got = Path(repository.download_artifacts(path, os.fspath(target)))
    assert {name: (got / name).read_text() for name in FILES} == FILES


def test_one_file_and_one_folder(project: Path) -> None:
    repository = DvcArtifactRepository(put(Path("artifacts/merge/ties")).uri)
    assert Path(repository.download_artifacts("config.json")).read_text() == "{}"
    assert [info.path for info in repository.list_artifacts("extra")] == ["extra/100%.txt"]
    assert Path(repository.download_artifacts("extra/100%.txt")).read_text() == "deep"
    assert repository.list_artifacts("config.json") == []


def test_what_is_not_there_or_read_only(project: Path, tmp_path: Path) -> None:
    from mlflow.exceptions import MlflowException

    repository = DvcArtifactRepository(put(Path("artifacts/merge/ties")).uri)
    with pytest.raises(MlflowException, match=r"has no nothing\.bin; list it"):
        repository.download_artifacts("nothing.bin")
    with pytest.raises(MlflowException, match="is read-only; run the pipeline"):
        repository.log_artifacts(os.fspath(tmp_path))


def test_a_damaged_cache_is_noticed(project: Path, tmp_path: Path) -> None:
    from mlflow.exceptions import MlflowException

    reference = put(Path("artifacts/merge/ties"))
    damaged = contents(reference)["model.safetensors"].path
    damaged.chmod(0o644)
    damaged.write_text("Weights")
    with pytest.raises(MlflowException, match="in the DVC cache is damaged"):
        DvcArtifactRepository(reference.uri).download_artifacts("", os.fspath(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()


def test_the_repository_is_found_by_the_variable(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = put(Path("artifacts/merge/ties"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POEMERGE_DVC_ROOT", os.fspath(project))
    assert set(contents(reference)) == set(FILES)


def test_mlflow_knows_the_scheme_and_pays_nothing_for_it() -> None:
    code = """
import sys
from mlflow.store.artifact.artifact_repository_registry import get_registered_artifact_repositories
print("dvc" in get_registered_artifact_repositories(), {"dvc", "prefect"} & set(sys.modules))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True set()"
