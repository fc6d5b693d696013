"""Verification and reproduction of what a real run registered in MLflow and DVC."""

import hashlib
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from flows.provenance import history, reproduce, verify
from poemerge.errors import SettingError, SourceError
from poemerge.hashing import digest, hash_files
from poemerge.lineage import Lineage, Source, produce
from tasks.dvc_store.reference import Reference, contents
from tasks.provenance.search import Check
from tasks.provenance.verify import Verification
from tasks.versions import is_own
from tests.tasks.finished import VERSION, WEIGHTS, merged, registered, spoil


def blob(name: str) -> Path:
    reference, _ = Reference.parse(registered()["source"])
    return contents(reference)[name].path


def by_role(found: Verification) -> dict[tuple[str, ...], Check]:
    return {check.role: check for check in found.sources}


class TestVerify:
    @pytest.mark.usefixtures("run")
    def test_all_is_intact(self) -> None:
        found = verify(VERSION)
        assert found.problems == ()
        own = {name for name in found.own.files if is_own(name)}
        assert own == {path.name for path in merged().iterdir()}
        assert {"MLmodel", "components/tokenizer/tokenizer.json"} < set(found.own.files) - own
        assert found.own.where == registered()["source"]
        roles = by_role(found)
        assert roles["red",].where == "artifacts/fetch/experts/red"
        assert roles["red", "red"].where == "data/experts/red"
        assert dict(found.counts) == {"intact": sum(found.counts.values())}

    @pytest.mark.usefixtures("mine")
    def test_bytes_in_the_cache_that_changed(self) -> None:
        spoil(blob(WEIGHTS))
        found = verify(VERSION)
        assert found.own.having("changed") == [WEIGHTS]
        assert found.problems == (f"{WEIGHTS} of {registered()['source']} is changed.",)
        assert verify(str(merged())).problems == ()

    @pytest.mark.usefixtures("mine")
    def test_bytes_in_the_cache_that_are_gone(self) -> None:
        blob(WEIGHTS).unlink()
        found = verify(VERSION)
        assert found.own.having("missing") == [WEIGHTS]
        assert len(found.problems) == 1
        shutil.rmtree(".dvc/cache")
        assert not verify(VERSION).own.having("intact")

    @pytest.mark.usefixtures("mine")
    def test_a_record_that_was_exchanged(self) -> None:
        """Bytes and record agree, and are still not what was registered."""
        client = MlflowClient(tracking_uri=f"sqlite:///{Path('mlflow.db').resolve()}")
        client.set_model_version_tag("tiny", "1", "poemerge.digest", "0" * 64)
        assert verify(VERSION).own.having("changed") == ["lineage.json"]

    @pytest.mark.usefixtures("mine")
    def test_a_source_that_changed(self) -> None:
        """What was merged is the copy; a source is at fault once nothing else has its bytes."""
        spoil(Path("data/experts/red/adapter_model.safetensors"))
        found = verify(VERSION)
        assert found.problems == ()
        assert by_role(found)["red",].where == "artifacts/fetch/experts/red"
        shutil.rmtree("artifacts/fetch/experts/red")
        (problem,) = verify(VERSION).problems
        assert problem == "adapter_model.safetensors of data/experts/red is changed."

    @pytest.mark.usefixtures("mine")
    def test_a_fetched_copy_that_changed(self) -> None:
        spoil(Path("artifacts/fetch/base/model.safetensors"))
        assert by_role(verify(VERSION))["base",].where == "data/base"  # its source has them
        spoil(Path("data/base/model.safetensors"))
        problem = verify(VERSION).problems[0]
        assert problem == "model.safetensors of artifacts/fetch/base is changed."

    @pytest.mark.usefixtures("mine")
    def test_a_source_that_is_gone_is_no_fault_of_the_model(self) -> None:
        shutil.rmtree("data/experts/red")
        shutil.rmtree("artifacts/fetch/experts/red")
        found = verify(VERSION)
        assert found.problems == ()
        assert by_role(found)["red",].state == "missing"
        assert by_role(found)["red",].address.startswith("data/experts/red @ ")

    @pytest.mark.usefixtures("mine")
    def test_a_file_that_the_record_does_not_know(self) -> None:
        (merged() / "stray.txt").write_text("x")
        assert verify(str(merged())).own.having("changed") == ["stray.txt"]

    @pytest.mark.usefixtures("mine")
    def test_an_expert_that_is_a_registered_version_is_followed(self) -> None:
        record = Lineage.find(merged())
        revision = f"models:/tiny/1@{digest(dict(record.outputs))}"
        source = Source("law", record.outputs, VERSION, revision, asdict(record))
        fetched = Lineage("fetch", {"revision": revision}, (source,), VERSION, revision)
        files = [path for path in merged().iterdir() if path.name in record.outputs]
        produce(Path("law"), fetched, lambda out: [shutil.copy(path, out) for path in files])
        model = Lineage("merge", {}, (Source.of("law", Path("law")),))
        produce(Path("out"), model, lambda out: (out / "x").write_text("x"))
        for folder in ("law", "artifacts/merge"):
            shutil.rmtree(folder)
        found = verify("out")
        assert found.problems == ()
        assert by_role(found)["law",].where == "models:/tiny/1"
        assert ("law", "law", "red", "red") in by_role(found)
        ((_, copied),) = history("out").sources
        ((_, made),) = copied.sources
        assert made.record == record
        assert made.versions[0].aliases == ("challenger",)

    def test_bytes_that_a_hub_stated_are_checked_in_the_copy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        text = b"{}"
        blob_id = hashlib.sha1(b"blob 2\0" + text).hexdigest()
        files = {"config.json": f"git:{blob_id}", "gone.bin": "1" * 64}
        hub = Source("base", files, "hf://org/base@main", "c" * 40)
        fetched = Lineage("fetch", {}, (hub,), hub.uri, hub.revision)
        place = Path("artifacts/fetch/base")
        produce(place, fetched, lambda folder: (folder / "config.json").write_bytes(text))
        out = Lineage("merge", {}, (Source.of("base", place),))
        produce(Path("out"), out, lambda folder: (folder / "x").write_text("x"))
        origin = by_role(verify("out"))["base", "base"]
        assert origin.files == {"config.json": "intact", "gone.bin": "missing"}
        assert origin.address == f"hf://org/base@main @ {'c' * 40}"


class TestReproduce:
    @pytest.mark.usefixtures("run")
    def test_the_same_bytes(self, tmp_path: Path) -> None:
        done = reproduce(VERSION, tmp_path / "again")
        assert done.differing == {}
        assert done.caveats == ()
        assert set(done.equal) == set(Lineage.find(merged()).outputs)
        assert hash_files(tmp_path / "again") == hash_files(merged())
        made, then = Lineage.find(tmp_path / "again"), Lineage.find(merged())
        assert made == then

    @pytest.mark.usefixtures("mine")
    def test_fetched_copies_are_not_needed(self, tmp_path: Path) -> None:
        shutil.rmtree("artifacts/fetch")
        assert reproduce(VERSION, tmp_path / "again").differing == {}

    @pytest.mark.usefixtures("mine")
    def test_a_source_that_is_not_what_it_was_is_named(self, tmp_path: Path) -> None:
        kept = shutil.copytree("artifacts/fetch/experts/red", tmp_path / "red")
        for folder in ("data/experts/red", "artifacts/fetch/experts/red"):
            spoil(Path(folder, "adapter_model.safetensors"))
        with pytest.raises(SourceError, match=r"red \(.*\) has other bytes in adapter_model.*DIR"):
            reproduce(VERSION, tmp_path / "again")
        assert reproduce(VERSION, tmp_path / "again", [f"red={kept}"]).differing == {}

    @pytest.mark.usefixtures("mine")
    def test_what_differs_is_said_tensor_by_tensor(self, tmp_path: Path) -> None:
        folder = tmp_path / "other"
        shutil.copytree(merged(), folder)
        tensors = load_file(folder / WEIGHTS)
        name = min(tensors)
        tensors[name] = tensors[name] + 0.5
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        record = Lineage.find(folder)
        code = {"poemerge": "0.0.1", "sha256": "f" * 64}
        replace(record, code=code, packages=record.packages | {"torch": "1.0"}).write(folder)
        done = reproduce(str(folder), tmp_path / "again")
        assert done.differing == {WEIGHTS: f"differs in {name} (by up to 5.0e-01)"}
        assert [caveat.split(":")[0] for caveat in done.caveats] == [
            *("code poemerge", "code sha256", "packages torch")
        ]

    @pytest.mark.usefixtures("run")
    def test_only_merges_are_merged_again(self, tmp_path: Path) -> None:
        with pytest.raises(SettingError, match="is of fetch; give a merged model"):
            reproduce("artifacts/fetch/base", tmp_path / "again")
        assert not list(tmp_path.iterdir())
