"""Models that MLflow and DVC hold, as sources: the real registry, the real cache."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import mlflow
import pytest
from dvc.repo import Repo
from mlflow import MlflowClient

from poemerge.errors import PoemergeError, SourceError
from poemerge.hashing import digest, hash_files
from poemerge.lineage import Lineage, Source, produce
from tasks.dvc_store.reference import put
from tasks.fetch import UnreachableError, fetch
from tasks.fetch.sources import open_source
from tasks.progress import watched_by
from tasks.versions import DIGEST

OUTPUT = Path("artifacts/merge")


@pytest.fixture
def project(registry: Path) -> Path:
    """A repository with an output that has room for models."""
    Path(".gitignore").write_text("/artifacts/\n/mlflow.db\n/mlruns/\n")
    Path("dvc.yaml").write_text(f"stages: {{merge: {{cmd: 'true', outs: [{OUTPUT}]}}}}\n")
    return registry


def model(zoo, seed: int, out: Path = OUTPUT / "ties") -> Path:  # noqa: ANN001
    """A tiny model at the place of an output, with the record of a merge of two sources."""

    def work(folder: Path) -> None:
        shutil.copytree(zoo.full(seed), folder, dirs_exist_ok=True)
        (folder / "merge_report.json").write_text("{}")

    inputs = tuple(Source(name, {"model.safetensors": name * 32}) for name in ("ab", "cd"))
    produce(out, Lineage("merge", {"method": "ties", "seed": seed}, inputs), work)
    return out


def commit(tag: str) -> None:
    """As a run leaves it: the output in dvc.lock and in the cache, the lock in git."""
    with Repo() as repo:
        repo.commit("merge", force=True)
    subprocess.run(["git", "add", "-A"], check=True)
    subprocess.run(["git", "commit", "-qm", tag], check=True)
    subprocess.run(["git", "tag", tag], check=True)


def version(source: str, tags: Mapping[str, str] | None = None, name: str = "tiny") -> str:
    """Register a source; its number."""
    client = MlflowClient()
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    return str(client.create_model_version(name, source, tags=tags).version)


def stored(folder: Path) -> tuple[str, dict[str, str]]:
    """Source and tags, as the register stage gives them."""
    return put(folder).uri, {DIGEST: digest(hash_files(folder))}


def refusal(source: str) -> PoemergeError:
    with pytest.raises(PoemergeError) as caught:
        fetch.fn("base", source, "refused")
    assert not Path("refused").exists()
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    return caught.value


def weights(folder: Path | str) -> bytes:
    return Path(folder, "model.safetensors").read_bytes()


def test_what_dvc_holds_by_hash_by_path_and_by_revision(project: Path, zoo) -> None:  # noqa: ANN001
    for seed in (1, 2):
        model(zoo, seed)
        commit(f"v{seed}")
    shutil.rmtree(OUTPUT)
    now = open_source("dvc://artifacts/merge/ties", "float32").revision
    assert now.startswith("dvc://artifacts/merge/")
    assert now.endswith(".dir/ties")
    wanted = {
        "dvc://artifacts/merge/ties": 2,
        "dvc://artifacts/merge/ties@v1": 1,
        "dvc://artifacts/merge/ties@HEAD": 2,
        now: 2,
    }
    for index, (source, seed) in enumerate(wanted.items()):
        assert fetch.fn("base", source, f"out{index}") is True
        assert fetch.fn("base", source, f"out{index}") is False
        assert weights(f"out{index}") == weights(zoo.full(seed))
    record = Lineage.find(Path("out0"))
    assert record is not None
    assert (record.uri, record.revision) == ("dvc://artifacts/merge/ties", now)
    assert record.inputs[0].files == hash_files(Path("out0"))


def test_the_path_means_what_the_lock_says_now(project: Path, zoo) -> None:  # noqa: ANN001
    model(zoo, 1)
    commit("v1")
    fetch.fn("base", "dvc://artifacts/merge/ties", "out")
    model(zoo, 2)
    assert fetch.fn("base", "dvc://artifacts/merge/ties", "out") is False
    commit("v2")
    assert fetch.fn("base", "dvc://artifacts/merge/ties", "out") is True
    assert weights("out") == weights(zoo.full(2))


def test_what_dvc_has_not_is_refused(project: Path, zoo) -> None:  # noqa: ANN001
    model(zoo, 1)
    commit("v1")
    assert "is nothing that DVC tracks" in str(refusal("dvc://artifacts/other"))
    assert "is nothing that DVC tracks" in str(refusal("dvc://artifacts/merge/ties@v7"))
    assert "holds no model or adapter weights" in str(refusal("dvc://artifacts/merge/dare"))
    assert "could not be pulled" in str(refusal(f"dvc://a/{'0' * 32}.dir"))


def test_a_damaged_or_emptied_cache_is_noticed(project: Path, zoo) -> None:  # noqa: ANN001
    uri = put(model(zoo, 1)).uri
    files = (path for path in Path(".dvc/cache/files").rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.chmod(0o644)
    largest.write_bytes(b"x" * largest.stat().st_size)
    assert "is damaged" in str(refusal(uri))
    shutil.rmtree(".dvc/cache")
    assert "could not be pulled" in str(refusal(uri))


def test_an_alias_is_resolved_to_a_version_and_its_content(project: Path, zoo) -> None:  # noqa: ANN001
    client = MlflowClient()
    for seed in (1, 2):
        source, tags = stored(model(zoo, seed))
        client.set_registered_model_alias("tiny", "champion", version(source, tags))
        assert fetch.fn("red", "models:/tiny@champion", "out") is True
        record = Lineage.find(Path("out"))
        assert record is not None
        content = digest(hash_files(Path("out")))
        assert record.revision == f"models:/tiny/{seed}@{content}"
        assert weights("out") == weights(zoo.full(seed))
    assert fetch.fn("red", "models:/tiny@champion", "out") is False
    fetch.fn("red", "models:/tiny/1", "first")
    assert weights("first") == weights(zoo.full(1))


def test_the_lineage_of_a_registered_merge_is_taken_over(project: Path, zoo) -> None:  # noqa: ANN001
    version(*stored(model(zoo, 1)))
    fetch.fn("red", "models:/tiny/1", "out")
    record = Lineage.find(Path("out"))
    assert record is not None
    parent = record.inputs[0].parent
    assert parent is not None
    assert (parent["stage"], parent["params"]["method"]) == ("merge", "ties")
    assert [source["name"] for source in parent["inputs"]] == ["ab", "cd"]


def test_other_bytes_than_were_registered_are_refused(project: Path, zoo) -> None:  # noqa: ANN001
    folder = model(zoo, 1)
    _, tags = stored(folder)
    copied = shutil.copytree(folder, project / "store")
    version(os.fspath(copied), tags)
    assert fetch.fn("red", "models:/tiny/1", "out") is True
    shutil.copyfile(zoo.full(2) / "model.safetensors", copied / "model.safetensors")
    assert "holds other bytes than were registered" in str(refusal("models:/tiny/1"))
    shutil.rmtree(copied)
    assert "The bytes of models:/tiny/1 cannot be had" in str(refusal("models:/tiny/1"))


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
def test_a_model_that_others_logged(project: Path, zoo, monkeypatch, tmp_path: Path) -> None:  # noqa: ANN001
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", os.fspath(tmp_path / "scratch"))
    mlflow.transformers.log_model(
        os.fspath(zoo.base()), name="m", task="text-generation",
        registered_model_name="foreign", pip_requirements=["torch"],
    )  # fmt: skip
    fetch.fn("base", "models:/foreign/1", "out")
    expected = hash_files(zoo.base())
    assert hash_files(Path("out")) == expected
    record = Lineage.find(Path("out"))
    assert record is not None
    assert record.revision == f"models:/foreign/1@{digest(expected)}"
    assert not list((tmp_path / "scratch").glob("poemerge-*"))


def test_a_download_from_mlflow_tells_how_many_bytes_have_come(project: Path, zoo) -> None:  # noqa: ANN001
    copy = shutil.copytree(zoo.full(1), project / "copy/model")
    number = version(str(copy.parent))
    size = sum(path.stat().st_size for path in copy.iterdir())
    told: list[tuple[str, str, int, int]] = []
    with watched_by(lambda *news: told.append(news)):
        open_source(f"models:/tiny/{number}", "float32")
    whole = max(1, round(size / 1e6))
    assert told[-1] == (f"models:/tiny/{number}", "MB", whole, whole)


def test_names_that_are_not_there(project: Path, zoo) -> None:  # noqa: ANN001
    version(*stored(model(zoo, 1)))
    assert "has no models:/tiny@champion" in str(refusal("models:/tiny@champion"))
    assert "has no models:/tiny/7" in str(refusal("models:/tiny/7"))
    assert "has no models:/none/1" in str(refusal("models:/none/1"))
    assert "write models:/NAME@ALIAS" in str(refusal("models:/tiny"))


def test_a_server_that_does_not_answer_is_a_network_fault(project: Path, monkeypatch) -> None:  # noqa: ANN001
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    error = refusal("models:/tiny@champion")
    assert isinstance(error, UnreachableError)
    assert "does not answer" in str(error)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/mlflow.db")
    error = refusal("models:/tiny@champion")
    assert isinstance(error, SourceError)
    assert not isinstance(error, UnreachableError)
