"""Checkpoints in pieces: heads and fused projections by name, and adapters stay adapters."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from poemerge.errors import SettingError
from poemerge.merge import expert_weights, merge_checkpoints
from poemerge.method import Cut
from poemerge.task_vector import DenseStack
from tests.core.stacks import assert_close, merge, update
from tests.zoo import Zoo

FILE = "model.safetensors"


class TestCheckpoints:
    """Names and the config decide on heads and fused projections."""

    HEAD = 8  # of the zoo's Llama: 32 wide, 4 heads, 2 of keys and values

    def merge(self, base: Path, out: Path, experts: dict[str, Path], **options: object) -> object:
        settings = {"method": "cauchy_poe", "epsilon": 0.5, "device": "cpu"} | options
        return merge_checkpoints(base, experts, out, **settings)

    def experts(self, zoo: Zoo) -> dict[str, Path]:
        return {f"e{seed}": zoo.full(seed) for seed in (1, 2, 3)}

    def stack(self, zoo: Zoo, name: str) -> tuple[Tensor, DenseStack]:
        base, *full = (load_file(p / FILE)[name] for p in (zoo.base(), *map(zoo.full, (1, 2, 3))))
        return base, DenseStack(torch.stack([weight - base for weight in full]).unsqueeze(0))

    @pytest.mark.parametrize("side", ["output", "input"])
    def test_heads(self, zoo: Zoo, tmp_path: Path, side: str) -> None:
        report = self.merge(
            zoo.base(), tmp_path / "out", self.experts(zoo), granularity="head", side=side
        )
        pieces = {t.name: t.certificate["pieces"] for t in report.tensors if t.certificate}
        expected = {"q": ("rows", 4), "k": ("rows", 2), "v": ("rows", 2), "o": ("columns", 4)}
        merged = load_file(tmp_path / "out" / FILE)
        for name, count in pieces.items():
            letter = name.split(".")[-2].removesuffix("_proj")
            if letter not in expected:
                assert count == 1
                continue
            axis, heads = expected[letter]
            assert count == heads
            base, stack = self.stack(zoo, name)
            cut = Cut(axis, (self.HEAD,) * heads)
            solved = update(merge(stack, "cauchy_poe", epsilon=0.5, cut=cut, side=side))
            assert_close(merged[name] - base, solved.float(), 1e-4)
        assert sum(count > 1 for count in pieces.values()) == 8

    def test_fused(self, zoo: Zoo, tmp_path: Path) -> None:
        """A declared pattern, here on a matrix that plays the part."""
        name, sizes = "model.layers.1.mlp.up_proj.weight", (40, 16, 8)
        self.merge(
            zoo.base(), tmp_path / "out", self.experts(zoo), fused={"*.1.*up_proj.weight": sizes}
        )
        base, stack = self.stack(zoo, name)
        merged = load_file(tmp_path / "out" / FILE)
        parts = [
            update(merge(DenseStack(part), "cauchy_poe", epsilon=0.5))
            for part in stack.deltas.split(sizes, dim=-2)
        ]
        assert_close(merged[name] - base, torch.cat(parts).float(), 1e-4)
        other = name.replace(".1.", ".0.")
        base, stack = self.stack(zoo, other)
        whole = update(merge(stack, "cauchy_poe", epsilon=0.5))
        assert_close(merged[other] - base, whole.float(), 1e-4)

    def test_fused_sizes_that_do_not_add_up(self, zoo: Zoo, tmp_path: Path) -> None:
        pattern = (
            r"fused gives model.layers.0.mlp.up_proj.weight 40 \+ 16 rows, but it has 64; give"
        )
        fused = {"*.up_proj.weight": [40, 16]}
        with pytest.raises(SettingError, match=pattern):
            self.merge(zoo.base(), tmp_path / "o", self.experts(zoo), fused=fused)
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("precision", ["identity", "diagonal"])
    @pytest.mark.parametrize(
        "pieces", [{"granularity": "head"}, {"fused": {"*.up_proj.weight": [32, 32]}}]
    )
    def test_pieces_by_name_of_what_is_no_matrix(
        self, zoo: Zoo, tmp_path: Path, precision: str, pieces: dict[str, object]
    ) -> None:
        with pytest.raises(SettingError, match=f"no meaning with precision {precision}"):
            self.merge(zoo.base(), tmp_path / "o", self.experts(zoo), precision=precision, **pieces)

    @pytest.mark.parametrize(
        "value", [{"*": [64]}, {"*": 64}, {"*": [32, 0]}, ["*"], {"*": [1.5, 2]}]
    )
    def test_fused_that_is_no_mapping_to_sizes(
        self, zoo: Zoo, tmp_path: Path, value: object
    ) -> None:
        with pytest.raises(SettingError, match="lists of two or more sizes"):
            self.merge(zoo.base(), tmp_path / "o", self.experts(zoo), fused=value)

    def test_head_size_absent_from_the_config(self, zoo: Zoo, tmp_path: Path) -> None:
        base = Path(shutil.copytree(zoo.base(), tmp_path / "base"))
        config = json.loads((base / "config.json").read_text())
        silent = {k: v for k, v in config.items() if k not in {"head_dim", "num_attention_heads"}}
        (base / "config.json").write_text(json.dumps(silent))
        pattern = "config.json says nothing of a head's size .*; choose granularity rows"
        with pytest.raises(SettingError, match=pattern):
            self.merge(base, tmp_path / "o", self.experts(zoo), granularity="head")
        stated = {k: v for k, v in config.items() if k != "head_dim"}
        (base / "config.json").write_text(json.dumps(stated))
        report = self.merge(base, tmp_path / "o", self.experts(zoo), granularity="head")
        assert max(t.certificate.get("pieces", 0) for t in report.tensors) == 32 // self.HEAD

    def test_what_leaves_the_factors_is_no_adapter(self, zoo: Zoo, tmp_path: Path) -> None:
        files = {}
        for seed in (1, 2):
            files[f"e{seed}"] = str(tmp_path / f"{seed}.safetensors")
            seen = {n: torch.eye(32) for n in load_file(zoo.base() / FILE) if "q_proj" in n}
            save_file(seen, files[f"e{seed}"])
        experts = {f"e{seed}": zoo.adapter(seed, target_modules=["q_proj"]) for seed in (1, 2)}
        settings = {"precision": "activation", "curvature": files, "output": "adapter"}
        self.merge(zoo.base(), tmp_path / "out", experts, **settings)
        with pytest.raises(SettingError, match="makes dense updates with these settings"):
            self.merge(zoo.base(), tmp_path / "o", experts, granularity="rows", **settings)

    @pytest.mark.parametrize("granularity", ["head", "rows", "square"])
    @pytest.mark.parametrize("side", ["output", "input"])
    def test_adapters_stay_adapters(
        self, zoo: Zoo, tmp_path: Path, side: str, granularity: str
    ) -> None:
        experts = {f"e{seed}": zoo.adapter(seed) for seed in (1, 2)}
        settings = {"granularity": granularity, "side": side, "block_rows": 12}
        self.merge(zoo.base(), tmp_path / "small", experts, output="adapter", **settings)
        self.merge(zoo.base(), tmp_path / "full", experts, **settings)
        merged = load_file(tmp_path / "full" / FILE)
        start = load_file(zoo.base() / FILE)
        for name, weight in expert_weights(zoo.base(), tmp_path / "small"):
            assert_close(weight - start[name], merged[name] - start[name], 1e-4)
        factors_ = load_file(tmp_path / "small/adapter_model.safetensors")
        assert {t.shape[0] for n, t in factors_.items() if "lora_A" in n} == {8}
