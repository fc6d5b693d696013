"""Residuals at a merge: sampled as they are, whatever the files, and nothing where nothing is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from poemerge import describe_residuals, merge_checkpoints
from poemerge.errors import CheckpointError, SettingError
from poemerge.merge import expert_weights
from tests.zoo import Zoo

Describe = Callable[..., dict[str, Any]]
AVERAGE = {"method": "average"}
ALL = 10**6  # more entries than a tiny matrix has
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def updates(base: Path, folder: Path) -> dict[str, Tensor]:
    start = load_file(base / "model.safetensors")
    return {n: w.double() - start[n].double() for n, w in expert_weights(base, folder)}


def residuals(base: Path, experts: dict[str, Path], merged: Path, name: str, side: str) -> Tensor:
    """Every entry of every expert's residual, slow and obvious, in the unit of the page."""
    found, mode = [], updates(base, merged)[name]
    for folder in experts.values():
        update = updates(base, folder)[name]
        gap = mode - update
        residual = update.T @ gap if side == "output" else gap @ update.T
        origin = update.T @ update if side == "output" else update @ update.T
        found.append((residual / origin.square().mean().sqrt()).flatten())
    return torch.cat(found)


@pytest.fixture(scope="module")
def bench(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Describe:
    """Merges, and describes the residuals there; the same merge is made once."""
    root = tmp_path_factory.mktemp("residuals")

    made: dict[str, Path] = {}

    def describe(experts: dict[str, Path], merge: dict[str, Any], **choices: Any) -> dict[str, Any]:
        out = made.setdefault(repr((experts, merge)), root / str(len(made)))
        if not out.exists():
            merge_checkpoints(zoo.base(), experts, out, device="cpu", **merge)
        return describe_residuals(zoo.base(), experts, out, **choices) | {"out": out}

    return describe


@pytest.fixture(scope="module")
def full(zoo: Zoo) -> dict[str, Path]:
    return {"a": zoo.full(1), "b": zoo.full(2), "c": zoo.full(3)}


@pytest.fixture(scope="module")
def adapters(zoo: Zoo) -> dict[str, Path]:
    return {"a": zoo.adapter(1), "b": zoo.adapter(2, r=2)}


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("kind", ["full", "adapters", "merged as an adapter", "mixed"])
def test_all_entries_are_those_of_the_definition(
    bench: Describe, zoo: Zoo, side: str, kind: str
) -> None:
    adapters = {"a": zoo.adapter(1), "b": zoo.adapter(2, r=2)}
    experts = adapters | {"f": zoo.full(1)} if kind == "mixed" else adapters
    experts = {str(n): zoo.full(n) for n in (1, 2, 3)} if kind == "full" else experts
    output = "adapter" if kind == "merged as an adapter" else "full"
    found = bench(experts, AVERAGE | {"output": output}, side=side, sample=ALL)
    out = found.pop("out")
    json.dumps(found, allow_nan=False)
    assert found["side"] == side
    matrices = [n for n, w in updates(zoo.base(), out).items() if w.ndim == 2]
    touched = [n for n in matrices if kind in {"full", "mixed"} or "self_attn" in n]
    assert list(found["tensors"]) == touched
    for name, tensor in found["tensors"].items():
        own = "input" if name in {EMBEDDING, HEAD} else side
        assert tensor["side"] == own
        voting = experts
        if kind == "mixed" and "self_attn" not in name:
            voting = {"f": experts["f"]}
        expected = residuals(zoo.base(), voting, out, name, own).abs()
        assert tensor["entries"] + tensor["zeros"] == len(expected)
        median = float(expected.quantile(0.5, interpolation="higher"))
        assert tensor["scale"] == pytest.approx(median, rel=1e-3)
    pooled = sum(t["entries"] for t in found["tensors"].values() if not t["left_out"])
    assert found["entries"] == pooled


def test_a_sample_tells_what_all_entries_tell(bench: Describe, full: dict[str, Path]) -> None:
    whole, part = bench(full, AVERAGE, sample=ALL), bench(full, AVERAGE, sample=1500)
    assert {t["entries"] for t in part["tensors"].values()} == {1500}
    assert part["nu"] == pytest.approx(whole["nu"], rel=0.2)
    for name, tensor in part["tensors"].items():
        assert tensor["scale"] == pytest.approx(whole["tensors"][name]["scale"], rel=0.15)


def test_seeds_decide_and_order_does_not(bench: Describe, full: dict[str, Path], zoo: Zoo) -> None:
    first, again, other = (bench(full, AVERAGE, sample=600, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first["tensors"][QUERY] != other["tensors"][QUERY]
    out = first.pop("out")
    backwards = dict(reversed(full.items()))
    assert describe_residuals(zoo.base(), backwards, out, sample=600) == first


def test_progress(bench: Describe, adapters: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    bench(adapters, AVERAGE, progress=lambda *at: seen.append(at))
    assert seen == [(done, 8) for done in range(1, 9)]


def test_the_pool_is_standardised(bench: Describe, full: dict[str, Path]) -> None:
    found = bench(full, AVERAGE, sample=ALL)
    edges, density = (torch.tensor(found["histogram"][k]).double() for k in ("edges", "density"))
    below = (density * edges.diff())[edges[1:] <= 1].sum()
    assert float(below) == pytest.approx(0.5, abs=0.05)  # half lies below the median, which is 1
    for fit in found["fits"].values():
        assert len(fit["density"]) == len(density) == len(found["histogram"]["centres"])
    best = torch.tensor(found["fits"][found["best"]]["density"]).double()
    assert float((best * edges.diff()).sum()) == pytest.approx(1, abs=0.02)
    common = density * edges.diff() * found["entries"] > 300
    common &= density > 0.2  # the tail is another matter: diagonals are far larger than the rest
    assert common.sum() > 10
    assert torch.allclose(best[common], density[common], rtol=0.25)


def test_gaussian_task_vectors_disagree_as_gaussians(
    bench: Describe, full: dict[str, Path]
) -> None:
    """Sums over 32 products of independent noise, diagonals apart: nearer Gaussian than Cauchy."""
    found = bench(full, AVERAGE, sample=ALL)
    likelihoods = {name: fit["log_likelihood"] for name, fit in found["fits"].items()}
    assert found["nu"] > 3
    assert likelihoods["gaussian"] > likelihoods["cauchy"] + 0.02


def test_one_expert_far_off_makes_heavy_tails(bench: Describe, zoo: Zoo) -> None:
    """The unit is an expert's own update, so that being far off is not divided away."""
    near = {"a": zoo.full(1), "b": zoo.full(2)}
    calm = bench(near, AVERAGE, sample=ALL)
    merge = AVERAGE | {"weights": {"a": 1.0, "b": 1.0, "c": 0.0}}
    base = zoo.base()
    experts = near | {"c": zoo.full(3, noise=0.0005)}
    out = bench(experts, merge)["out"]
    found = describe_residuals(base, experts, out, sample=ALL)
    assert found["nu"] < 1.5 < calm["nu"]
    assert found["verdict"].startswith(("Cauchy describes", "Student-t with"))
    assert found["fits"]["cauchy"]["log_likelihood"] > found["fits"]["gaussian"]["log_likelihood"]


def test_strength_is_taken_out(bench: Describe, full: dict[str, Path]) -> None:
    whole = bench(full, AVERAGE, sample=ALL)
    half = bench(full, AVERAGE | {"strength": 0.5}, sample=ALL, strength=0.5)
    for name, tensor in whole["tensors"].items():
        assert half["tensors"][name]["scale"] == pytest.approx(tensor["scale"], rel=1e-3)
    as_it_stands = bench(full, AVERAGE | {"strength": 0.5}, sample=ALL)
    assert as_it_stands["tensors"][QUERY]["scale"] > 1.05 * whole["tensors"][QUERY]["scale"]


class TestNothing:
    def check(self, found: dict[str, Any]) -> None:
        found.pop("out", None)
        json.dumps(found, allow_nan=False)
        assert found["verdict"].startswith("There is nothing to fit")
        assert found["entries"] == 0
        assert found["fits"] == {}
        assert found["best"] is found["nu"] is found["tail_index"] is None
        assert all(tensor["left_out"] for tensor in found["tensors"].values())

    def test_one_expert_is_met(self, bench: Describe, zoo: Zoo) -> None:
        self.check(bench({"a": zoo.full(1)}, AVERAGE))
        self.check(bench({"a": zoo.adapter(1)}, AVERAGE))

    def test_an_adapter_as_its_own_merge(self, zoo: Zoo) -> None:
        """Residuals are zeros, bit for bit, but for the rounding of fp64."""
        found = describe_residuals(zoo.base(), {"a": zoo.adapter(1)}, zoo.adapter(1))
        self.check(found)

    def test_an_expert_as_its_own_merge(self, zoo: Zoo) -> None:
        found = describe_residuals(zoo.base(), {"a": zoo.full(1)}, zoo.full(1), sample=ALL)
        assert {tensor["entries"] for tensor in found["tensors"].values()} == {0}
        assert found["zeros"] == sum(tensor["zeros"] for tensor in found["tensors"].values()) > 0
        self.check(found)

    def test_identical_experts_are_met(self, bench: Describe, zoo: Zoo) -> None:
        twins = {"a": zoo.full(1), "b": zoo.full(1), "c": zoo.full(1)}
        self.check(bench(twins, AVERAGE))

    @pytest.mark.parametrize("output", ["full", "adapter"])
    @pytest.mark.parametrize("side", ["output", "input"])
    def test_few_adapters_are_all_met_as_the_ridge_vanishes(
        self,
        bench: Describe,
        adapters: dict[str, Path],
        side: str,
        output: str,
    ) -> None:
        merge = {"method": "gaussian_poe", "side": side, "ridge": 1e-12, "output": output}
        found = bench(adapters, merge, side=side)
        assert {tensor["left_out"] for tensor in found["tensors"].values()} == {"rounding"}
        assert "rounding" in found["verdict"]
        self.check(found)
        kept = bench(adapters, merge | {"ridge": 0.1}, side=side)
        assert {tensor["left_out"] for tensor in kept["tensors"].values()} == {""}

    def test_too_few_entries(self, bench: Describe, full: dict[str, Path]) -> None:
        found = bench(full, AVERAGE, sample=90)
        assert {tensor["left_out"] for tensor in found["tensors"].values()} == {"few entries"}
        self.check(found)


class TestRefusals:
    def test_a_merge_of_another_base(
        self, bench: Describe, full: dict[str, Path], zoo: Zoo, tmp_path: Path
    ) -> None:
        out = bench(full, AVERAGE)["out"]
        other = Path(shutil.copytree(zoo.base(), tmp_path / "other"))
        tensors = load_file(other / "model.safetensors")
        tensors[QUERY][0, 0] += 1
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        with pytest.raises(
            CheckpointError, match=r"was not merged from .*other.*model.safetensors"
        ):
            describe_residuals(other, full, out)
        with pytest.raises(CheckpointError, match=r"another model.safetensors"):
            describe_residuals(zoo.base(sharded=True), full, out)

    def test_a_merge_without_a_record_is_taken(
        self, bench: Describe, full: dict[str, Path], zoo: Zoo, tmp_path: Path
    ) -> None:
        found = bench(full, AVERAGE)
        out = Path(shutil.copytree(found.pop("out"), tmp_path / "out"))
        (out / "lineage.json").unlink()
        assert describe_residuals(zoo.base(), full, out) == found

    @pytest.mark.parametrize(
        ("choices", "sentence"),
        [
            ({"side": "left"}, "side is 'left'; choose output or input"),
            ({"strength": 0.0}, "strength is 0"),
            ({"sample": 0}, "sample is 0; choose 1 or more"),
        ],
    )
    def test_choices(
        self, zoo: Zoo, full: dict[str, Path], choices: dict[str, Any], sentence: str
    ) -> None:
        with pytest.raises(SettingError, match=sentence):
            describe_residuals(zoo.base(), full, zoo.full(1), **choices)

    def test_no_experts(self, zoo: Zoo) -> None:
        with pytest.raises(SettingError, match="No expert is given"):
            describe_residuals(zoo.base(), {}, zoo.full(1))
