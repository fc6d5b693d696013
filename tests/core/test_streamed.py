"""Experts that come one by one give the answer of experts that are held all at once."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import poemerge
from poemerge.errors import CheckpointError
from poemerge.merge import merge_checkpoints
from poemerge.merging import memory
from poemerge.merging.memory import OVERHEAD
from poemerge.merging.plan import plan_merge
from poemerge.method import Call
from poemerge.methods import find
from poemerge.poe import pieces
from poemerge.poe.certificate import TRUSTED_ERROR
from poemerge.task_vector import DenseStack, LowRankStack, StreamedStack

EXPERTS = 5


def _updates(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    torch.manual_seed(0)
    sizes = torch.linspace(0.3, 3.0, EXPERTS).view(-1, 1, 1)
    return (sizes * torch.randn(EXPERTS, rows, columns)).to(dtype)


def _stream(updates: torch.Tensor) -> tuple[StreamedStack, list[int]]:
    asked: list[int] = []

    def read(index: int) -> torch.Tensor:
        asked.append(index)
        return updates[index]

    return StreamedStack(read, len(updates), tuple(updates.shape[1:]), updates.dtype), asked


CALL = Call(torch.tensor([[1.0, 0.5, 2.0, 1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("method", ["gaussian_poe", "cauchy_poe", "student_t_poe"])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (12, 12)])
def test_the_answer_is_that_of_all_at_once(method: str, side: str, shape: tuple[int, int]) -> None:
    found = find(method)
    options = {"side": side} if method == "gaussian_poe" else {"side": side, "rtol": 1e-9}
    settings = found.settings.parse(options)
    updates = _updates(*shape)
    held = found.merge(DenseStack(updates[None]), settings, CALL)
    stream, asked = _stream(updates)
    streamed = found.merge(stream, settings, CALL)
    scale = held.update.norm()
    gap = torch.linalg.norm(streamed.update.dense() - held.update.dense()) / scale
    assert gap < 1e-8
    one, other = held.certificates[0], streamed.certificates[0]
    assert other["converged"]
    assert one["weights"] == pytest.approx(other["weights"], rel=1e-6)
    assert one["condition"] == pytest.approx(other["condition"], rel=0.2)
    assert other["residual"] < 1e-8
    passes = len(asked) / EXPERTS
    assert passes == int(passes)  # whole passes over the experts, and no more than ...
    assert passes <= 6 + 2 * (other["steps"] + 1)  # ... two for each step, and a few around them


@pytest.mark.parametrize("scale", ["paper", "equivariant", "estimated"])
def test_in_fp32_the_error_is_within_what_the_condition_says(scale: str) -> None:
    found = find("cauchy_poe")
    settings = found.settings.parse({"scale": scale})
    updates = _updates(400, 500, torch.float32)
    exact = found.merge(DenseStack(updates[None].double()), settings, CALL).update.dense()
    stream, _ = _stream(updates)
    merged = found.merge(stream, settings, CALL)
    assert merged.certificates[0]["dtype"] == "float32"
    bound = merged.certificates[0]["condition"] * torch.finfo(torch.float32).eps
    gap = torch.linalg.norm(merged.update.dense() - exact) / torch.linalg.norm(exact)
    assert gap < bound < TRUSTED_ERROR


def test_what_fp32_cannot_solve_is_solved_in_fp64() -> None:
    found = find("gaussian_poe")
    settings = found.settings.parse({"ridge": 1e-9})
    thin = _updates(300, 4, torch.float32) @ torch.randn(EXPERTS, 4, 300)
    stream, _ = _stream(thin)
    merged = found.merge(stream, settings, CALL)
    assert merged.certificates[0]["dtype"] == "float64"
    held = found.merge(DenseStack(thin[None]), settings, CALL)
    torch.testing.assert_close(merged.update.dense(), held.update.dense(), rtol=1e-4, atol=1e-6)


def test_many_factors_are_not_held_multiplied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    ups = tuple(torch.randn(1, 20, 2) for _ in range(EXPERTS))
    downs = tuple(torch.randn(1, 2, 30) for _ in range(EXPERTS))
    stack, found = LowRankStack(ups, downs), find("cauchy_poe")
    settings = found.settings.parse({"rtol": 1e-9})
    held = found.merge(stack, settings, CALL)
    assert stack.reduced_bytes(True, True) == 8 * EXPERTS * 10 * 10
    monkeypatch.setattr(pieces, "HELD", 8 * EXPERTS * 10 * 10 - 1)
    streamed = found.merge(stack, settings, CALL)
    torch.testing.assert_close(streamed.update.dense(), held.update.dense(), rtol=1e-7, atol=1e-8)
    assert type(streamed.update) is type(held.update)
    monkeypatch.setattr(LowRankStack, "streamed", None)  # a batch of two is held all the same
    both = LowRankStack(
        tuple(u.repeat(2, 1, 1) for u in ups), tuple(d.repeat(2, 1, 1) for d in downs)
    )
    twice = replace(CALL, weights=CALL.weights.repeat(2, 1))
    found.merge(both, settings, twice)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A base with two matrices and a vector, and 40 full fine-tunes of it."""
    root = tmp_path_factory.mktemp("many")
    shapes = {"a.weight": (300, 500), "lm_head.weight": (900, 300), "norm.weight": (300,)}
    folders = {}
    base = {
        n: torch.randn(s, generator=torch.Generator().manual_seed(0)) for n, s in shapes.items()
    }
    for seed in range(41):
        generator = torch.Generator().manual_seed(seed)
        folder = folders[f"e{seed:02}"] = root / f"e{seed:02}"
        folder.mkdir()
        moved = {
            n: b + (0.1 if seed else 0) * torch.randn(b.shape, generator=generator)
            for n, b in base.items()
        }
        save_file(moved, folder / "model.safetensors")
    return folders.pop("e00"), folders


@pytest.mark.parametrize("method", ["gaussian_poe", "cauchy_poe"])
def test_a_merge_streams_what_does_not_fit(
    many: tuple[Path, dict[str, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    base, experts = many
    merge_checkpoints(base, experts, tmp_path / "held", method)
    monkeypatch.setitem(memory.ROOM, "cpu", 16 << 20)
    with plan_merge(base, experts, method, {}) as plan:
        fitted = plan.fitted(torch.device("cpu"))
    rules = {group.rule: group.streamed for group in fitted.groups}
    assert rules == {"matrix": True, "vocabulary": True, "average": False}
    report = merge_checkpoints(base, experts, tmp_path / "streamed", method)
    assert "The experts of a.weight and 1 more do not fit in memory together" in str(
        report.warnings
    )
    held, streamed = (load_file(tmp_path / n / "model.safetensors") for n in ("held", "streamed"))
    for name, weight in held.items():
        gap = torch.linalg.norm(streamed[name] - weight)
        assert gap < 1e-3 * torch.linalg.norm(weight - load_file(base / "model.safetensors")[name])


def test_what_was_fitted_before_is_fitted_alike(
    many: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = set()
    with plan_merge(*many, "cauchy_poe", {}) as plan:
        for room in range(16, 28):
            monkeypatch.setitem(memory.ROOM, "cpu", 1 << room)
            fitted = plan.fitted(torch.device("cpu"))
            assert fitted.fitted(torch.device("cpu")).groups == fitted.groups
            found.add(tuple(group.streamed for group in fitted.groups))
    assert len(found) > 1


def test_a_broken_expert_is_named_when_streamed_too(
    many: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = many
    broken = load_file(experts["e07"] / "model.safetensors")
    broken["a.weight"][3, 4] = torch.nan
    (tmp_path / "e07").mkdir()
    save_file(broken, tmp_path / "e07/model.safetensors")
    monkeypatch.setitem(memory.ROOM, "cpu", 16 << 20)
    given = experts | {"e07": tmp_path / "e07"}
    with pytest.raises(CheckpointError, match=r"a\.weight of expert 'e07' .* holds NaN"):
        merge_checkpoints(base, given, tmp_path / "out", "gaussian_poe")


PROBE = """
import json, sys
from pathlib import Path
from poemerge.merge import merge_checkpoints
from poemerge.merging.plan import plan_merge

folders, budget, count = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
base, *experts = folders[: count + 1]
names = {Path(f).name: Path(f) for f in experts}
with plan_merge(Path(base), names, "gaussian_poe", {}) as plan:
    import torch
    planned = plan.peak_bytes(budget=budget)
merge_checkpoints(base, names, sys.argv[4], "gaussian_poe", "cpu", memory=budget)
lines = Path("/proc/self/status").read_text().splitlines()
print(json.dumps([planned, *(int(l.split()[1]) << 10 for l in lines if l.startswith("VmHWM"))]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
def test_a_budget_holds_however_many_experts(
    many: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, experts = many
    budget = OVERHEAD + (48 << 20)
    folders = json.dumps([str(base), *map(str, experts.values())])
    peaks = []
    for count in (10, 40):
        told = subprocess.run(
            [sys.executable, "-c", PROBE, folders, str(budget), str(count), tmp_path / f"{count}"],
            cwd=Path(poemerge.__file__).parents[1],
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
            capture_output=True,
            text=True,
            check=True,
        )
        planned, peak = json.loads(told.stdout)
        assert planned <= budget
        assert peak <= budget
        peaks.append(peak)
    assert peaks[1] < peaks[0] + (16 << 20)  # four times the experts
