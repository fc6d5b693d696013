"""Merging folders: what is written, that it loads, and that sources are left alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from poemerge import METHODS
from poemerge.lineage import Lineage
from poemerge.merge import expert_weights, merge_checkpoints
from tests.core.merges import copy, merge, rules, weights
from tests.core.stacks import assert_close
from tests.zoo import Zoo

SIDE_FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "lineage.json",
    "merge_report.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.mark.parametrize("method", METHODS)
class TestEveryMethod:
    def test_output_is_complete_and_loads(self, zoo: Zoo, tmp_path: Path, method: str) -> None:
        report = merge(zoo, tmp_path / "out", method)
        files = {path.name for path in (tmp_path / "out").iterdir()}
        assert files == SIDE_FILES | {"model.safetensors"}
        stored = weights(tmp_path / "out")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert all(torch.equal(weight, stored[n]) for n, weight in model.state_dict().items())
        assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids == [11, 12]
        assert len(report.tensors) == len(stored)
        base = weights(zoo.base())
        moved = [name for name in stored if not torch.equal(stored[name], base[name])]
        # Where experts of noise happen to point apart, Model Stock stays at the base.
        assert moved if method == "model_stock" else moved == list(stored)

    def test_sharded_is_single(self, zoo: Zoo, tmp_path: Path, method: str) -> None:
        merge(zoo, tmp_path / "single", method)
        base = zoo.base(sharded=True)
        experts = {f"e{seed}": zoo.full(seed, sharded=seed != 2) for seed in (1, 2, 3)}
        merge_checkpoints(base, experts, tmp_path / "sharded", method, "cpu")
        single, sharded = weights(tmp_path / "single"), weights(tmp_path / "sharded")
        assert single.keys() == sharded.keys()
        for name, weight in single.items():
            assert_close(sharded[name], weight, 1e-6)
        shards = {path.name for path in base.glob("*.safetensors")}
        files = {path.name for path in (tmp_path / "sharded").iterdir()}
        assert files == SIDE_FILES | shards | {"model.safetensors.index.json"}
        assert index(tmp_path / "sharded") == index(base)
        AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", dtype="auto")

    def test_the_same_work_gives_the_same_bytes(
        self, zoo: Zoo, tmp_path: Path, method: str
    ) -> None:
        merge(zoo, tmp_path / "one", method, seed=5)
        merge(zoo, tmp_path / "elsewhere" / "two", method, seed=5)
        for path in (tmp_path / "one").iterdir():
            assert path.read_bytes() == (tmp_path / "elsewhere/two" / path.name).read_bytes()

    def test_order_of_experts_decides_nothing(self, zoo: Zoo, tmp_path: Path, method: str) -> None:
        merge(zoo, tmp_path / "one", method, 1, 2, 3)
        merge(zoo, tmp_path / "two", method, 3, 1, 2)
        one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
        for name, weight in one.items():
            assert_close(two[name], weight)

    def test_adapters(self, zoo: Zoo, tmp_path: Path, method: str) -> None:
        """Adapters merge as the full checkpoints that they stand for."""
        experts = {f"e{seed}": zoo.adapter(seed) for seed in (1, 2)}
        report = merge_checkpoints(zoo.base(), experts, tmp_path / "out", method, "cpu")
        touched = {name for name, rule in rules(report).items() if rule != "copy"}
        assert touched == {name for name in rules(report) if "self_attn" in name}
        for name, folder in experts.items():
            whole = copy(zoo.base(), tmp_path / name)
            save_file(dict(expert_weights(zoo.base(), folder)), whole / "model.safetensors")
        full = {name: tmp_path / name for name in experts}
        merge_checkpoints(zoo.base(), full, tmp_path / "full", method, "cpu")
        actual, expected = weights(tmp_path / "out"), weights(tmp_path / "full")
        for name, weight in actual.items():
            assert_close(weight, expected[name], 1e-4)


def index(folder: Path) -> dict[str, object]:
    """The index of a sharded folder, without what only transformers adds."""
    raw = json.loads((folder / "model.safetensors.index.json").read_text())
    return {"size": raw["metadata"]["total_size"], "map": raw["weight_map"]}


def test_sources_are_left_alone(zoo: Zoo, tmp_path: Path) -> None:
    folders = [zoo.base(), zoo.full(1), zoo.adapter(2)]
    before = [{p: (p.read_bytes(), p.stat().st_mtime_ns) for p in f.iterdir()} for f in folders]
    merge_checkpoints(folders[0], folders[1:], tmp_path / "out")
    assert [{p: (p.read_bytes(), p.stat().st_mtime_ns) for p in f.iterdir()} for f in folders] == (
        before
    )


def test_a_merge_is_written_over_only_when_asked(zoo: Zoo, tmp_path: Path) -> None:
    merge(zoo, tmp_path / "out", "average")
    (tmp_path / "out/old.txt").write_text("x")
    merge(zoo, tmp_path / "out", "ties", overwrite=True)
    assert not (tmp_path / "out/old.txt").exists()
    assert Lineage.find(tmp_path / "out").params["method"] == "ties"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_written_files_are_safetensors_of_the_letter(zoo: Zoo, tmp_path: Path) -> None:
    merge(zoo, tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    with safe_open(path, framework="pt") as stored:
        assert stored.metadata() == {"format": "pt"}
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + header) % 8 == 0
    spans = [
        entry["data_offsets"]
        for name, entry in json.loads(path.read_bytes()[8 : 8 + header]).items()
        if name != "__metadata__"
    ]
    assert max(end for _, end in spans) + 8 + header == path.stat().st_size


class TestExpertWeights:
    def test_of_the_base(self, zoo: Zoo) -> None:
        stored = load_file(zoo.base() / "model.safetensors")
        given = dict(expert_weights(zoo.base(), None))
        assert list(given) == sorted(stored)
        assert all(torch.equal(weight, stored[name]) for name, weight in given.items())

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_of_a_full_expert(self, zoo: Zoo, dtype: str) -> None:
        stored = load_file(zoo.full(1, dtype) / "model.safetensors")
        for name, weight in expert_weights(zoo.base(dtype), zoo.full(1, dtype)):
            assert weight.dtype == stored[name].dtype
            assert_close(weight, stored[name])
