"""Lineage of what a real run registered in MLflow and DVC, and how two models differ."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.provenance import history, verify
from poemerge.errors import SettingError, SourceError
from poemerge.hashing import sha256
from poemerge.lineage import Lineage
from tasks.audit_table import BODY, HASH
from tasks.decisions import Decision
from tasks.library import experts
from tasks.provenance.difference import differences
from tests.tasks.finished import VERSION, WEIGHTS, merged, registered, spoil


class TestHistory:
    @pytest.mark.usefixtures("run")
    def test_a_version_has_everything_about_it(self) -> None:
        made = history(VERSION)
        assert made.record == Lineage.find(merged())
        (version,) = made.versions
        assert version.uri == "models:/tiny/1"
        assert version.aliases == ("challenger",)
        assert version.source == registered()["source"]
        board = json.loads(Path("artifacts/register/leaderboard.json").read_text())
        best = next(row for row in board["rows"] if row["label"] == registered()["candidate"])
        assert made.evaluation.scores == best["scores"]
        assert version.metrics["test/mean"] == best["mean"]["test"]
        for task in ("red", "blue"):
            folder = Path("data/tasks")
            assert made.evaluation.data[task] == {
                name: sha256(next(p for p in (folder / name, folder / task / name) if p.exists()))
                for name in made.evaluation.data[task]
            }
            assert len(made.evaluation.data[task]) >= 3

    @pytest.mark.usefixtures("run")
    def test_it_goes_down_to_the_sources(self) -> None:
        sources = {source.name: below for source, below in history(VERSION).sources}
        assert list(sources) == ["base", "red", "blue"]
        fetched = sources["red"]
        assert fetched.record.stage == "fetch"
        ((origin, nothing),) = fetched.sources
        assert nothing is None
        assert origin.uri == "data/experts/red"
        weights = Path(origin.uri, "adapter_model.safetensors")
        assert origin.files[weights.name] == sha256(weights)

    @pytest.mark.usefixtures("run")
    def test_every_kind_of_reference_means_the_same(self) -> None:
        told = [
            json.loads(json.dumps(history(ref).as_json()))
            for ref in (VERSION, "models:/tiny/1", registered()["source"], str(merged()))
        ]
        assert all(each == told[0] for each in told)
        assert told[0]["digest"] == registered()["digest"]

    @pytest.mark.usefixtures("mine")
    def test_a_version_that_lies_in_mlflow(self, tmp_path: Path) -> None:
        """Bytes and evaluation are artifacts of a run; no folder of the project is needed."""
        evaluation = Path("artifacts/evaluate/merges", registered()["candidate"])
        here = history(VERSION)
        client = MlflowClient(tracking_uri=f"sqlite:///{Path('mlflow.db').resolve()}")
        place = client.create_experiment("copies", artifact_location=str(tmp_path / "artifacts"))
        run = client.create_run(place).info
        client.log_artifacts(run.run_id, str(merged()), "model")
        client.log_artifacts(run.run_id, str(evaluation), "evaluation")
        client.create_registered_model("copy")
        tags = {"poemerge.digest": here.digest}
        client.create_model_version("copy", f"{run.artifact_uri}/model", run.run_id, tags)
        shutil.rmtree("artifacts")
        shutil.rmtree(".dvc/cache")
        made = history("models:/copy/1")
        assert made.record == here.record
        assert made.evaluation == here.evaluation
        assert [version.uri for version in made.versions] == ["models:/copy/1", "models:/tiny/1"]
        assert verify("models:/copy/1").problems == ()
        spoil(tmp_path / "artifacts" / run.run_id / "artifacts/model" / WEIGHTS)
        assert verify("models:/copy/1").own.having("changed") == [WEIGHTS]

    @pytest.mark.usefixtures("mine")
    def test_decisions_in_force_are_told(self) -> None:
        """Rows of the audit table: the third follows the same one as the second, and is void."""
        client = MlflowClient(tracking_uri=f"sqlite:///{Path('mlflow.db').resolve()}")
        client.create_registered_model("tiny-decisions")
        first = Decision("promotion", 1, None, "so")
        second = Decision("refusal", 1, 1, "so", before=first.hash)
        third = Decision("rollback", 1, 1, "so", before=first.hash)
        fourth = Decision("refusal", 2, 1, "so", before=second.hash)
        for each in (first, second, third, fourth):
            tags = {BODY: json.dumps(asdict(each)), HASH: each.hash}
            client.create_model_version("tiny-decisions", "poemerge://decision/x", tags=tags)
        (version,) = history(VERSION).versions
        assert [decision["kind"] for decision in version.decisions] == ["promotion", "refusal"]

    def test_a_server_that_is_gone_leaves_out_versions(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        made = history(str(run / merged()))
        assert made.versions == ()
        assert made.evaluation is not None

    @pytest.mark.usefixtures("run")
    def test_what_means_nothing_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="has no models:/tiny/9: it has versions 1"):
            history("models:/tiny/9")
        with pytest.raises(SettingError, match=r"has no lineage\.json; give a folder that"):
            history(str(tmp_path))
        with pytest.raises(SourceError, match="names no content"):
            history("dvc://artifacts/merge")

    @pytest.mark.usefixtures("run")
    def test_no_database_is_made_by_looking(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = shutil.copytree(merged(), tmp_path / "m")
        monkeypatch.chdir(tmp_path)
        assert history(str(folder)).versions == ()
        with pytest.raises(SourceError, match=r"^mlflow\.db does not exist; run where it lies"):
            history("models:/tiny@champion")
        assert experts() == ()
        assert {path.name for path in tmp_path.iterdir()} == {"m"}


class TestDifference:
    @pytest.mark.usefixtures("run")
    def test_two_candidates(self) -> None:
        ties, average = (history(f"artifacts/merge/{label}") for label in ("ties", "average"))
        found = {(each.section, each.key): each for each in differences(ties, average)}
        assert {section for section, _ in found} <= {"params", "outputs", "scores"}
        method = found["params", "method"]
        assert (method.left, method.right) == ("ties", "average")
        assert found["params", "settings.keep"].right == ""
        assert found["outputs", WEIGHTS].left == ties.record.outputs[WEIGHTS]
        assert differences(ties, ties) == ()

    @pytest.mark.usefixtures("run")
    def test_a_source_that_moved(self) -> None:
        ties = history("artifacts/merge/ties")
        base, red, blue = ties.record.inputs
        red = replace(red, revision="7", files=red.files | {"more.json": "0" * 64})
        moved = replace(ties, record=replace(ties.record, inputs=(base, blue, red), device="gpu"))
        found = [(each.section, each.key) for each in differences(ties, moved)]
        assert found == [
            *(("sources", key) for key in ("order", "red revision", "red files")),
            ("device", "name"),
        ]
