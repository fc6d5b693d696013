"""fetch of pickles: what becomes safetensors, and what is refused and never run."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from poemerge.checkpoint import Checkpoint
from tasks.fetch import fetch
from tests.tasks.local_sources import assert_loads_as, pickled, refusal, tiny


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
