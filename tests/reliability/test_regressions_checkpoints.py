"""Checkpoints that once crashed, hung or passed; what the corpus finds is kept here."""

import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import ones

from poemerge.errors import CheckpointError, PoemergeError, SourceError
from poemerge.extract import extract_adapter
from poemerge.layout import RECORD
from poemerge.lineage import Lineage
from poemerge.lora_config import LoraConfig
from poemerge.merge import merge_checkpoints
from tasks.fetch import fetch
from tasks.fetch.gguf_header import check_header
from tests.reliability.corpus import places
from tests.reliability.readers import opened, parameters, tasks
from tests.zoo import Zoo

PUT = (os.mkfifo, Path.mkdir, places.sparse, places.dangling, places.long_loop)
ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
pytestmark = pytest.mark.usefixtures("in_time")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of one matrix."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"up.weight": ones(2, 2)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", opened),
        ("model.safetensors", opened),
        ("model.safetensors.index.json", opened),
        (RECORD, Lineage.find),
        ("params.yaml", parameters),
        ("red.yaml", tasks),
    ],
)
@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to(path.name)])
def test_a_fifo_or_a_loop_of_links_in_place_of_a_file(
    model: Path, name: str, read: Callable[[Path], Any], put: Callable[[Path], None]
) -> None:
    (model / name).unlink(missing_ok=True)
    put(model / name)
    with pytest.raises(PoemergeError):
        read(model)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[" * 600 + "]" * 600, '"\\ud800"', '{"\\udfff": 1}']
)
def test_json_that_is_too_deep_or_no_text(model: Path, text: str) -> None:
    for name, read, error in (
        ("config.json", opened, CheckpointError),
        (RECORD, Lineage.find, SourceError),
    ):
        (model / name).write_text(f'{{"a": {text}}}')
        with pytest.raises(error, match="unreadable"):
            read(model)
        (model / name).unlink()


@pytest.mark.parametrize(
    "config",
    [
        {"text_config": "x"},
        {"text_config": {"vocab_size": "96"}},
        {"vocab_size": True},
        {"tie_word_embeddings": "false"},
        {"model_type": []},
        {"architectures": 5},
    ],
)
def test_a_config_of_other_types(model: Path, config: dict[str, Any]) -> None:
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config.json has .*; fetch it again"):
        opened(model)


@pytest.mark.parametrize(
    "config",
    [
        {"r": "4"},
        {"r": True},
        {"r": None},
        {"lora_alpha": "8"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 10**400},
        {"rank_pattern": []},
        {"rank_pattern": {"(": 4}},
        {"alpha_pattern": {"(a+)+$": 4}},
        {"alpha_pattern": {"a*a*a*a*a*a*b": 4}},
        {"alpha_pattern": {"q_proj": "4"}},
        {"use_rslora": "no"},
        {"task_type": 5},
    ],
)
def test_an_adapter_config_of_other_types(tmp_path: Path, config: dict[str, Any]) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(ADAPTER | config))
    with pytest.raises(CheckpointError, match="PEFT does not write; save the adapter again"):
        LoraConfig.read(path)


@pytest.mark.parametrize("shape", [[1] * 100, [0, 2**63]])
def test_a_shape_that_torch_cannot_have(model: Path, shape: list[int]) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 if shape[0] else 0]}
    text = json.dumps({"up.weight": entry}).encode()
    body = b"\0" * entry["data_offsets"][1]
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    with pytest.raises(CheckpointError, match=r"has the shape .*; fetch it again"):
        opened(model)


def test_a_shard_with_a_name_too_long(model: Path) -> None:
    index = {"weight_map": {"up.weight": "x" * 5_000}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is missing"):
        opened(model)


def test_side_files_that_are_no_files(zoo: Zoo, tmp_path: Path) -> None:
    base = copytree(zoo.base(), tmp_path / "base")
    (base / "more.json").mkdir()
    os.mkfifo(base / "vocab.txt")
    merge_checkpoints(base, [zoo.full(1)], tmp_path / "out", "average", device="cpu")
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert not made & {"more.json", "vocab.txt"}
    assert "tokenizer.json" in made
    (base / "zeros.txt").symlink_to("/dev/zero")
    with pytest.raises(SourceError, match=r"zeros\.txt"):
        merge_checkpoints(base, [zoo.full(1)], tmp_path / "zeros", "average", device="cpu")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("put", PUT, ids=lambda put: put.__name__)
def test_what_is_fetched_is_files_of_a_possible_size(
    model: Path, tmp_path: Path, name: str, put: Callable[[Path], None]
) -> None:
    (model / "config.json").write_text("{}")
    (model / name).unlink()
    put(model / name)
    with pytest.raises(PoemergeError, match=name):
        fetch.fn("model", str(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_terabytes_of_text_beside_weights(zoo: Zoo, tmp_path: Path) -> None:
    base, expert = (copytree(zoo.full(seed), tmp_path / str(seed)) for seed in (1, 2))
    places.sparse(expert / "generation_config.json")
    with pytest.raises(SourceError, match=r"generation_config.json has 4398046511104 bytes"):
        merge_checkpoints(base, [expert], tmp_path / "out", "average", device="cpu")
    (expert / "generation_config.json").unlink()
    places.sparse(base / "vocab.txt")
    with pytest.raises(SourceError, match=r"vocab.txt has 4398046511104 bytes"):
        merge_checkpoints(base, [expert], tmp_path / "out", "average", device="cpu")


def test_weights_too_large_to_be_mapped(model: Path) -> None:
    places.sparse(model / "model.safetensors")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 41, before[1]))
    try:
        with pytest.raises(CheckpointError, match="larger than what this process may map"):
            opened(model)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_links_in_a_circle(zoo: Zoo, tmp_path: Path) -> None:
    base = copytree(zoo.base(), tmp_path / "base")
    places.long_loop(base / "vocab.txt")
    merge_checkpoints(base, [zoo.full(1)], tmp_path / "out", "average", device="cpu")
    assert not (tmp_path / "out/vocab.txt").is_symlink()
    places.long_loop(tmp_path / "expert")
    with pytest.raises(SourceError, match="expert is not a folder"):
        merge_checkpoints(base, [tmp_path / "expert"], tmp_path / "new", "average", device="cpu")
    with pytest.raises(SourceError, match="expert is not a folder"):
        extract_adapter(base, tmp_path / "expert", tmp_path / "new", 2, device="cpu")


def gguf(facts: bytes, count: int, tensors: int = 0) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, count) + facts


@pytest.mark.parametrize(
    "data",
    [
        b"",
        gguf(b"", 2**60),
        gguf(b"", 0, 2**60),
        gguf(struct.pack("<Q1sIIQ", 1, b"a", 9, 0, 2**60), 1),
        gguf(struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 2**60), 1),
        gguf(struct.pack("<Q1sIIQ", 1, b"a", 9, 9, 1), 1),
        gguf(struct.pack("<Q", 2**63), 1),
        gguf(struct.pack("<Q13sII", 13, b"x.block_count", 4, 2**32 - 1), 1),
        gguf(struct.pack("<Q1sIQIQ", 1, b"a", 1, 2**40, 0, 0), 0, 1),
    ],
)
def test_a_gguf_header_that_claims_what_no_file_holds(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=r"\w"):
        check_header(tmp_path / "a.gguf")
