"""Tensors in slices and batches, read ahead and written behind: the same bytes, or an error."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from poemerge.errors import (
    CheckpointError,
    MachineError,
    NumericalError,
    SettingError,
    SourceError,
)
from poemerge.merge import merge_checkpoints
from poemerge.merging import memory, shards
from poemerge.merging.memory import OVERHEAD
from poemerge.merging.plan import plan_merge
from poemerge.merging.stream import BEHIND, Behind, ahead
from poemerge.method import METHODS
from poemerge.report import MergeReport
from tests.core.stacks import assert_close
from tests.zoo import Zoo

FILE = "model.safetensors"
LOCAL = ("average", "task_arithmetic", "ties")
NAME = "model.layers.1.mlp.up_proj.weight"


def merge(zoo: Zoo, out: Path, method: str, **options: object) -> MergeReport:
    """A full fine-tune, another in shards, and an adapter that touches some tensors."""
    experts = {"a": zoo.full(1), "b": zoo.full(2, sharded=True), "c": zoo.adapter(3)}
    return merge_checkpoints(zoo.base(), experts, out, method, "cpu", **options)


def limit(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Batches and slices of `size` loaded bytes."""
    monkeypatch.setattr(memory, "SLICE", size)
    monkeypatch.setitem(memory.LIMITS, "cpu", size)


class TestSlices:
    @pytest.mark.parametrize("size", [1, 3000, 20_000])
    @pytest.mark.parametrize("method", LOCAL)
    def test_give_what_whole_tensors_give(
        self, zoo: Zoo, tmp_path: Path, method: str, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """To the byte where products with the weights are exact; else sums may round otherwise."""
        exact = {"weights": {"a": 0.5, "c": 2.0}} if method != "average" else {}
        for settings in ({"strength": 0.5, **exact}, {"weights": {"a": 0.3, "b": 0.7}}):
            with monkeypatch.context() as patch:
                whole = merge(zoo, tmp_path / "whole", method, overwrite=True, **settings)
                limit(patch, size)
                sliced = merge(zoo, tmp_path / "sliced", method, overwrite=True, **settings)
            one, other = (load_file(tmp_path / name / FILE) for name in ("whole", "sliced"))
            for name, weight in one.items():
                if "weights" in exact and settings["weights"] == exact["weights"]:
                    assert torch.equal(other[name], weight)
                assert_close(other[name], weight, 1e-6)
            for a, b in zip(whole.tensors, sliced.tensors, strict=True):
                assert (a.name, a.rule, a.experts) == (b.name, b.rule, b.experts)
                assert a.norms == pytest.approx(b.norms, rel=1e-6)

    def test_are_taken(self, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
        """Or the law above would be about nothing."""
        for size, sliced in {1 << 30: False, 3000: True, 1: True}.items():
            limit(monkeypatch, size)
            with plan_merge(zoo.base(), {"a": zoo.full(1)}, "ties", {}) as plan:
                (group,) = (g for g in plan.groups if NAME in {t.name for t in g.tensors})
                batches = [
                    batch
                    for batch in group.batches(plan.limit(torch.device("cpu")), local=True)
                    if NAME in {info.name for info in batch.tensors}
                ]
            assert (len(batches) > 1) == sliced
            rows = [row for b in batches if b.rows for row in range(*b.rows)]
            assert rows == (list(range(64)) if sliced else [])

    @pytest.mark.parametrize("method", METHODS)
    def test_batches_give_what_larger_ones_give(
        self, zoo: Zoo, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        merge(zoo, tmp_path / "large", method)
        limit(monkeypatch, 1)
        merge(zoo, tmp_path / "small", method)
        small = load_file(tmp_path / "small" / FILE)
        for name, weight in load_file(tmp_path / "large" / FILE).items():
            assert_close(small[name], weight, 1e-6)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_slices_are_cast_and_placed(
        self, zoo: Zoo, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        merge(zoo, tmp_path / "whole", "average", dtype=dtype)
        limit(monkeypatch, 2000)
        merge(zoo, tmp_path / "sliced", "average", dtype=dtype)
        assert (tmp_path / "whole" / FILE).read_bytes() == (tmp_path / "sliced" / FILE).read_bytes()


class TestBudget:
    @pytest.mark.parametrize("method", METHODS)
    def test_changes_no_result(self, zoo: Zoo, tmp_path: Path, method: str) -> None:
        merge(zoo, tmp_path / "free", method)
        merge(zoo, tmp_path / "tight", method, memory=OVERHEAD + (8 << 20))
        tight = load_file(tmp_path / "tight" / FILE)
        for name, weight in load_file(tmp_path / "free" / FILE).items():
            assert_close(tight[name], weight, 1e-6)

    @pytest.mark.parametrize("method", ["cauchy_poe", "average"])
    def test_too_small_is_refused(self, zoo: Zoo, tmp_path: Path, method: str) -> None:
        pattern = r"memory is 0.10 GB, but the largest tensor group needs 0.3\d GB; allow that much"
        with pytest.raises(SettingError, match=pattern) as caught:
            merge(zoo, tmp_path / "out", method, memory=100 << 20)
        assert str(caught.value).endswith(".")
        assert "\n" not in str(caught.value)
        assert not any(tmp_path.iterdir())

    def test_what_is_asked_for_suffices(self, zoo: Zoo) -> None:
        """The amount that a refusal names is no refusal."""
        with plan_merge(zoo.base(), {"a": zoo.full(1), "b": zoo.full(2)}, "ties", {}) as plan:
            with pytest.raises(SettingError) as caught:
                plan.limit(torch.device("cpu"), 1)
            needed = float(str(caught.value).split("needs ")[1].split(" GB")[0])
            assert plan.limit(torch.device("cpu"), int((needed + 0.005) * 1e9)) > 0


class TestAhead:
    @pytest.mark.parametrize("ahead_of_time", [True, False])
    def test_is_in_order_and_one_ahead(self, ahead_of_time: bool) -> None:
        loaded: list[int] = []

        def load(item: int) -> int:
            loaded.append(item)
            return 10 * item

        seen = []
        for item, value in ahead(load, range(5), eager=lambda _: ahead_of_time):
            assert value == 10 * item
            assert len(loaded) <= item + 1 + ahead_of_time
            seen.append(item)
        assert seen == loaded == list(range(5))
        assert list(ahead(load, [], eager=lambda _: True)) == []

    def test_what_waits_for_its_turn_is_in_order_all_the_same(self) -> None:
        items = ahead(lambda item: -item, range(7), eager=lambda item: item % 3 == 0)
        assert list(items) == [(item, -item) for item in range(7)]

    @pytest.mark.parametrize("ahead_of_time", [True, False])
    def test_an_error_comes_where_its_item_would(self, ahead_of_time: bool) -> None:
        def load(item: int) -> int:
            if item == 2:
                raise CheckpointError("two")
            return item

        taken = ahead(load, range(5), eager=lambda _: ahead_of_time)
        assert [next(taken), next(taken)] == [(0, 0), (1, 1)]
        with pytest.raises(CheckpointError, match="two"):
            next(taken)


class TestBehind:
    def test_is_in_order(self) -> None:
        done: list[int] = []
        with Behind() as behind:
            for item in range(20):
                behind.call(done.append, item)
                assert item - len(done) <= BEHIND
        assert done == list(range(20))

    def test_an_error_is_raised_at_the_end_at_the_latest(self) -> None:
        with pytest.raises(OSError, match="disk"), Behind() as behind:
            behind.call(self.fail)

    def test_an_error_is_raised_at_a_later_call(self) -> None:
        made = []

        def go_on() -> None:
            with Behind() as behind:
                for index in range(100):
                    behind.call(self.fail)
                    made.append(index)

        with pytest.raises(OSError, match="disk"):
            go_on()
        assert len(made) <= BEHIND

    def test_the_first_error_wins(self) -> None:
        def fail_too() -> None:
            with Behind() as behind:
                behind.call(self.fail)
                raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            fail_too()

    @staticmethod
    def fail() -> None:
        raise OSError("disk")


class TestFailures:
    """Whatever fails in whichever thread, it is raised here, and nothing is left behind."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        limit(monkeypatch, 3000)

    @pytest.mark.parametrize("method", ["average", "cauchy_poe"])
    @pytest.mark.parametrize("at", [0, 7])
    def test_a_disk_that_is_full(
        self, zoo: Zoo, tmp_path: Path, at: int, method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []

        def write(self: object, name: str, tensor: torch.Tensor, row: int = 0) -> None:
            calls.append(name)
            if len(calls) > at:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(shards.ShardWriter, "write", write)
        with pytest.raises(MachineError, match="No space left on device"):
            merge(zoo, tmp_path / "out", method)
        assert len(calls) > at
        assert not any(tmp_path.iterdir())

    def test_a_disk_that_is_full_at_the_last_tensor(
        self, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = list(merge(zoo, tmp_path / "first", "average").tensors)
        write, seen = shards.ShardWriter.write, set()

        def fail(self: object, name: str, tensor: torch.Tensor, row: int = 0) -> None:
            write(self, name, tensor, row)
            seen.add(name)
            if len(seen) == len(names):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(shards.ShardWriter, "write", fail)
        with pytest.raises(MachineError, match="No space left on device"):
            merge(zoo, tmp_path / "out", "average")
        assert [path.name for path in tmp_path.iterdir()] == ["first"]

    @pytest.mark.parametrize("method", ["average", "ties", "cauchy_poe"])
    @pytest.mark.parametrize("role", ["base", "expert"])
    def test_a_source_that_shrinks(self, zoo: Zoo, tmp_path: Path, role: str, method: str) -> None:
        """While it is open: what its header promised is no longer there."""
        folders = {}
        for name, source in {"base": zoo.base(), "expert": zoo.full(1)}.items():
            folders[name] = tmp_path / name
            folders[name].mkdir()
            save_file(load_file(source / FILE), folders[name] / FILE)
        cut = folders[role] / FILE

        def shrink(done: int, total: int) -> None:
            os.truncate(cut, 5000)

        with pytest.raises(SourceError, match=f"{role}/{FILE} was changed or removed"):
            merge_checkpoints(
                folders["base"],
                {"a": folders["expert"], "b": zoo.full(2)},
                tmp_path / "out",
                method,
                "cpu",
                progress=shrink,
            )
        assert {path.name for path in tmp_path.iterdir()} == {"base", "expert"}

    def test_a_value_that_does_not_fit_its_dtype(self, zoo: Zoo, tmp_path: Path) -> None:
        with pytest.raises(NumericalError, match=r"does not fit into torch\.float16"):
            merge(zoo, tmp_path / "out", "task_arithmetic", dtype="float16", strength=1e8)
        assert not any(tmp_path.iterdir())

    def test_progress_that_raises(self, zoo: Zoo, tmp_path: Path) -> None:
        """As Ctrl-C does."""

        def stop(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            merge(zoo, tmp_path / "out", "average", progress=stop)
        assert not any(tmp_path.iterdir())
