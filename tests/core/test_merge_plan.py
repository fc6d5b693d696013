"""What a merge plans: a rule for every tensor, ties, mismatches, and the memory to ask for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from poemerge import METHODS
from poemerge.errors import CheckpointError
from poemerge.merge import merge_checkpoints
from poemerge.merging.memory import OVERHEAD
from poemerge.merging.plan import plan_merge
from tests.core.merges import copy, merge, rules, weights
from tests.core.stacks import assert_close
from tests.zoo import Zoo


class TestTiedHead:
    def test_tied_stays_tied(self, zoo: Zoo, tmp_path: Path) -> None:
        experts = [zoo.full(seed, tied=True) for seed in (1, 2)]
        merge_checkpoints(zoo.base(tied=True), experts, tmp_path / "out", device="cpu")
        assert "lm_head.weight" not in weights(tmp_path / "out")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_a_stored_copy_is_dropped(self, zoo: Zoo, tmp_path: Path) -> None:
        folders = []
        for name, source in {"base": zoo.base(tied=True), "a": zoo.full(1, tied=True)}.items():
            folders.append(copy(source, tmp_path / name))
            stored = load_file(folders[-1] / "model.safetensors")
            stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
            save_file(stored, folders[-1] / "model.safetensors")
        base, expert = folders
        report = merge_checkpoints(base, [expert, zoo.full(2, tied=True)], tmp_path / "out")
        assert rules(report)["lm_head.weight"] == "tied"
        assert "lm_head.weight" not in weights(tmp_path / "out")
        plain = [zoo.full(1, tied=True), zoo.full(2, tied=True)]
        merge_checkpoints(zoo.base(tied=True), plain, tmp_path / "plain")
        for name, weight in weights(tmp_path / "plain").items():
            assert torch.equal(weights(tmp_path / "out")[name], weight)
        assert not any("lm_head" in warning for warning in report.warnings)

    def test_a_shard_with_nothing_but_the_copy_is_not_written(
        self, zoo: Zoo, tmp_path: Path
    ) -> None:
        base = copy(zoo.base(tied=True, sharded=True), tmp_path / "base")
        embedding = weights(base)["model.embed_tokens.weight"]
        save_file({"lm_head.weight": embedding.clone()}, base / "model-head.safetensors")
        path = base / "model.safetensors.index.json"
        table = json.loads(path.read_text())
        table["weight_map"]["lm_head.weight"] = "model-head.safetensors"
        path.write_text(json.dumps(table))
        merge_checkpoints(base, [zoo.full(1, tied=True)], tmp_path / "out", "average")
        assert not (tmp_path / "out/model-head.safetensors").exists()
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    def test_an_adapted_tied_head_is_refused(self, zoo: Zoo, tmp_path: Path) -> None:
        expert = zoo.adapter(1, tied=True, target_modules=["q_proj", "lm_head"])
        pattern = "Expert 'a' .* changes lm_head.weight apart from the other end of the tie"
        with pytest.raises(CheckpointError, match=pattern):
            merge_checkpoints(zoo.base(tied=True), {"a": expert}, tmp_path / "out", "average")

    def test_untied_heads_are_merged(self, zoo: Zoo, tmp_path: Path) -> None:
        assert rules(merge(zoo, tmp_path / "out"))["lm_head.weight"] == "vocabulary"


class TestRules:
    def test_of_a_structured_method(self, zoo: Zoo, tmp_path: Path) -> None:
        found = rules(merge(zoo, tmp_path / "out", side="output"))
        assert found.pop("model.embed_tokens.weight") == "vocabulary"
        assert found.pop("lm_head.weight") == "vocabulary"
        for name, rule in found.items():
            assert rule == ("average" if "norm" in name else "matrix"), name

    def test_vectors_are_averaged(self, zoo: Zoo, tmp_path: Path) -> None:
        merge(zoo, tmp_path / "out", weights={"e1": 3.0})
        name = "model.norm.weight"
        one, two, three = (weights(zoo.full(seed))[name] for seed in (1, 2, 3))
        assert_close(weights(tmp_path / "out")[name], (3 * one + two + three) / 5)

    def test_vocabularies_are_solved_on_the_feature_side(self, zoo: Zoo, tmp_path: Path) -> None:
        merge(zoo, tmp_path / "out", side="output")
        merge(zoo, tmp_path / "in", side="input")
        out, feature = weights(tmp_path / "out"), weights(tmp_path / "in")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(out[name], feature[name])
        assert not torch.equal(*(w["model.layers.0.mlp.up_proj.weight"] for w in (out, feature)))

    def test_other_tensors(self, tmp_path: Path) -> None:
        """No architecture is known: buffers, scalars and many axes merge all the same."""
        generator = torch.Generator().manual_seed(0)
        base = {
            "logit_scale": torch.tensor(2.0),
            "conv.weight": torch.randn(4, 3, 2, 2, generator=generator),
            "dense.weight": torch.randn(5, 3, generator=generator),
            "double": torch.randn(3, generator=generator, dtype=torch.float64),
            "empty": torch.zeros(0, 3),
            "position_ids": torch.arange(7),
            "mask": torch.tensor([True, False]),
        }
        expert = {n: w + 1 if w.is_floating_point() else w.clone() for n, w in base.items()}
        expert["position_ids"] += 5
        for name, tensors in {"base": base, "a": expert}.items():
            (tmp_path / name).mkdir()
            save_file(tensors, tmp_path / name / "model.safetensors")
        for method in METHODS:
            out = tmp_path / method
            settings = {"keep": 1.0, "drop": 0.0} if method == "dare_ties" else {}
            settings |= {"keep": 1.0} if method in {"ties", "knots_ties"} else {}
            settings |= {"ridge": 1e-4} if method.endswith("_poe") else {}
            report = merge_checkpoints(
                tmp_path / "base", [tmp_path / "a"], out, method, "cpu", **settings
            )
            merged = weights(out)
            assert rules(report)["position_ids"] == rules(report)["mask"] == "copy"
            for name, weight in base.items():
                assert merged[name].dtype == weight.dtype
                if weight.is_floating_point():
                    assert_close(merged[name], expert[name], 2e-3)
                else:
                    assert torch.equal(merged[name], weight)
            assert {path.name for path in out.iterdir()} == {
                "README.md",
                "lineage.json",
                "merge_report.json",
                "model.safetensors",
            }
            assert any("has no tokenizer" in warning for warning in report.warnings)


class TestMismatches:
    def change(self, zoo: Zoo, tmp_path: Path, **changes: Tensor | None) -> Path:
        folder = copy(zoo.full(1), tmp_path / "changed")
        tensors = load_file(folder / "model.safetensors") | changes
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors")
        return folder

    def test_missing_and_extra_tensors_are_named(self, zoo: Zoo, tmp_path: Path) -> None:
        lacking = "model.layers.1.mlp.up_proj.weight"
        expert = self.change(zoo, tmp_path, **{lacking: None, "value_head.weight": torch.ones(3)})
        experts = {"a": expert, "b": zoo.full(2)}
        report = merge_checkpoints(zoo.base(), experts, tmp_path / "out", "average", "cpu")
        assert any(f"'a' lacks {lacking}; the others decide" in w for w in report.warnings)
        assert any("'a' has value_head.weight" in w for w in report.warnings)
        assert_close(weights(tmp_path / "out")[lacking], weights(zoo.full(2))[lacking])
        (entry,) = (tensor for tensor in report.tensors if tensor.name == lacking)
        assert entry.experts == ("b",)

    def test_a_prefix_of_all_names_is_bridged(self, zoo: Zoo, tmp_path: Path) -> None:
        folder = copy(zoo.full(1), tmp_path / "prefixed")
        stored = load_file(folder / "model.safetensors")
        save_file({f"lm.{n}": t for n, t in stored.items()}, folder / "model.safetensors")
        merge_checkpoints(zoo.base(), [folder], tmp_path / "out", "average", "cpu")
        for name, weight in weights(tmp_path / "out").items():
            assert_close(weight, stored[name])


class TestPlan:
    def test_peak_grows_with_the_model_and_not_with_its_depth(self, zoo: Zoo) -> None:
        with plan_merge(zoo.base(), {"a": zoo.full(1), "b": zoo.full(2)}, "cauchy_poe", {}) as two:
            peak = two.peak_bytes() - OVERHEAD
            size = sum(info.bytes for info in two.base.tensors.values())
            assert two.read_bytes >= 3 * size
        with plan_merge(zoo.base(), {"a": zoo.full(1)}, "cauchy_poe", {}) as one:
            assert 0 < one.peak_bytes() - OVERHEAD < peak < 40 * size

    def test_factors_need_less(self, zoo: Zoo) -> None:
        full = {"a": zoo.full(1), "b": zoo.full(2)}
        adapters = {"a": zoo.adapter(1), "b": zoo.adapter(2)}
        with plan_merge(zoo.base(), full, "cauchy_poe", {}) as dense:
            with plan_merge(zoo.base(), adapters, "cauchy_poe", {}) as factors:
                assert factors.peak_bytes() < dense.peak_bytes()
            assert dense.rules.keys() == weights(zoo.base()).keys()
