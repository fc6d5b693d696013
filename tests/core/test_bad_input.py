"""What is refused, and how: one sentence that says what, where and what to do; nothing left."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from poemerge.device import pick_device
from poemerge.errors import (
    CheckpointError,
    NumericalError,
    PoemergeError,
    SettingError,
    SourceError,
)
from poemerge.lineage import Lineage
from poemerge.merge import merge_checkpoints
from poemerge.statistics import describe_task_vectors
from tests.zoo import Zoo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
NAME = "model.layers.1.mlp.up_proj.weight"
TERABYTES = 1 << 42


class Bench:
    """Copies of a base and its experts that a test may spoil, and the merge that must refuse."""

    def __init__(self, zoo: Zoo, root: Path) -> None:
        self.zoo, self.root = zoo, root
        self.out = root / "out"

    def base(self, *, sharded: bool = False) -> Path:
        return self.copy(self.zoo.base(sharded=sharded), "base")

    def full(self, seed: int = 1, *, sharded: bool = False) -> Path:
        return self.copy(self.zoo.full(seed, sharded=sharded), f"expert-{seed}")

    def adapter(self, seed: int = 1, **lora: object) -> Path:
        return self.copy(self.zoo.adapter(seed, **lora), f"adapter-{seed}")

    def copy(self, folder: Path, name: str) -> Path:
        return Path(shutil.copytree(folder, self.root / name))

    def merge(self, *experts: Path, base: Path | None = None, **options: object) -> None:
        named = {folder.name: folder for folder in experts} or {"a": self.zoo.full(1)}
        settings = {"method": "cauchy_poe", "out": self.out} | options
        merge_checkpoints(base or self.zoo.base(), named, **settings)

    def refused(
        self,
        error: type[PoemergeError],
        pattern: str,
        *experts: Path,
        base: Path | None = None,
        **options: object,
    ) -> str:
        before = {path.name for path in self.root.iterdir()}
        with pytest.raises(error, match=pattern) as caught:
            self.merge(*experts, base=base, **options)
        assert {path.name for path in self.root.iterdir()} == before
        sentence = str(caught.value)
        assert sentence.endswith(".")
        assert "\n" not in sentence
        assert ";" in sentence, "what to do?"
        return sentence


@pytest.fixture
def bench(zoo: Zoo, tmp_path: Path) -> Bench:
    return Bench(zoo, tmp_path)


def change(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """Rewrite a safetensors file; its folder is returned."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return path.parent


def change_json(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path.parent


def poison(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    def edit(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if name in key)
        tensors[key].flatten()[-1] = value

    return edit


def with_header(folder: Path, header: bytes, body: bytes = b"") -> Path:
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + body)
    return folder


class TestFiles:
    def test_missing_folder(self, bench: Bench) -> None:
        nowhere = bench.root / "nowhere"
        bench.refused(SourceError, "nowhere is not a folder; give a checkpoint", nowhere)
        bench.refused(SourceError, "nowhere is not a folder", base=nowhere)

    def test_a_file_is_no_folder(self, bench: Bench) -> None:
        bench.refused(SourceError, "is not a folder", bench.zoo.full(1) / SINGLE)

    def test_empty_folder(self, bench: Bench) -> None:
        (bench.root / "empty").mkdir()
        bench.refused(SourceError, f"empty holds neither {SINGLE} nor", bench.root / "empty")

    @pytest.mark.parametrize("keep", [0, 5, 100, -1])
    @pytest.mark.parametrize("role", ["base", "expert"])
    def test_truncated(self, bench: Bench, role: str, keep: int) -> None:
        folder = bench.base() if role == "base" else bench.full()
        path = folder / SINGLE
        path.write_bytes(path.read_bytes()[:keep])
        given = {"base": folder} if role == "base" else {}
        experts = () if role == "base" else (folder,)
        pattern = f"{folder.name}/{SINGLE} is no intact safetensors file .*; fetch it again"
        bench.refused(CheckpointError, pattern, *experts, **given)

    def test_truncated_shard(self, bench: Bench) -> None:
        folder = bench.full(sharded=True)
        path = sorted(folder.glob("*.safetensors"))[2]
        path.write_bytes(path.read_bytes()[:-9])
        bench.refused(CheckpointError, f"{path.name} is no intact", folder)

    def test_truncated_adapter(self, bench: Bench) -> None:
        path = bench.adapter() / ADAPTER
        path.write_bytes(path.read_bytes()[:-1])
        bench.refused(CheckpointError, f"{ADAPTER} is no intact safetensors", path.parent)

    @pytest.mark.parametrize(
        "header",
        [
            b"{not json",
            b"\xff\xfe\x00",
            b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
            b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
            b'{"w": {"dtype": "NOPE", "shape": [1], "data_offsets": [0, 4]}}',
        ],
    )
    def test_corrupt_header(self, bench: Bench, header: bytes) -> None:
        folder = with_header(bench.full(), header, bytes(4))
        bench.refused(CheckpointError, "is no intact safetensors file", folder)

    def test_header_that_claims_terabytes(self, bench: Bench) -> None:
        """Of tensors, or of itself: neither is allocated."""
        entry = {"dtype": "F32", "shape": [TERABYTES // 4], "data_offsets": [0, TERABYTES]}
        folder = with_header(bench.full(), json.dumps({NAME: entry}).encode())
        bench.refused(CheckpointError, "is no intact safetensors file", folder)
        (folder / SINGLE).write_bytes(struct.pack("<Q", TERABYTES) + b"{}")
        bench.refused(CheckpointError, "is no intact safetensors file", folder)

    @pytest.mark.parametrize(
        "shard", ["../base/model.safetensors", "/etc/passwd", "sub/model.safetensors"]
    )
    def test_index_that_leaves_its_folder(self, bench: Bench, shard: str) -> None:
        folder = bench.full(sharded=True)
        table = json.loads((folder / INDEX).read_text())["weight_map"]
        change_json(folder / INDEX, weight_map=table | {NAME: shard})
        bench.refused(CheckpointError, f"{INDEX} names {shard}, which is outside", folder)

    def test_index_that_names_a_missing_shard(self, bench: Bench) -> None:
        folder = bench.full(sharded=True)
        shard = sorted(folder.glob("*.safetensors"))[1]
        shard.unlink()
        bench.refused(CheckpointError, rf"{shard.name} is missing \(named in {INDEX}\)", folder)

    def test_index_that_promises_too_much(self, bench: Bench) -> None:
        folder = bench.full(sharded=True)
        table = json.loads((folder / INDEX).read_text())["weight_map"]
        change_json(folder / INDEX, weight_map=table | {"ghost": table[NAME]})
        bench.refused(CheckpointError, f"promises ghost in {table[NAME]}", folder)

    @pytest.mark.parametrize("table", [None, [], {"a": 1}])
    def test_index_without_a_table(self, bench: Bench, table: object) -> None:
        folder = bench.full(sharded=True)
        change_json(folder / INDEX, weight_map=table)
        bench.refused(CheckpointError, f"{INDEX} has no weight_map", folder)

    @pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
    def test_corrupt_config(self, bench: Bench, text: str) -> None:
        for path in (bench.full() / "config.json", bench.adapter() / "adapter_config.json"):
            path.write_bytes(text.encode(errors="surrogateescape"))
            bench.refused(CheckpointError, f"{path.name} is (unreadable|no JSON)", path.parent)

    @pytest.mark.parametrize("text", ["{", "[]", '{"inputs": [{"x": 1}]}', '{"inputs": 3}'])
    def test_corrupt_lineage(self, bench: Bench, text: str) -> None:
        folder = bench.full()
        (folder / "lineage.json").write_text(text)
        bench.refused(SourceError, "lineage.json is .*; delete it to go on", folder)


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
