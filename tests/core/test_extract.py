"""Extraction: the adapter is the best of its rank, loads in peft, and can be merged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from poemerge.extract import extract_adapter
from poemerge.extracting.walk import TIED
from poemerge.merge import expert_weights, merge_checkpoints
from tests.core.extracted import EMBEDDING, FULL, HEAD, by_name, logits, unmerged, weights
from tests.core.stacks import assert_close
from tests.zoo import Zoo, load, merged_by_peft

KINDS = {
    "plain": {},
    "tied": {"tied": True},
    "sharded": {"sharded": True},
    "bfloat16": {"dtype": "bfloat16"},
}


def best(delta: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank] @ vh[:rank]).float()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_adapter_is_base_plus_truncated_update(
    zoo: Zoo, tmp_path: Path, kind: dict[str, object]
) -> None:
    base, expert = zoo.base(**kind), zoo.full(1, **kind)
    report = extract_adapter(base, expert, tmp_path / "a", 5, device="cpu")
    start, tuned = weights(base), weights(expert)
    actual = merged_by_peft(base, tmp_path / "a")
    assert actual.keys() == start.keys()
    for name, weight in actual.items():
        delta = tuned[name] - start[name]
        kept = best(delta, 5) if delta.ndim == 2 else delta
        assert_close(weight, start[name] + kept)
    assert {t.done for t in report.tensors if len(t.shape) == 1} == {"kept whole"}
    assert {t.rank for t in report.factors} == {5}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("vocabulary", ["factors", "keep"])
def test_full_rank_is_the_expert(
    zoo: Zoo, tmp_path: Path, kind: dict[str, object], vocabulary: str
) -> None:
    base, expert, out = zoo.base(**kind), zoo.full(1, **kind), tmp_path / "a"
    report = extract_adapter(base, expert, out, FULL, vocabulary=vocabulary)
    tuned = weights(expert)
    for name, weight in merged_by_peft(base, out).items():
        assert_close(weight, tuned[name])
    for name, weight in expert_weights(base, out):
        assert_close(weight.float(), tuned[name])
    assert report.error == pytest.approx(0, abs=1e-7)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 32
    assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()


def test_unmerged_adapter_answers_as_the_expert(zoo: Zoo, tmp_path: Path) -> None:
    expected = logits(load(zoo.full(1)))
    extract_adapter(zoo.base(), zoo.full(1), tmp_path / "a", FULL)
    assert_close(logits(unmerged(zoo.base(), tmp_path / "a")), expected)


def test_a_tied_embedding_kept_whole_stays_tied(zoo: Zoo, tmp_path: Path) -> None:
    base, expert = zoo.base(tied=True), zoo.full(1, tied=True)
    expected = logits(load(expert))
    extract_adapter(base, expert, tmp_path / "a", FULL, vocabulary="keep")
    model = unmerged(base, tmp_path / "a")
    assert_close(logits(model), expected)
    assert_close(logits(model.merge_and_unload()), expected)


def test_a_tied_embedding_in_factors_comes_with_advice(zoo: Zoo, tmp_path: Path) -> None:
    base, expert = zoo.base(tied=True), zoo.full(1, tied=True)
    report = extract_adapter(base, expert, tmp_path / "a", 4)
    assert by_name(report)[EMBEDDING].done == "factors"
    assert any("merge_and_unload" in warning for warning in report.warnings)


def test_a_tied_head_that_is_stored_goes_with_the_embedding(zoo: Zoo, tmp_path: Path) -> None:
    base, expert = (
        Path(shutil.copytree(folder, tmp_path / folder.name))
        for folder in (zoo.base(tied=True), zoo.full(1, tied=True))
    )
    for folder in (base, expert):
        tensors = load_file(folder / "model.safetensors")
        head = {HEAD: tensors[EMBEDDING].clone()}
        save_file(tensors | head, folder / "model.safetensors", {"format": "pt"})
    report = extract_adapter(base, expert, tmp_path / "a", 4)
    assert by_name(report)[HEAD].reason == TIED
    merged = merged_by_peft(base, tmp_path / "a")
    assert torch.equal(merged[HEAD], merged[EMBEDDING])


def test_the_adapter_is_an_expert(zoo: Zoo, tmp_path: Path) -> None:
    for seed in (1, 2):
        extract_adapter(zoo.base(), zoo.full(seed), tmp_path / f"a{seed}", FULL)
    adapters = [tmp_path / "a1", tmp_path / "a2"]
    merge_checkpoints(zoo.base(), adapters, tmp_path / "m", "average", "cpu")
    merge_checkpoints(zoo.base(), [zoo.full(1), zoo.full(2)], tmp_path / "f", "average", "cpu")
    merged, expected = weights(tmp_path / "m"), weights(tmp_path / "f")
    for name, weight in merged.items():
        assert_close(weight, expected[name])


def test_adapters_without_vectors_merge_in_factors(zoo: Zoo, tmp_path: Path) -> None:
    for seed in (1, 2):
        extract_adapter(zoo.base(), zoo.full(seed), tmp_path / f"a{seed}", 4, vectors="drop")
    adapters = [tmp_path / "a1", tmp_path / "a2"]
    merge_checkpoints(zoo.base(), adapters, tmp_path / "m", "cauchy_poe", "cpu", output="adapter")
    assert (tmp_path / "m/adapter_model.safetensors").exists()


@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_the_same_bytes_again(zoo: Zoo, tmp_path: Path, svd: str) -> None:
    for name in ("once", "again"):
        extract_adapter(zoo.base(), zoo.full(1), tmp_path / name, 4, svd=svd, device="cpu")
    files = [path.name for path in (tmp_path / "once").iterdir()]
    assert {"README.md", "lineage.json", "extract_report.json"} <= set(files)
    for file in files:
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
