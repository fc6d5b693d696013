"""The same merge by processes that die, here; none of it shows in the bytes."""

import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from poemerge.errors import CheckpointError, MachineError, SettingError
from poemerge.merge import merge_checkpoints
from poemerge.merging.work import ShardJob, make_shard
from tasks.merge import merge as task
from tasks.runners import open_runner
from tasks.runners.pool import Pool
from tasks.runners.processes import Processes, devices_of
from tasks.runners.worker import Worker
from tests.tasks.sharded import SHARDS, merge, survives, with_a_hole


class TestProcesses:
    def test_a_worker_that_is_killed_is_replaced(
        self, models: Path, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each device has one, and long jobs begin first."""
        begun: list[tuple[str, str]] = []
        real = Worker.begin

        def begin(self: Worker, job: ShardJob) -> None:
            begun.append((self.device, job.file))
            real(self, job)

        monkeypatch.setattr(Worker, "begin", begin)
        survives(models, tmp_path / "out", here, Processes(("cpu", "cpu:0")))
        assert {device for device, _ in begun} == {"cpu", "cpu:0"}
        files = [file for _, file in begun]
        assert len(files) == SHARDS + 1
        assert list(dict.fromkeys(files)) == sorted(set(files))

    def test_workers_that_die_at_every_try_are_given_up(
        self, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = Worker.begin

        def begin(self: Worker, job: ShardJob) -> None:
            real(self, job)
            self._process.kill()

        monkeypatch.setattr(Worker, "begin", begin)
        with pytest.raises(MachineError, match="3 workers died at model-00001"):
            merge(models, tmp_path / "out", Processes(("cpu",)))

    def test_what_is_refused_is_not_tried_again(
        self, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun: list[str] = []
        real = Worker.begin

        def begin(self: Worker, job: ShardJob) -> None:
            begun.append(job.file)
            real(self, job)

        broken = with_a_hole(tmp_path / "hole")
        monkeypatch.setattr(Worker, "begin", begin)
        merging = (
            models / "base",
            {"a": models / "a", "hole": broken},
            tmp_path / "out",
            "average",
        )
        with pytest.raises(CheckpointError) as alone:
            merge_checkpoints(*merging, "cpu")
        with pytest.raises(CheckpointError) as sent:
            merge_checkpoints(*merging, "cpu", runner=Processes(("cpu",)))
        assert str(sent.value) == str(alone.value)
        assert "\n" not in str(sent.value)
        assert begun
        assert len(begun) == len(set(begun))


def test_an_error_in_one_call_ends_the_workers_of_the_others(models: Path, tmp_path: Path) -> None:
    """As Ctrl-C does: nobody waits for what is under way."""
    stopped: list[str] = []

    def run(jobs: Sequence[ShardJob], _: object) -> None:
        def make() -> None:
            try:
                pool.do(jobs[0])
            except MachineError as error:
                stopped.append(str(error))

        def fail() -> None:
            while not multiprocessing.active_children():
                time.sleep(0.01)
            raise ZeroDivisionError

        with Pool(("cpu", "cpu:0"), make_shard) as pool:
            pool.run((make, fail))

    with pytest.raises(ZeroDivisionError):
        merge(models, tmp_path / "out", run)
    assert stopped == [
        "The worker at model-00001-of-00004.safetensors was stopped; run again to go on."
    ]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (("spark", None, None, "cpu"), "choose threads, processes, dask, ray"),
        (("threads", 2, None, "cpu"), "workers is 2, but threads has none"),
        (("dask", 2, "tcp://x:1", "cpu"), "workers is 2, but a cluster has its own"),
        (("processes", None, "tcp://x:1", "cpu"), "runner is processes"),
        (("ray", None, None, "cuda:0,cuda:1"), "say cuda"),
        (("processes", 3, None, "cpu,cpu:0"), "each worker wants a GPU of its own"),
        (("processes", None, None, "cpu,cpu"), "name each once"),
    ],
)
def test_what_does_not_go_together(
    how: tuple[str, int | None, str | None, str], words: str
) -> None:
    runner, workers, address, device = how
    with pytest.raises(SettingError, match=words):
        open_runner(runner, workers, address, device=device)


def test_what_one_runner_made_is_up_to_date_for_another(models: Path, tmp_path: Path) -> None:
    experts = {name: str(models / name) for name in ("a", "b")}
    how = {"method": "average", "settings": {}, "device": "cpu", "dtype": "source", "seed": 0}
    how |= {"memory": None, "vocabulary": "refuse", "foreign": "refuse"}
    merging = (str(models / "base"), experts, str(tmp_path / "out"))
    assert task.fn(*merging, **how, runtime={"runner": "processes"})
    assert not task.fn(*merging, **how, runtime={"runner": "threads"})


def test_each_worker_has_its_device() -> None:
    assert devices_of("cpu", None) == ("cpu",)
    assert devices_of("cpu", 3) == ("cpu",) * 3
    assert devices_of("cuda:0,cuda:1", None) == ("cuda:0", "cuda:1")
    assert devices_of("cuda:0,cuda:1", 2) == ("cuda:0", "cuda:1")
