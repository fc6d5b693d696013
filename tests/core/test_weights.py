"""Who has a say in which tensor: weights by expert and by name, and experts that lack a tensor."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from poemerge.errors import SettingError
from poemerge.merge import merge_checkpoints
from poemerge.method import METHODS
from poemerge.report import MergeReport
from poemerge.settings import Settings
from poemerge.task_vector import DenseStack
from tests.core.stacks import assert_close, update
from tests.core.stacks import merge as solve
from tests.zoo import Zoo

FILE = "model.safetensors"
SEEDS = (1, 2, 3)
SAY = {
    "e1": {"*.mlp.*": 3.0, "*.up_proj.*": 99.0, "*norm*": 0.0},  # the first that fits counts
    "e2": 0.5,
    "e3": {"model.layers.1.*": 2.0},
}


def expected_say(name: str) -> list[float]:
    """SAY spelt out."""
    first = 3.0 if ".mlp." in name else 0.0 if "norm" in name else 1.0
    return [first, 0.5, 2.0 if name.startswith("model.layers.1.") else 1.0]


@pytest.fixture
def experts(zoo: Zoo) -> dict[str, Path]:
    return {f"e{seed}": zoo.full(seed) for seed in SEEDS}


def merge(
    zoo: Zoo, out: Path, experts: dict[str, Path], method: str, **settings: object
) -> MergeReport:
    return merge_checkpoints(zoo.base(), experts, out, method, "cpu", **settings)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / FILE)


def without(folder: Path, to: Path, *parts: str) -> Path:
    """A copy that lacks the tensors with one of `parts` in their name."""
    shutil.copytree(folder, to)
    kept = {n: w for n, w in weights(folder).items() if not any(part in n for part in parts)}
    save_file(kept, to / FILE)
    return to


@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
def test_by_expert_and_pattern_linear(
    zoo: Zoo, tmp_path: Path, experts: dict[str, Path], method: str
) -> None:
    merge(zoo, tmp_path / "out", experts, method, weights=SAY)
    base, *full = (weights(p) for p in (zoo.base(), *experts.values()))
    for name, weight in weights(tmp_path / "out").items():
        say = expected_say(name)
        update_ = sum(w * (e[name] - base[name]) for w, e in zip(say, full, strict=True))
        if method == "average":
            update_ = update_ / sum(say)
        assert_close(weight, base[name] + update_, 1e-6)


@pytest.mark.parametrize("method", ["ties", "gaussian_poe", "cauchy_poe", "student_t_poe"])
def test_by_expert_and_pattern(
    zoo: Zoo, tmp_path: Path, experts: dict[str, Path], method: str
) -> None:
    """Against each tensor merged by itself, with its own say."""
    merge(zoo, tmp_path / "out", experts, method, weights=SAY)
    base, *full = (weights(p) for p in (zoo.base(), *experts.values()))
    merged = weights(tmp_path / "out")
    seen = set()
    for name in base:
        if base[name].ndim != 2:
            continue
        say = expected_say(name)
        seen.add(tuple(say))
        stack = DenseStack(torch.stack([e[name] - base[name] for e in full]).unsqueeze(0))
        found = update(solve(stack, method, say))
        assert_close(merged[name], (base[name] + found).float(), 1e-5)
    assert len(seen) == 4


def test_the_first_pattern_that_fits_counts() -> None:
    settings = Settings.parse({"weights": SAY})
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        assert [settings.weight_of(e, name) for e in ("e1", "e2", "e3")] == expected_say(name)
    assert settings.weight_of("e4", "lm_head.weight") == 1.0
    assert settings.weight_of("e3", "model.layers.10.mlp.weight") == 1.0


@pytest.mark.parametrize("method", METHODS)
def test_a_say_of_nobody_leaves_the_base(
    zoo: Zoo, tmp_path: Path, experts: dict[str, Path], method: str
) -> None:
    nobody = {name: {"*.mlp.*": 0.0} for name in experts}
    merge(zoo, tmp_path / "out", experts, method, weights=nobody)
    base = weights(zoo.base())
    for name, weight in weights(tmp_path / "out").items():
        is_base = torch.equal(weight, base[name])
        # Where experts of noise happen to point apart, Model Stock stays at the base.
        assert is_base if ".mlp." in name else not is_base or method == "model_stock"


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_that_lacks_a_tensor_does_not_vote(
    zoo: Zoo, tmp_path: Path, experts: dict[str, Path], method: str
) -> None:
    """There the merge is that of the others; elsewhere it is as if nothing were missing."""
    lacking = experts | {"e2": without(experts["e2"], tmp_path / "e2", ".mlp.", "norm")}
    two = {name: experts[name] for name in ("e1", "e3")}
    report = merge(zoo, tmp_path / "out", lacking, method)
    merge(zoo, tmp_path / "all", experts, method)
    merge(zoo, tmp_path / "two", two, method)
    merged, everyone, others = (weights(tmp_path / n) for n in ("out", "all", "two"))
    voters = {t.name: t.experts for t in report.tensors}
    for name, weight in merged.items():
        missing = ".mlp." in name or "norm" in name
        assert_close(weight, others[name] if missing else everyone[name], 1e-6)
        assert voters[name] == (("e1", "e3") if missing else ("e1", "e2", "e3"))
    (note,) = [w for w in report.warnings if "lacks" in w]
    assert note.startswith("Expert 'e2' lacks ")
    assert note.endswith(" more; the others decide there.")


@pytest.mark.parametrize("method", METHODS)
def test_what_every_expert_lacks_is_the_base(
    zoo: Zoo, tmp_path: Path, experts: dict[str, Path], method: str
) -> None:
    lacking = {n: without(p, tmp_path / n, "lm_head") for n, p in experts.items()}
    report = merge(zoo, tmp_path / "out", lacking, method)
    name = "lm_head.weight"
    assert torch.equal(weights(tmp_path / "out")[name], weights(zoo.base())[name])
    assert {t.name for t in report.tensors if t.rule == "copy"} == {name}


def test_experts_that_lack_what_has_curvature(zoo: Zoo, tmp_path: Path) -> None:
    """Only those that vote need a tensor's curvature."""
    name = "model.layers.0.mlp.up_proj.weight"
    folders = {"e1": zoo.full(1), "e2": without(zoo.full(2), tmp_path / "e2", name)}
    files = {}
    for expert, held in {"e1": [name], "e2": []}.items():
        files[expert] = str(tmp_path / f"{expert}.safetensors")
        other = "model.layers.1.mlp.up_proj.weight"
        save_file({n: torch.ones(64, 32) for n in [*held, other]}, files[expert])
    report = merge(zoo, tmp_path / "out", folders, "gaussian_poe", preset="fisher", curvature=files)
    rules = {t.name: t.rule for t in report.tensors}
    assert rules[name] == "formula"
    assert_close(weights(tmp_path / "out")[name], weights(zoo.full(1))[name], 1e-6)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"e1": {"*": -1.0}}, "numbers ≥ 0, or to mappings of tensor name patterns"),
        ({"e1": {"*": {"x": 1.0}}}, "give a mapping of expert names"),
        ({"e1": {"*": float("nan")}}, "give a mapping of expert names"),
        ({"e1": True}, "give a mapping of expert names"),
        ({"e4": {"*": 1.0}}, "weights names no expert by 'e4'; use e1, e2, e3"),
        (dict.fromkeys(("e1", "e2", "e3"), 0.0), "gives every expert 0; leave at least one"),
    ],
)
def test_what_is_no_say_is_refused(
    zoo: Zoo, tmp_path: Path, experts: dict[str, Path], value: object, sentence: str
) -> None:
    with pytest.raises(SettingError, match=sentence):
        merge(zoo, tmp_path / "out", experts, "average", weights=value)
    assert not any(tmp_path.iterdir())
