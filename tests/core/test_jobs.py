"""A merge as jobs: nothing is lost, nothing counted twice, and workers are kept busy."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poemerge.errors import SettingError
from poemerge.ghosts import adapter_expert, full_expert, in_shards, write_ghost
from poemerge.merge import merge_checkpoints
from poemerge.merging.cost import Cost
from poemerge.merging.jobs import Job, Schedule, jobs
from poemerge.merging.plan import plan_merge
from poemerge.merging.rates import Rates
from poemerge.merging.terms import HEADERS
from tests.zoo import Zoo

UNIT = Rates(1.0, float("inf"), 1.0, 1.0, 1.0)
lengths = st.lists(st.integers(1, 20), min_size=1, max_size=6)


def _jobs(seconds: list[int]) -> list[Job]:
    return [Job(f"{i:02}", (), Cost(single=s)) for i, s in enumerate(seconds)]


@given(lengths, st.integers(1, 4))
def test_every_job_has_one_worker_and_the_end_is_near_the_best(
    seconds: list[int], workers: int
) -> None:
    made = Schedule.balanced(_jobs(seconds), UNIT, workers)
    assert sorted(job.file for load in made.loads for job in load) == [
        job.file for job in _jobs(seconds)
    ]
    best = min(
        max(sum(s for s, w in zip(seconds, spread, strict=True) if w == n) for n in range(workers))
        for spread in itertools.product(range(workers), repeat=len(seconds))
    )
    assert best <= made.seconds <= best * (4 / 3 - 1 / (3 * workers)) + 1e-9
    assert made.busy == pytest.approx(sum(seconds) / (workers * made.seconds))


def test_overhead_is_for_each_job_and_storage_is_shared() -> None:
    made = Schedule.balanced(_jobs([3, 2, 1]), UNIT, workers=2, overhead=1.0)
    assert made.seconds == 5.0
    assert UNIT.sharing(0.5, workers=2).bandwidth == 0.25
    assert UNIT.sharing(8.0, workers=2).bandwidth == 1.0
    reading = Schedule.balanced([Job("a", (), Cost(read=8.0, single=4.0))], UNIT, 1)
    assert (reading.seconds, reading.bottleneck) == (12.0, "reading")


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_jobs_read_and_write_every_byte_once(zoo: Zoo, tmp_path: Path, kind: str) -> None:
    base = zoo.base("bfloat16", sharded=True)
    experts = {f"e{i}": getattr(zoo, kind)(i, "bfloat16") for i in (1, 2)}
    with plan_merge(base, experts, "cauchy_poe", {}) as plan:
        found = jobs(plan)
        tensors = [info for job in found for group in job.groups for info in group.tensors]
        assert {info.file for info in tensors} == {job.file for job in found}
        assert {info.name for info in tensors} == set(plan.base.tensors)
        sizes = [info.bytes for e in plan.experts for info in _own(e).tensors.values()]
        size = sum(info.bytes for info in plan.base.tensors.values())
        total = Cost.sum(job.cost for job in found)
    assert total.read == size + sum(sizes)
    merge_checkpoints(base, experts, tmp_path / "out", "cauchy_poe")
    assert total.written == sum(
        path.stat().st_size - _header(path) for path in (tmp_path / "out").glob("*.safetensors")
    )


def _own(expert) -> object:  # noqa: ANN001
    return expert.adapter if hasattr(expert, "adapter") else expert._checkpoint


def _header(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_headers_alone_give_the_plan_of_the_real_thing(zoo: Zoo, tmp_path: Path) -> None:
    base = zoo.base("bfloat16")
    full = full_expert(base, tmp_path / "full")
    lora = adapter_expert(base, tmp_path / "lora", rank=2)
    assert sum(path.stat().st_blocks for path in full.glob("*.safetensors")) * 512 <= 16384
    real = {"full": zoo.full(1, "bfloat16")}
    for method in ("cauchy_poe", "ties"):
        with (
            plan_merge(base, real, method, {}) as one,
            plan_merge(base, {"full": full}, method, {}, HEADERS) as other,
        ):
            assert one.groups == other.groups
            assert [job.cost for job in jobs(one)] == [job.cost for job in jobs(other)]
    with plan_merge(base, {"lora": lora}, "cauchy_poe", {}, HEADERS) as plan:
        matrices = [group for group in plan.groups if group.rule == "matrix"]
        assert {group.ranks for group in matrices} == {(2,)}
        assert {group.rule for group in plan.groups} == {"matrix", "copy"}


def test_shards_are_as_large_as_they_may_be(tmp_path: Path) -> None:
    layout = {f"w{i}": ((size, 10), torch.float32) for i, size in enumerate((2, 3, 9, 1))}
    files = in_shards(layout, limit=200)
    assert [list(names) for names in files.values()] == [["w0", "w1"], ["w2"], ["w3"]]
    ghost = write_ghost(tmp_path / "ghost", files, {"vocab_size": 9})
    with plan_merge(ghost, {"same": ghost}, "average", {}, HEADERS) as plan:
        assert [job.file for job in jobs(plan)] == list(files)
    assert list(in_shards(layout)) == ["model.safetensors"]


def test_a_budget_that_is_too_small_is_refused(zoo: Zoo) -> None:
    with (
        plan_merge(zoo.base(), {"a": zoo.full(1)}, "cauchy_poe", {}) as plan,
        pytest.raises(SettingError, match="the largest tensor group needs"),
    ):
        plan.peak_bytes(budget=1)
