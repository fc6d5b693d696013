"""The same merge by every runner, with workers that die; none of it shows in the bytes."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from poemerge.atomic import write_json
from poemerge.errors import CheckpointError, MachineError, SettingError
from poemerge.hashing import hash_files
from poemerge.layout import INDEX, RECORD
from poemerge.merge import merge_checkpoints
from poemerge.merging.head import Runner
from poemerge.merging.work import ShardJob, make_shard
from tasks.merge import merge as task
from tasks.runners import open_runner
from tasks.runners.pool import Pool
from tasks.runners.processes import Processes, devices_of
from tasks.runners.worker import Worker

SHARDS, SIDE = 4, 512
PYTHON = (sys.executable, "-m")


def write_model(folder: Path, seed: int, noise: float) -> Path:
    """Shards of a small matrix, and then a large one: long enough to be caught at it."""
    start, moved = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    folder.mkdir()
    placed = {}
    for shard in range(1, SHARDS + 1):
        file = f"model-{shard:05}-of-{SHARDS:05}.safetensors"
        shapes = {"a_small": (8, SIDE), "b_large": (SIDE, SIDE)}
        names = {f"layers.{shard}.{name}.weight": shape for name, shape in shapes.items()}
        weights = {n: torch.randn(shape, generator=start) for n, shape in names.items()}
        weights = {n: w + noise * torch.randn(w.shape, generator=moved) for n, w in weights.items()}
        save_file(weights, folder / file)
        placed |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": placed})
    write_json(folder / "config.json", {"model_type": "llama"})
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 1), ("a", 2), ("b", 3)):
        write_model(root / name, seed, 0.01 * (name != "base"))
    return root


def merge(models: Path, out: Path, runner: Runner | None, device: str = "cpu") -> None:
    experts = {name: models / name for name in ("a", "b")}
    merge_checkpoints(models / "base", experts, out, "cauchy_poe", device, runner=runner)


@pytest.fixture(scope="module")
def here(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this process makes alone."""
    out = tmp_path_factory.mktemp("here") / "out"
    merge(models, out, None)
    return out


def same(one: Path, other: Path) -> bool:
    records = [(folder / RECORD).read_bytes() for folder in (one, other)]
    return hash_files(one) == hash_files(other) and records[0] == records[1]


@contextmanager
def killing(folder: Path) -> Iterator[list[int]]:
    """Kill the first process that writes a shard into `folder`, while it does."""
    killed: list[int] = []
    over = threading.Event()

    def hunt() -> None:
        while not (killed or over.is_set()):
            for path in folder.glob("*.safetensors.*.partial"):
                killed.extend(_kill_who_writes(path))
            time.sleep(0.002)

    hunter = threading.Thread(target=hunt)
    hunter.start()
    try:
        yield killed
    finally:
        over.set()
        hunter.join()


def _kill_who_writes(path: Path) -> list[int]:
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # it is closed by now, or not ours to see
            if str(handle.readlink()) == str(path):
                process = int(handle.parts[2])
                assert process != os.getpid()
                os.kill(process, signal.SIGKILL)
                return [process]
    return []


def survives(models: Path, out: Path, here: Path, runner: Runner | None) -> None:
    with killing(out.with_name("out.partial")) as killed:
        merge(models, out, runner)
    assert len(killed) == 1
    assert same(out, here)


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

        broken = _with_a_hole(tmp_path / "hole")
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


def _with_a_hole(folder: Path) -> Path:
    """An expert with one value that is no number, where the head does not look."""
    write_model(folder, 4, 0.01)
    file = max(folder.glob("*.safetensors"))
    weights = load_file(file)
    weights[max(weights)][1, 1] = float("nan")
    save_file(weights, file)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a cluster of three workers, each a process of its own."""
    folder = tmp_path_factory.mktemp("dask")
    found = folder / "scheduler.json"
    how = ["--no-dashboard", "--scheduler-file", str(found)]
    local = ["--host", "127.0.0.1"]
    commands = [["scheduler", *local, "--port", "0", *how]]
    commands += [["worker", *local, "--no-nanny", "--nthreads", "1", *how]] * 3
    log = (folder / "log").open("wb")
    started = [
        subprocess.Popen(
            [*PYTHON, "dask", *command], stdout=log, stderr=log, cwd=folder, env=_environment()
        )
        for command in commands
    ]
    try:
        deadline = time.monotonic() + 120
        while not found.exists() or not found.read_text():
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield json.loads(found.read_text())["address"]
    finally:
        for process in started:
            process.kill()
            process.wait()
        log.close()


def _environment() -> dict[str, str]:
    """Workers find the very code that is tested."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


class TestDask:
    def test_a_cluster_of_which_one_worker_is_killed(
        self, models: Path, here: Path, tmp_path: Path, cluster: str
    ) -> None:
        runner = open_runner("dask", address=cluster, device="cpu")
        survives(models, tmp_path / "out", here, runner)

    def test_a_refusal_is_its_own_sentence(
        self, models: Path, tmp_path: Path, cluster: str
    ) -> None:
        merging = (models / "base", {"hole": _with_a_hole(tmp_path / "hole")}, tmp_path / "out")
        with pytest.raises(CheckpointError) as alone:
            merge_checkpoints(*merging, "average", "cpu")
        runner = open_runner("dask", address=cluster, device="cpu")
        with pytest.raises(CheckpointError) as sent:
            merge_checkpoints(*merging, "average", "cpu", runner=runner)
        assert str(sent.value) == str(alone.value)

    @pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
    def test_a_listener_that_is_no_scheduler(
        self, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: bytes
    ) -> None:
        """One that speaks another language, and one that never says a word."""

        def answer() -> None:
            with suppress(OSError):  # it is closed
                while True:
                    callers.append(listener.accept()[0])
                    callers[-1].sendall(says)

        callers: list[socket.socket] = []
        monkeypatch.setattr("tasks.runners.on_dask.ANSWER", 2)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=answer, daemon=True).start()
            url = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
            with pytest.raises(SettingError, match=f"No scheduler of Dask answers at {url}"):
                merge(models, tmp_path / "out", open_runner("dask", None, url, device="cpu"))


class TestRay:
    def test_workers_here_of_which_one_is_killed(
        self, models: Path, here: Path, tmp_path: Path
    ) -> None:
        survives(models, tmp_path / "out", here, open_runner("ray", 2, device="cpu"))


@pytest.mark.parametrize(
    ("runner", "address"),
    [("dask", "tcp://127.0.0.1:9"), ("ray", "127.0.0.1:9"), ("ray", "ray://127.0.0.1:9")],
)
def test_no_cluster_is_there(models: Path, tmp_path: Path, runner: str, address: str) -> None:
    with pytest.raises(SettingError, match=f"No cluster answers at {address} .*refused"):
        merge(models, tmp_path / "out", open_runner(runner, None, address, device="cpu"))


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
