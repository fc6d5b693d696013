"""Names that others have written: none leads out of a folder, into one, or through a link."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from dvc.repo import Repo
from safetensors.torch import save_file

from flows.cli import main
from flows.params import load
from flows.selection import select
from flows.turns import turn
from poemerge.atomic import write_text
from poemerge.errors import PoemergeError
from poemerge.lineage import Lineage, Source
from poemerge.merge import merge_checkpoints
from tasks import library
from tasks.dvc_store.reference import contents
from tasks.fetch import fetch, identify
from tasks.versions import download
from tests.reliability.others import artifacts, manifest
from tests.reliability.trials import Trials
from tests.tasks.registry import new_repository
from tests.zoo import Zoo

ROOT = Path(__file__).parents[2]
SECRET = "a line that nobody may copy"
UPWARDS = ("../secret.json", "a/../../secret.json", "/SECRET", "./../secret.json", "..")


def tree(root: Path) -> dict[str, object]:
    """What is in a folder, that of the work apart: link or content."""
    found = (path for path in sorted(root.rglob("*")) if "repository" not in path.parts)
    return {
        path.relative_to(root).as_posix(): path.readlink()
        if path.is_symlink()
        else path.is_file() and path.read_bytes()
        for path in found
    }


@pytest.fixture
def place(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository to work in, beside `outside`, where a secret lies and nothing may appear."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.json").write_text(json.dumps({"said": SECRET}))
    (outside / "secret.jsonl").write_text(SECRET)
    new_repository(tmp_path / "outside/repository", database)
    monkeypatch.chdir(tmp_path / "outside/repository")
    uri = f"sqlite:///{tmp_path}/outside/repository/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return tmp_path / "outside/repository"


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(PoemergeError) as caught:
        action()
    return str(caught.value)


def index(zoo: Zoo, name: str) -> None:
    base = shutil.copytree(zoo.base(sharded=True), Path("base"))
    found = base / "model.safetensors.index.json"
    table = json.loads(found.read_text())
    table["weight_map"] = dict.fromkeys(table["weight_map"], name)
    found.write_text(json.dumps(table))
    assert name in refused(lambda: fetch.fn("base", "base", "out"))
    merge = [base, {"a": zoo.full(1)}, "out"]
    assert Path(name).name in refused(lambda: merge_checkpoints(*merge, method="average"))


def link_in_a_source(zoo: Zoo, name: str) -> None:
    for file in ("notes.txt", "tokenizer_config.json", "extra.json"):
        base = shutil.copytree(zoo.base(), Path(f"base-{file}"))
        (base / file).unlink(missing_ok=True)
        (base / file).symlink_to(Path("../../secret.json"))
        said = refused(lambda b=base: merge_checkpoints(b, {"a": zoo.full(1)}, "out", "average"))
        assert f"{file} is a link that leads out of its folder" in said
        if file.endswith("json"):
            assert "leads out" in refused(lambda b=base: fetch.fn("base", str(b), "out"))


def link_where_a_result_goes(zoo: Zoo, name: str) -> None:
    for link in ("out", "out.partial"):
        Path(link).symlink_to(Path("..").resolve(), target_is_directory=True)
        merge = [zoo.base(), {"a": zoo.full(1)}, "out"]
        how = {"method": "average", "overwrite": True}
        assert "link" in refused(lambda how=how, merge=merge: merge_checkpoints(*merge, **how))
        Path(link).unlink()


def link_where_a_file_is_begun(zoo: Zoo, name: str) -> None:
    Path("told.json.partial").symlink_to("../secret.json")
    write_text(Path("told.json"), "{}")
    assert Path("told.json").read_text() == "{}"
    Path("told.json").unlink()


def list_in_dvc(zoo: Zoo, name: str) -> None:
    found = manifest(name, hashlib.md5(b"evil").hexdigest())
    with Repo() as repo:
        blob = Path(repo.cache.local.oid_to_path(hashlib.md5(b"evil").hexdigest()))
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(b"evil")
    assert "lies outside of it" in refused(lambda: contents(found))
    assert "lies outside of it" in refused(lambda: fetch.fn("base", found.uri, "out"))
    Path("got").mkdir()
    assert "lies outside of it" in refused(lambda: download(found.uri, Path("got")))
    shutil.rmtree("got")


def hash_in_dvc(zoo: Zoo, name: str) -> None:
    found = manifest("lineage.json", f"ab{name}")
    assert "lies outside of it" in refused(lambda: contents(found))


def addresses(zoo: Zoo, name: str) -> None:
    schemes = ("models:/{}@x", "models:/{}/1", "dvc://{}", "dvc://%2e%2e/{}", "hf://{}")
    for form in (*schemes, "package://torch/../{}"):
        refused(lambda form=form: fetch.fn("base", form.format(name), "out"))


def names_in_a_record(zoo: Zoo, name: str) -> None:
    merge_checkpoints(zoo.base(), {"a": zoo.full(1)}, "merged", "average")
    made = Lineage.find(Path("merged"))
    assert made is not None
    secret = hashlib.sha256(Path("../secret.json").read_bytes()).hexdigest()
    evil = Source(name, {name: secret, "model.safetensors": "0" * 64}, uri="..")
    record = Lineage(made.stage, made.params, (evil, *made.inputs[1:]), code=made.code)
    record.write(Path("merged"))
    for command in (["verify", "merged"], ["reproduce", "merged", "--out", "again"]):
        done = CliRunner().invoke(main, command)
        assert done.exit_code in {0, 1}, done.output
        assert done.exception is None or isinstance(done.exception, SystemExit)
        assert SECRET not in done.output
    assert not Path("again").exists()
    shutil.rmtree("merged")


def names_of_tagged_experts(zoo: Zoo, name: str) -> None:
    folder = shutil.copytree(zoo.full(1), Path("expert"))
    known = identify(str(zoo.base()))
    library.add(library.Expert(f"e{len(name)}", name, "0" * 64, *known, None, {"t": "x"}), folder)
    assert "which is no name" in refused(lambda: select(str(zoo.base()), {"t": "x"}, {}))
    library.remove(f"e{len(name)}", None, force=True)


def names_in_params(zoo: Zoo, name: str) -> None:
    for key in ("fetch.experts", "merge.methods"):
        given = f"{key}={json.dumps({name: {'source': 'x'} if key.startswith('f') else {}})}"
        refused(lambda given=given: load(ROOT / "params.yaml", [given]))
    refused(lambda: load(ROOT / "params.yaml", [f"register.name={name}"]))


def names_of_tensors(zoo: Zoo, name: str) -> None:
    for folder, seed in (("base", 0), ("expert", 1)):
        torch.manual_seed(seed)
        Path(folder).mkdir()
        tensors = {f"{name}/w": torch.randn(4, 4), f"{name}.weight": torch.randn(4, 4)}
        save_file(tensors, f"{folder}/model.safetensors")
    merge_checkpoints("base", {name: "expert"}, "out", "average", samples=0)
    files = {path.name for path in Path("out").iterdir()}
    assert files == {"model.safetensors", "merge_report.json", "lineage.json", "README.md"}


def listing_of_mlflow(zoo: Zoo, name: str) -> None:
    Path("got").mkdir()
    with artifacts("fine.json") as url:
        assert set(download(url, Path("got"))) == {"fine.json"}
    with artifacts(name) as url:
        refused(lambda: download(url, Path("got")))
    shutil.rmtree("got")


def link_in_mlflow(zoo: Zoo, name: str) -> None:
    Path("artifacts/model").mkdir(parents=True)
    Path("artifacts/model/config.json").symlink_to(Path("../secret.json").resolve())
    Path("got").mkdir()
    refused(lambda: download(Path("artifacts/model").resolve().as_uri(), Path("got")))
    shutil.rmtree("got")
    shutil.rmtree("artifacts")


def link_where_tickets_lie(zoo: Zoo, name: str) -> None:
    Path("queue").symlink_to("..")
    os.environ["POEMERGE_QUEUE"] = str(Path("queue").absolute())

    def merge() -> None:
        with turn(["cpu"]):
            pass

    assert "is a link, which" in refused(merge)
    Path("queue").unlink()


WAYS = (
    index,
    link_in_a_source,
    link_where_a_result_goes,
    link_where_a_file_is_begun,
    list_in_dvc,
    hash_in_dvc,
    addresses,
    names_in_a_record,
    names_of_tagged_experts,
    names_in_params,
    names_of_tensors,
    listing_of_mlflow,
    link_in_mlflow,
    link_where_tickets_lie,
)


def test_paths(trials: Trials, place: Path, zoo: Zoo) -> None:
    """Hostile names and links in sources, lists, records, tags and settings lead nowhere else"""
    outside = place.parent
    secret = str(outside / "secret.json")
    zoo.base(), zoo.base(sharded=True), zoo.full(1)
    for number in trials(short=len(WAYS), full=len(WAYS) * len(UPWARDS)):
        with trials.trial(number):
            way, name = WAYS[number % len(WAYS)], UPWARDS[number // len(WAYS)]
            before = tree(outside)
            own = {path.name for path in place.iterdir()}
            try:
                way(zoo, name.replace("/SECRET", secret))
                assert tree(outside) == before
                copies = [p for p in place.rglob("*") if p.is_file() and not p.is_symlink()]
                assert not any(SECRET.encode() in path.read_bytes() for path in copies)
            finally:
                for path in place.iterdir():
                    if path.name not in own | {"mlruns", "sources", "mlflow.db.lock"}:
                        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(
                            path
                        )
