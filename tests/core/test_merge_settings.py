"""Settings of a merge: the dtype, strength, weights and names of experts, and the seed."""

import json
from pathlib import Path

import pytest
import torch

from poemerge import METHODS
from poemerge.merge import merge_checkpoints, name_experts
from tests.core.merges import merge, weights
from tests.core.stacks import assert_close
from tests.zoo import Zoo


class TestStoredDtype:
    def test_bf16_stays_bf16(self, zoo: Zoo, tmp_path: Path) -> None:
        experts = [zoo.full(1, "bfloat16"), zoo.full(2, "bfloat16")]
        merge_checkpoints(zoo.base("bfloat16"), experts, tmp_path / "out", "average", "cpu")
        stored = weights(tmp_path / "out")
        assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
        one, two = (weights(folder) for folder in experts)
        for name, weight in stored.items():
            assert_close(weight, ((one[name].float() + two[name].float()) / 2).bfloat16())

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_another_dtype(self, zoo: Zoo, tmp_path: Path, dtype: str) -> None:
        merge(zoo, tmp_path / "source")
        report = merge(zoo, tmp_path / "out", dtype=dtype)
        for name, weight in weights(tmp_path / "source").items():
            assert torch.equal(weights(tmp_path / "out")[name], weight.to(getattr(torch, dtype)))
        assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
        assert {tensor.dtype for tensor in report.tensors} == {dtype}

    def test_copied_tensors_change_too(self, zoo: Zoo, tmp_path: Path) -> None:
        experts = [zoo.adapter(1)]
        merge_checkpoints(zoo.base(), experts, tmp_path / "o", "average", "cpu", dtype="float16")
        assert {w.dtype for w in weights(tmp_path / "o").values()} == {torch.float16}


class TestSettings:
    def test_strength_scales_the_update(self, zoo: Zoo, tmp_path: Path) -> None:
        merge(zoo, tmp_path / "whole")
        merge(zoo, tmp_path / "half", strength=0.5)
        base, whole, half = (weights(p) for p in (zoo.base(), *map(tmp_path.joinpath, HALVES)))
        for name, weight in base.items():
            assert_close(2 * (half[name] - weight), whole[name] - weight, 1e-4)

    def test_weights_are_by_name(self, zoo: Zoo, tmp_path: Path) -> None:
        merge(zoo, tmp_path / "out", "task_arithmetic", weights={"e2": 0.0, "e3": 2.0})
        base, one, three = (weights(p) for p in (zoo.base(), zoo.full(1), zoo.full(3)))
        for name, weight in weights(tmp_path / "out").items():
            update = one[name] - base[name] + 2 * (three[name] - base[name])
            assert_close(weight - base[name], update, 1e-4)

    def test_an_expert_of_weight_zero_has_no_say(self, zoo: Zoo, tmp_path: Path) -> None:
        for method, entry in METHODS.items():
            names = {name for name, _, _ in entry.settings.describe()}
            exact = {"rtol": 1e-9} if "rtol" in names else {}  # the loop is left elsewhere else
            merge(zoo, tmp_path / method, method, weights={"e3": 0.0}, **exact)
            merge(zoo, tmp_path / f"{method}-two", method, 1, 2, **exact)
            two = weights(tmp_path / f"{method}-two")
            for name, weight in weights(tmp_path / method).items():
                assert_close(weight, two[name])

    def test_seed_counts_for_dare_alone(self, zoo: Zoo, tmp_path: Path) -> None:
        for method in ("dare_ties", "ties"):
            same = []
            for seed in (0, 1):
                merge(zoo, tmp_path / f"{method}-{seed}", method, seed=seed)
                same.append(weights(tmp_path / f"{method}-{seed}")["lm_head.weight"])
            assert torch.equal(*same) == (method == "ties")


HALVES = ("whole", "half")


def test_names_of_experts_given_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / "x/a", tmp_path / "y/a", tmp_path / "b", tmp_path / "z/a"]
    assert list(name_experts(paths)) == ["a", "a-2", "b", "a-3"]
    assert name_experts({"n": tmp_path}) == {"n": tmp_path}
