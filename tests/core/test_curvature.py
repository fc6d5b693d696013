"""Curvature files that cannot be used, and what is said of them: one sentence, nothing left."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from poemerge.curvature import Curvature
from poemerge.errors import CheckpointError, PoemergeError, SettingError, SourceError
from poemerge.lineage import Lineage
from poemerge.merge import merge_checkpoints, merge_lineage
from poemerge.methods import find
from tests.core.stacks import assert_close
from tests.zoo import Zoo

NAME = "model.layers.0.mlp.up_proj.weight"  # (64, 32)
FILE = "model.safetensors"
Edit = Callable[[dict[str, Tensor]], object]


class Bench:
    """Two experts with sound curvature, which a test may spoil, and the merge that must refuse."""

    def __init__(self, zoo: Zoo, root: Path) -> None:
        self.zoo, self.root = zoo, root

    def files(self, precision: str, edit: Edit | None = None) -> dict[str, str]:
        """One a expert; `edit` spoils the second."""
        shape = (64, 32) if precision == "diagonal" else (32, 32)
        given = torch.ones(shape) if precision == "diagonal" else torch.eye(32)
        for name in ("a", "b"):
            tensors = {NAME: given.clone()}
            if name == "b" and edit is not None:
                edit(tensors)
            save_file(tensors, self.root / f"{name}.safetensors")
        return {name: str(self.root / f"{name}.safetensors") for name in ("a", "b")}

    def merge(self, precision: str, curvature: dict[str, str], **options: object) -> object:
        experts = {"a": self.zoo.full(1), "b": self.zoo.full(2)}
        settings = {"precision": precision, "curvature": curvature, "method": "cauchy_poe"}
        return merge_checkpoints(
            self.zoo.base(), experts, self.root / "out", **settings | options, device="cpu"
        )

    def record(self, precision: str, curvature: dict[str, str]) -> Lineage:
        experts = {"a": self.zoo.full(1), "b": self.zoo.full(2)}
        settings = {"precision": precision, "curvature": curvature}
        return merge_lineage(self.zoo.base(), experts, "cauchy_poe", settings, {"device": "cpu"})

    def refused(
        self, error: type[PoemergeError], pattern: str, precision: str, files: dict[str, str]
    ) -> None:
        before = {path.name for path in self.root.iterdir()}
        with pytest.raises(error, match=pattern) as caught:
            self.merge(precision, files)
        assert {path.name for path in self.root.iterdir()} == before
        sentence = str(caught.value)
        assert sentence.endswith(".")
        assert "\n" not in sentence
        assert ";" in sentence, "what to do?"


@pytest.fixture
def bench(zoo: Zoo, tmp_path: Path) -> Bench:
    return Bench(zoo, tmp_path)


@pytest.mark.parametrize("precision", ["diagonal", "activation"])
class TestRefused:
    def test_none_at_all(self, bench: Bench, precision: str) -> None:
        pattern = f"precision {precision} needs the curvature of expert 'a'; name its file"
        bench.refused(SettingError, pattern, precision, {})

    def test_an_expert_without(self, bench: Bench, precision: str) -> None:
        files = bench.files(precision)
        del files["b"]
        bench.refused(SettingError, "needs the curvature of expert 'b'; name", precision, files)

    def test_unknown_expert(self, bench: Bench, precision: str) -> None:
        files = bench.files(precision)
        pattern = "curvature names no expert by 'c'; use a, b"
        bench.refused(SettingError, pattern, precision, files | {"c": files["a"]})

    def test_absent_file(self, bench: Bench, precision: str) -> None:
        files = bench.files(precision) | {"b": str(bench.root / "nowhere.safetensors")}
        pattern = "curvature of expert 'b' is .*nowhere.safetensors, which is no file; mend"
        bench.refused(SettingError, pattern, precision, files)
        with pytest.raises(SourceError, match=r"of b\) cannot be read"):
            bench.record(precision, files)

    def test_no_safetensors(self, bench: Bench, precision: str) -> None:
        files = bench.files(precision)
        Path(files["b"]).write_bytes(b"numpy?")
        pattern = "b.safetensors is no intact safetensors file"
        bench.refused(CheckpointError, pattern, precision, files)

    def test_shape(self, bench: Bench, precision: str) -> None:
        expected = r"\(64, 32\)" if precision == "diagonal" else r"\(32, 32\)"
        files = bench.files(precision, lambda t: t.update({NAME: torch.ones(32, 64)}))
        pattern = rf"{NAME} in a curvature file \(b.safetensors\) .* \(32, 64\) and not {expected}"
        bench.refused(CheckpointError, pattern, precision, files)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, bench: Bench, precision: str, value: float) -> None:
        files = bench.files(precision, lambda t: t[NAME][3, 3].fill_(value))
        pattern = f"{NAME} of the curvature in .*b.safetensors holds NaN or infinite"
        bench.refused(CheckpointError, pattern, precision, files)

    def test_negative(self, bench: Bench, precision: str) -> None:
        files = bench.files(precision, lambda t: t[NAME][3, 3].fill_(-1.0))
        pattern = f"{NAME} of the curvature in .*b.safetensors has negative entries; compute"
        bench.refused(CheckpointError, pattern, precision, files)

    def test_unknown_tensors_only(self, bench: Bench, precision: str) -> None:
        files = bench.files(precision, lambda t: t.update({"x.weight": t.pop(NAME)}))
        pattern = "hold no tensor that every expert changes; give files whose names are the base's"
        bench.refused(SettingError, pattern, precision, files)


@pytest.mark.parametrize("precision", ["gram", "identity"])
def test_curvature_where_none_is_used(bench: Bench, precision: str) -> None:
    pattern = f"curvature is given, but precision {precision} uses none; choose precision diagonal"
    bench.refused(SettingError, pattern, precision, bench.files("activation"))


def test_no_mapping(bench: Bench) -> None:
    for value in (["a.safetensors"], {"a": 1}):
        with pytest.raises(SettingError, match="give a mapping of expert names to files"):
            bench.merge("diagonal", value)


def test_a_tensor_that_one_expert_has_no_curvature_for_is_averaged(bench: Bench) -> None:
    other = "model.layers.1.mlp.up_proj.weight"
    files = bench.files("diagonal", lambda t: t.update({other: torch.ones(64, 32)}))
    report = bench.merge("diagonal", files)
    assert {t.rule for t in report.tensors if t.name != NAME} == {"average"}
    merged = load_file(bench.root / "out" / FILE)[other]
    one, two = (load_file(bench.zoo.full(seed) / FILE)[other] for seed in (1, 2))
    assert_close(merged, (one + two) / 2)


def test_what_the_files_hold_is_in_the_lineage(bench: Bench) -> None:
    """Where they lie is not: the same bytes elsewhere are the same merge."""
    files = bench.files("activation")
    bench.merge("activation", files)
    text = (bench.root / "out/lineage.json").read_text()
    assert str(bench.root) not in text
    assert '"curvature of a"' in text
    assert '"curvature of b"' in text
    before = (bench.root / "out" / FILE).read_bytes()
    doubled = load_file(files["b"])
    save_file({n: 2 * t for n, t in doubled.items()}, files["b"])
    bench.merge("activation", files, overwrite=True)
    assert (bench.root / "out" / FILE).read_bytes() != before
    assert (bench.root / "out/lineage.json").read_text() != text


def test_half_precision_files_are_read(bench: Bench) -> None:
    files = bench.files("activation")
    bench.merge("activation", files)
    before = (bench.root / "out" / FILE).read_bytes()
    for file in files.values():
        save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file)
    bench.merge("activation", files, overwrite=True)
    assert (bench.root / "out" / FILE).read_bytes() == before


def test_files_are_closed(bench: Bench) -> None:
    settings = find("cauchy_poe").settings.parse(
        {"precision": "diagonal", "curvature": bench.files("diagonal")}
    )
    curvature = Curvature(("a", "b"), settings)
    (name,) = curvature._files[0].tensors
    curvature.close()
    with pytest.raises(OSError, match="Bad file"):
        curvature._files[0].read(name)
