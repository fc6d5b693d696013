"""Tensors that are refused: not finite, quantised, or of no fit with the base."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from poemerge.errors import CheckpointError, NumericalError
from poemerge.merge import merge_checkpoints
from poemerge.statistics import describe_task_vectors
from tests.core.spoiled import ADAPTER, NAME, SINGLE, Bench, change, change_json, poison
from tests.zoo import Zoo


@pytest.fixture
def bench(zoo: Zoo, tmp_path: Path) -> Bench:
    return Bench(zoo, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
class TestNotFinite:
    def test_full_expert(self, bench: Bench, value: float) -> None:
        folder = change(bench.full() / SINGLE, poison(NAME, value))
        pattern = f"{NAME} of expert 'expert-1' .*{folder}.* holds NaN or infinite values"
        bench.refused(CheckpointError, pattern, folder, bench.zoo.full(2))

    @pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
    def test_adapter(self, bench: Bench, value: float, factor: str) -> None:
        folder = change(bench.adapter() / ADAPTER, poison(factor, value))
        pattern = "_proj.weight of expert 'adapter-1' .* holds NaN or infinite"
        bench.refused(CheckpointError, pattern, folder)

    def test_base(self, bench: Bench, value: float) -> None:
        folder = change(bench.base() / SINGLE, poison(NAME, value))
        bench.refused(CheckpointError, rf"{NAME} of the base \({folder}\) holds NaN", base=folder)

    def test_base_where_nobody_changes_it(self, bench: Bench, value: float) -> None:
        folder = change(bench.base() / SINGLE, poison(NAME, value))
        pattern = rf"{NAME} of the base \({folder}\) holds NaN"
        bench.refused(CheckpointError, pattern, bench.zoo.adapter(1), base=folder)

    def test_task_vectors(self, bench: Bench, value: float) -> None:
        folder = change(bench.full() / SINGLE, poison(NAME, value))
        with pytest.raises(CheckpointError, match=f"{NAME} of expert 'a'"):
            describe_task_vectors(bench.zoo.base(), {"a": folder})


class TestFit:
    def test_shape(self, bench: Bench) -> None:
        folder = change(bench.full() / SINGLE, lambda t: t.update({NAME: torch.zeros(64, 31)}))
        pattern = rf"{NAME} has shape \(64, 31\) in expert 'expert-1' and \(64, 32\) in the base"
        bench.refused(CheckpointError, pattern, folder)

    def test_shape_of_a_replaced_module(self, bench: Bench) -> None:
        folder = bench.adapter(target_modules=["q_proj"], modules_to_save=["lm_head"])

        def widen(tensors: dict[str, Tensor]) -> None:
            key = next(key for key in tensors if "lm_head" in key)
            tensors[key] = torch.zeros(97, 32)

        change(folder / ADAPTER, widen)
        pattern = r"97 rows of tokens in lm_head\.weight where the base has 96; choose vocabulary"
        bench.refused(CheckpointError, pattern, folder)

    def test_nothing_in_common(self, bench: Bench) -> None:
        folder = bench.full()
        save_file({"encoder.w": torch.ones(3)}, folder / SINGLE)
        bench.refused(CheckpointError, "no tensor in common with the base .*; give an", folder)

    def test_adapter_with_nothing_in_common(self, bench: Bench) -> None:
        folder = bench.adapter()

        def rename(tensors: dict[str, Tensor]) -> None:
            for key in tuple(tensors):
                tensors[key.replace("model.layers", "transformer.h")] = tensors.pop(key)

        change(folder / ADAPTER, rename)
        bench.refused(CheckpointError, "'adapter-1' .* no tensor in common", folder)

    def test_a_copy_of_the_base(self, bench: Bench) -> None:
        pattern = "Expert 'base' .* changes nothing.*; leave it out"
        bench.refused(CheckpointError, pattern, bench.base(), bench.zoo.full(1))
        bench.refused(CheckpointError, pattern, bench.root / "base", method="average")

    def test_an_adapter_of_zeros(self, bench: Bench) -> None:
        folder = bench.adapter()
        change(
            folder / ADAPTER,
            lambda t: t.update({k: torch.zeros_like(v) for k, v in t.items() if "lora_B" in k}),
        )
        pattern = "Expert 'adapter-1' .* changes nothing"
        bench.refused(CheckpointError, pattern, folder, bench.zoo.adapter(2))
        bench.refused(CheckpointError, pattern, folder, bench.zoo.adapter(2), output="adapter")

    @pytest.mark.parametrize("role", ["base", "expert"])
    def test_quantised_by_its_config(self, bench: Bench, role: str) -> None:
        folder = bench.base() if role == "base" else bench.full()
        change_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
        given = {"base": folder} if role == "base" else {}
        experts = () if role == "base" else (folder,)
        bench.refused(CheckpointError, f"{folder} is quantised .*unquantised", *experts, **given)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
    def test_quantised_by_its_tensors(self, bench: Bench, dtype: torch.dtype) -> None:
        folder = change(bench.full() / SINGLE, lambda t: t.update({NAME: t[NAME].to(dtype)}))
        bench.refused(CheckpointError, f"{NAME} in .* a quantised format; merge the", folder)

    def test_dora(self, bench: Bench) -> None:
        bench.refused(CheckpointError, "use_dora=True.*; merge it", bench.adapter(use_dora=True))

    def test_adapter_with_biases(self, bench: Bench) -> None:
        bench.refused(CheckpointError, "bias='lora_only'.*; merge", bench.adapter(bias="lora_only"))

    def test_a_result_that_does_not_fit_its_dtype(self, bench: Bench) -> None:
        folder = change(bench.full() / SINGLE, poison(NAME, 1e6))
        bench.refused(
            NumericalError,
            f"{NAME} of the merge does not fit into torch.float16",
            folder,
            method="average",
            dtype="float16",
        )


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_experts_of_the_same_bytes_merge_with_a_warning(
    bench: Bench, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = getattr(bench.zoo, kind)(1)
    experts = {"one": source, "other": getattr(bench.zoo, kind)(2), "two": bench.copy(source, "x")}
    report = merge_checkpoints(bench.zoo.base(), experts, bench.out, device="cpu")
    warning = "Experts 'one' and 'two' are equal in all values that were looked at and count twice;"
    assert any(warning in sentence for sentence in report.warnings)
    assert warning in caplog.text
