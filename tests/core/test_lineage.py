"""lineage.json: what the two specifications ask of it, and that nothing is lost in it."""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from safetensors.torch import save_file
from torch import ones

from poemerge.errors import SourceError
from poemerge.hashing import hash_files
from poemerge.layout import RECORD
from poemerge.lineage import Lineage, Source, produce
from poemerge.merge import merge_checkpoints

ROOT = Path(__file__).parents[2]
COMMIT = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
SHA256 = "a" * 64


def full() -> Lineage:
    """A record with something in every field, and two generations below."""
    fetched = Lineage("fetch", {"revision": COMMIT}, (), "hf://org/base@main", COMMIT)
    files = {"b.safetensors": SHA256, "config.json": "git:" + "b" * 40}
    hub = Source("base", files, "hf://org/base@main", COMMIT, asdict(fetched))
    merged = Lineage("merge", {"method": "ties"}, (hub,), outputs={"m.safetensors": SHA256})
    expert = Source("law", merged.outputs, "models:/law/3", "", asdict(merged))
    return Lineage(
        "merge",
        {"method": "cauchy_poe", "settings": {"weights": {"law": 0.5}, "rtol": 1e-5}, "rank": None},
        (hub, expert, Source("curvature of law", {})),
        "somewhere",
        "7",
        "NVIDIA H100",
        {"poemerge": "0.1.0", "sha256": SHA256},
        {"python": "3.11.7", "torch": "2.13.0"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What `full()` is the record of."""

    def work(place: Path) -> None:
        save_file({"up": ones(2)}, place / "model.safetensors")
        (place / "config.json").write_text("{}")

    produce(tmp_path / "out", full(), work)
    return tmp_path / "out"


def fields(record: Lineage) -> dict:
    """As JSON has them, which knows no tuples."""
    return json.loads(json.dumps(asdict(record)))


def statement(folder: Path) -> dict:
    return json.loads((folder / RECORD).read_text())


def test_nothing_is_lost(folder: Path) -> None:
    found = Lineage.find(folder)
    assert fields(found) == fields(full()) | {"outputs": hash_files(folder)}
    assert found.key == full().key
    assert found.is_current(folder)


def test_it_is_an_in_toto_statement(folder: Path) -> None:
    message = json_format.Parse((folder / RECORD).read_text(), statement_pb2.Statement())
    Statement.copy_from_pb(message).validate()
    made = {each.name: dict(each.digest) for each in message.subject}
    assert made == {name: {"sha256": value} for name, value in hash_files(folder).items()}
    assert message.predicate_type == "https://slsa.dev/provenance/v1"


def test_the_predicate_is_slsa_provenance(folder: Path) -> None:
    predicate = json.dumps(statement(folder)["predicate"])
    found = json_format.Parse(predicate, provenance_pb2.Provenance())  # an unknown field is refused
    definition, run = found.build_definition, found.run_details
    assert definition.build_type == "poemerge:lineage/2/merge"
    assert run.builder.id
    assert dict(run.builder.version) == full().packages
    assert definition.external_parameters["params"]["method"] == "cauchy_poe"
    assert [each.name for each in definition.resolved_dependencies] == [
        *("base", "law", "curvature of law")
    ]
    assert not run.HasField("metadata")  # it would hold a clock


def test_digests_are_those_of_the_specification(folder: Path) -> None:
    """`dirHash` of a folder is defined by a line of shell; one file has its own hash."""
    shell = "find . -type f | cut -c3- | LC_ALL=C sort | xargs -r sha256sum | sha256sum"
    (folder / RECORD).unlink()
    printed = subprocess.check_output(shell, shell=True, cwd=folder, text=True)
    inputs = (Source.of("many", folder), Source.of_file("one", folder / "config.json"))
    Lineage("merge", {}, inputs).write(folder)
    many, one = statement(folder)["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert many["digest"] == {"dirHash": printed.split()[0]}
    assert one["digest"] == {"sha256": hash_files(folder)["config.json"]}


def test_a_commit_of_a_hub_is_a_digest(folder: Path) -> None:
    hub, expert, _ = statement(folder)["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert hub["digest"] == {"gitCommit": COMMIT}  # no sha256 is known of one of its files
    assert hub["uri"] == "hf://org/base@main"
    assert expert["digest"] == {"sha256": SHA256}
    assert expert["annotations"]["lineage"]["_type"] == "https://in-toto.io/Statement/v1"


@pytest.mark.parametrize("expert", sorted((ROOT / "data/experts").glob("*/lineage.json")), ids=str)
def test_records_of_format_1_are_read(expert: Path, tmp_path: Path) -> None:
    raw = json.loads(expert.read_text())
    record = Lineage.find(expert.parent)
    assert raw.pop("format") == "poemerge/lineage/1"
    assert fields(record) == raw
    assert dict(record.outputs) == hash_files(expert.parent)
    Lineage("merge", {}, (Source.of("old", expert.parent),)).write(tmp_path)  # now as a parent
    parent = Lineage.of(Lineage.find(tmp_path).inputs[0].parent)
    assert parent.key == record.key
    assert "poemerge/lineage/1" not in (tmp_path / RECORD).read_text()


@pytest.mark.parametrize(
    ("field", "value"),
    [("_type", "https://in-toto.io/Statement/v0.1"), ("predicateType", "x"), ("predicate", {})],
)
def test_another_statement_is_refused(folder: Path, field: str, value: object) -> None:
    (folder / RECORD).write_text(json.dumps(statement(folder) | {field: value}))
    with pytest.raises(SourceError, match=r"lineage\.json is no lineage record .*; delete it"):
        Lineage.find(folder)


def test_a_relative_address_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for index, name in enumerate(("base", "law")):
        Path(name).mkdir()
        save_file({"up": ones(2, 2) * index}, f"{name}/model.safetensors")
    merge_checkpoints("base", {"a": Path("law")}, "one", "average", "cpu")
    merge_checkpoints("base", [tmp_path / "law", Path("one")], "two", "average", "cpu")
    assert [source.uri for source in Lineage.find(Path("one")).inputs] == ["base", "law"]
    assert [source.uri for source in Lineage.find(Path("two")).inputs] == ["base", "", "one"]
