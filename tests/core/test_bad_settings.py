"""Settings and places of a merge that are refused."""

from pathlib import Path

import pytest
import torch

from poemerge.device import pick_device
from poemerge.errors import CheckpointError, SettingError
from poemerge.lineage import Lineage
from poemerge.merge import merge_checkpoints
from tests.core.spoiled import SINGLE, Bench, change, poison
from tests.zoo import Zoo


@pytest.fixture
def bench(zoo: Zoo, tmp_path: Path) -> Bench:
    return Bench(zoo, tmp_path)


class TestSettings:
    def test_unknown_method(self, bench: Bench) -> None:
        pattern = r"Unknown method 'cauchy_peo' \(did you mean 'cauchy_poe'\?\)"
        bench.refused(SettingError, pattern, method="cauchy_peo")
        bench.refused(SettingError, "Unknown method 'xyz'; `poemerge methods`", method="xyz")

    def test_unknown_setting(self, bench: Bench) -> None:
        pattern = r"Unknown setting 'epsilom' \(did you mean 'epsilon'\?\); it takes strength, "
        bench.refused(SettingError, pattern, epsilom=1.0)
        bench.refused(SettingError, "Unknown setting 'keep'", method="average", keep=0.2)

    @pytest.mark.parametrize(
        ("setting", "value", "sentence"),
        [
            ("epsilon", 0.0, "epsilon is 0; it must be at least 1e-12"),
            ("epsilon", "big", "epsilon is 'big'; give a number"),
            ("epsilon", float("nan"), "epsilon is nan; give a number"),
            ("epsilon", True, "epsilon is True; give a number"),
            ("ridge", -1, "ridge is -1; it must be at least 0"),
            ("max_steps", 0, "max_steps is 0; it must be at least 1"),
            ("max_steps", 1.5, "max_steps is 1.5; give a whole number"),
            ("side", "left", "side is 'left'; choose one of input, output"),
            ("scale", None, "scale is None; choose one of equivariant, paper"),
            ("preset", "papers", "preset is 'papers'; choose one of '', paper"),
            ("weights", {"a": -1.0}, "weights is {'a': -1.0}; give a mapping"),
            ("weights", [1.0], r"weights is \[1.0\]; give a mapping of expert names"),
            ("weights", {"b": 1.0}, "weights names no expert by 'b'; use a"),
            ("weights", {"a": 0.0}, "weights gives every expert 0; leave at least one"),
            ("strength", float("inf"), "strength is inf; give a number"),
            ("dtype", "int8", "dtype is 'int8'; choose source, float32, bfloat16, float16"),
            ("output", "gguf", "output is 'gguf'; choose full or adapter"),
            ("device", "tpu", "device is 'tpu'; choose auto, cpu or the cuda"),
            ("device", "cuda:99", "device is 'cuda:99'; choose auto, cpu or the cuda"),
        ],
    )
    def test_values(self, bench: Bench, setting: str, value: object, sentence: str) -> None:
        bench.refused(SettingError, sentence, **{setting: value})

    def test_fractions(self, bench: Bench) -> None:
        pattern = "keep is 1.5; it must be between 0 and 1"
        bench.refused(SettingError, pattern, method="ties", keep=1.5)
        bench.refused(SettingError, "between 0 and 0.99", method="dare_ties", drop=1.0)

    def test_no_experts(self, bench: Bench) -> None:
        with pytest.raises(SettingError, match="No expert is given; a merge needs at least one"):
            merge_checkpoints(bench.zoo.base(), {}, bench.out)

    def test_cpu_is_always_here(self) -> None:
        assert pick_device("cpu") == torch.device("cpu")
        assert pick_device("auto").type in {"cpu", "cuda"}


class TestOut:
    def test_exists(self, bench: Bench) -> None:
        bench.out.mkdir()
        (bench.out / "mine.txt").write_text("x")
        bench.refused(SettingError, "out exists already; choose another folder")
        assert (bench.out / "mine.txt").read_text() == "x"

    @pytest.mark.parametrize("place", ["base", "expert-1", ".", "base/merged", "expert-1/x/y"])
    def test_is_holds_or_lies_in_a_source(self, bench: Bench, place: str) -> None:
        base, expert, out = bench.base(), bench.full(), bench.root / place
        bench.refused(
            SettingError, "source .*; choose another", expert, base=base, out=out, overwrite=True
        )
        assert len(list(base.iterdir())) == len(list(bench.zoo.base().iterdir()))

    def test_an_older_merge_outlives_a_failure(self, bench: Bench) -> None:
        bench.merge(bench.zoo.full(1))
        before = Lineage.find(bench.out)
        folder = change(bench.full(2) / SINGLE, poison("model.norm.weight", float("nan")))
        bench.refused(CheckpointError, "holds NaN", folder, overwrite=True)
        assert before.is_current(bench.out)
