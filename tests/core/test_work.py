"""Shards made as jobs: the same bytes wherever and in whatever order, and nothing is believed."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from poemerge.errors import MachineError, PoemergeError, SettingError, SourceError
from poemerge.hashing import hash_files
from poemerge.layout import RECORD
from poemerge.merge import merge_checkpoints
from poemerge.merging.cost import Cost
from poemerge.merging.jobs import Job, longest_first
from poemerge.merging.rates import NOMINAL
from poemerge.merging.shards import Shard
from poemerge.merging.work import ShardJob, make_shard
from tests.zoo import Zoo

Done = Callable[[Shard], None]


def merge(zoo: Zoo, out: Path, runner: object = None, **options: object) -> None:
    experts = {"a": zoo.full(1), "b": zoo.adapter(2)}
    merge_checkpoints(zoo.base(sharded=True), experts, out, device="cpu", runner=runner, **options)


def backwards(jobs: Sequence[ShardJob], done: Done) -> None:
    """Every job as it would come to another process, the last one first."""
    for job in reversed(jobs):
        done(pickle.loads(pickle.dumps(make_shard(pickle.loads(pickle.dumps(job))))))


def same(one: Path, other: Path) -> bool:
    return hash_files(one) == hash_files(other) and _record(one) == _record(other)


def _record(folder: Path) -> bytes:
    return (folder / RECORD).read_bytes()


@pytest.mark.parametrize("method", ["cauchy_poe", "ties", "dare_ties"])
def test_jobs_make_the_bytes_of_one_process(zoo: Zoo, tmp_path: Path, method: str) -> None:
    told: list[tuple[int, int]] = []
    merge(zoo, tmp_path / "here", method=method)
    merge(
        zoo,
        tmp_path / "jobs",
        backwards,
        method=method,
        progress=lambda done, total: told.append((done, total)),
    )
    assert same(tmp_path / "jobs", tmp_path / "here")
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]


def test_a_job_is_small_and_relative_paths_are_of_the_head(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(jobs: Sequence[ShardJob], done: Done) -> None:
        assert max(len(pickle.dumps(job)) for job in jobs) < 4096
        with monkeypatch.context() as patch:
            patch.chdir("/")
            made = [make_shard(job) for job in jobs]
        for shard in made:
            done(shard)

    monkeypatch.chdir(tmp_path)
    merge(zoo, Path("out"), elsewhere)
    merge(zoo, Path("here"))
    assert same(Path("out"), Path("here"))


@pytest.mark.parametrize("first", [None, backwards])
def test_what_one_runner_finished_another_keeps(zoo: Zoo, tmp_path: Path, first: object) -> None:
    def stop(done: int, total: int) -> None:
        if done >= 15:
            raise KeyboardInterrupt

    given: list[str] = []

    def second(jobs: Sequence[ShardJob], done: Done) -> None:
        given.extend(job.file for job in jobs)
        backwards(jobs, done)

    with pytest.raises(KeyboardInterrupt):
        merge(zoo, tmp_path / "out", first, progress=stop)
    kept = {path.name for path in (tmp_path / "out.partial").glob("*.safetensors")}
    assert len(kept) > 1
    merge(zoo, tmp_path / "out", second)
    merge(zoo, tmp_path / "here")
    files = {path.name for path in (tmp_path / "here").glob("*.safetensors")}
    assert set(given) == files - kept
    assert same(tmp_path / "out", tmp_path / "here")


def test_what_a_worker_left_that_died_is_cleared_away(zoo: Zoo, tmp_path: Path) -> None:
    def dying(jobs: Sequence[ShardJob], done: Done) -> None:
        (jobs[0].folder / f"{jobs[0].file}.0123abcd.partial").write_bytes(b"half")
        backwards(jobs, done)

    merge(zoo, tmp_path / "out", dying)
    merge(zoo, tmp_path / "here")
    assert same(tmp_path / "out", tmp_path / "here")


def _lose(folder: Path, shard: Shard) -> Shard:
    (folder / shard.file).unlink()
    return shard


def _spoil(folder: Path, shard: Shard) -> Shard:
    data = (folder / shard.file).read_bytes()
    (folder / shard.file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return shard


@pytest.mark.parametrize(
    ("harm", "sentence"), [(_lose, "not to be seen"), (_spoil, "not as a worker has made it")]
)
def test_a_shard_that_does_not_arrive_as_it_was_made_is_refused(
    zoo: Zoo, tmp_path: Path, harm: Callable[[Path, Shard], Shard], sentence: str
) -> None:
    def runner(jobs: Sequence[ShardJob], done: Done) -> None:
        done(harm(jobs[0].folder, make_shard(jobs[0])))

    with pytest.raises(MachineError, match=sentence):
        merge(zoo, tmp_path / "out", runner)
    assert not (tmp_path / "out").exists()


def test_a_worker_of_an_earlier_merge_that_is_late_is_noticed(zoo: Zoo, tmp_path: Path) -> None:
    def runner(jobs: Sequence[ShardJob], done: Done) -> None:
        backwards(jobs, done)
        other = replace(jobs[0], recipe=replace(jobs[0].recipe, settings={"epsilon": 0.5}))
        make_shard(other)

    with pytest.raises(MachineError, match="not as a worker has made it"):
        merge(zoo, tmp_path / "out", runner)


def test_a_worker_that_would_make_other_bytes_says_so(zoo: Zoo, tmp_path: Path) -> None:
    found: list[ShardJob] = []

    def keep(jobs: Sequence[ShardJob], done: Done) -> None:
        found.extend(jobs)
        raise KeyboardInterrupt

    def refusal(job: ShardJob, kind: type[PoemergeError]) -> str:
        with pytest.raises(kind) as caught:
            make_shard(job)
        return str(caught.value)

    with pytest.raises(KeyboardInterrupt):
        merge(zoo, tmp_path / "out", keep)
    job = replace(found[0], folder=tmp_path)
    text = refusal(replace(job, maker={**job.maker, "torch": "1.0"}), MachineError)
    assert "where the merge is recorded with 1.0" in text
    gone = tmp_path / "gone"
    assert f"does not see {gone}" in refusal(replace(job, folder=gone), SourceError)
    assert "cuda:7" in refusal(job.on("cuda:7"), SettingError)


def test_what_cannot_be_divided_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="made in one process"):
        merge(zoo, tmp_path / "out", backwards, samples=1)
    with pytest.raises(SettingError, match="one process merges on one device"):
        merge_checkpoints(zoo.base(), {"a": zoo.full(1)}, tmp_path / "out", device="cpu,cuda:0")
    assert not any(tmp_path.iterdir())


def test_the_longest_job_is_begun_first() -> None:
    jobs = [Job(name, (), Cost(read=size)) for name, size in zip("abcd", (1, 4, 2, 4), strict=True)]
    assert [job.file for job in longest_first(jobs, NOMINAL)] == ["b", "d", "c", "a"]
