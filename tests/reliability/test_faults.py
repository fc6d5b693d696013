"""A machine that gives out in the midst of a merge: disk, sources, memory."""

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from flows.cli import main
from poemerge.atomic import PARTIAL
from poemerge.errors import MachineError, SourceError
from poemerge.hashing import hash_files
from poemerge.layout import FINISHED
from poemerge.merge import merge_checkpoints
from poemerge.method import METHODS, Call
from poemerge.task_vector import Stack
from tests.core.stacks import assert_close
from tests.reliability.trials import Trials
from tests.zoo import Zoo

METHOD = "gaussian_poe"
ENOUGH = 8 << 20  # bytes
EXPERTS = ("a", "b")


@pytest.fixture
def sources(zoo: Zoo, tmp_path: Path) -> Path:
    """Copies of a base and two full fine-tunes, in shards."""
    folder = tmp_path / "sources"
    made = (zoo.base(sharded=True), zoo.full(1, sharded=True), zoo.full(2, sharded=True))
    for name, model in zip(("base", *EXPERTS), made, strict=True):
        shutil.copytree(model, folder / name)
    return folder


def merge(sources: Path, out: Path, **options: Any) -> Any:
    experts = {name: sources / name for name in EXPERTS}
    return merge_checkpoints(sources / "base", experts, out, METHOD, "cpu", **options)


def merge_by_command(sources: Path, out: Path) -> Result:
    given = [word for name in EXPERTS for word in ("--expert", f"{name}={sources / name}")]
    words = ["merge", "--base", sources / "base", *given, "--method", METHOD, "--device", "cpu"]
    return CliRunner().invoke(main, [*map(os.fspath, words), "--out", os.fspath(out)])


def assert_refused(result: Result, *words: str) -> None:
    """One sentence, exit code 1."""
    assert result.exit_code == 1, result.output
    assert result.stderr.count("error: ") == 1
    sentence = result.stderr.rpartition("error: ")[2]
    assert sentence.count("\n") == 1
    assert all(word in sentence for word in words), sentence


def finished(out: Path) -> set[str]:
    """Shards of an unfinished merge; there is nothing beside them but their records."""
    partial = out.with_name(out.name + PARTIAL)
    shards = {path.name for path in partial.glob("*.safetensors")}
    records = {path.stem for path in partial.glob(f"{FINISHED}/*.json")}
    assert shards == records
    assert not partial.exists() or {path.name for path in partial.iterdir()} == {*shards, FINISHED}
    return shards


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """A file system of so many bytes; yields what mounts it anew with other options."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", os.fspath(folder)]
    mounted = subprocess.run(words, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a disk cannot be mounted here ({mounted.stderr.strip()})")

    def remount(options: str) -> None:
        words = ["mount", "-o", f"remount,{options}", os.fspath(folder)]
        subprocess.run(words, check=True, capture_output=True)

    try:
        yield remount
    finally:
        subprocess.run(["umount", "--lazy", os.fspath(folder)], check=True)


def test_a_full_disk(trials: Trials, sources: Path, tmp_path: Path) -> None:
    """A merge onto a disk that fills up ends in a sentence, and goes on once there is room"""
    merge(sources, tmp_path / "whole")
    size = sum(path.stat().st_size for path in (tmp_path / "whole").iterdir())
    page = os.sysconf("SC_PAGE_SIZE")
    for number in trials(short=5, full=50):
        room = random.Random(number).randrange(3 * page, size - 2 * page)
        place = tmp_path / f"disk-{number}"
        with trials.trial(number), disk(place, room) as remount:
            assert_refused(merge_by_command(sources, place / "out"), "No space left on device")
            assert not (place / "out").exists()
            kept = {name: inode(place / "out.partial" / name) for name in finished(place / "out")}
            remount(f"size={ENOUGH}")
            assert merge_by_command(sources, place / "out").exit_code == 0
            assert hash_files(place / "out") == hash_files(tmp_path / "whole")
            assert {name: inode(place / "out" / name) for name in kept} == kept


def inode(path: Path) -> int:
    return path.stat().st_ino


def test_a_read_only_disk(trials: Trials, sources: Path, tmp_path: Path) -> None:
    """A merge onto a read-only disk ends in a sentence"""
    for number in trials(short=2, full=10):
        place = tmp_path / f"disk-{number}"
        with trials.trial(number), disk(place, ENOUGH) as remount:
            if number % 2:
                merge(sources, place / "out")  # which is to stay
            before = hash_files(place)
            remount("ro")
            experts = {name: sources / name for name in EXPERTS}
            with pytest.raises(MachineError, match=r"out could not be made \(Read-only"):
                merge_checkpoints(
                    sources / "base", experts, place / "out", "average", "cpu", overwrite=True
                )
            assert hash_files(place) == before
            remount("rw")
            merge(sources, place / "out", overwrite=True)


def remove_all(source: Path) -> None:
    shutil.rmtree(source)


def remove_one(source: Path) -> None:
    weights(source).unlink()


def shorten(source: Path) -> None:
    os.truncate(weights(source), 1000)


def replace(source: Path) -> None:
    """With other values, beside and then renamed, as most programs do."""
    tensors = {name: 2 * tensor for name, tensor in load_file(weights(source)).items()}
    save_file(tensors, weights(source))


def change_one_byte(source: Path) -> None:
    with weights(source).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")


def weights(source: Path) -> Path:
    return max(source.glob("*.safetensors"))


DAMAGES = (remove_all, remove_one, shorten, replace, change_one_byte)


def test_a_source_that_changes(trials: Trials, sources: Path, tmp_path: Path) -> None:
    """A merge whose source is removed or changed meanwhile is refused, and nothing of it is kept"""
    merge(sources, tmp_path / "whole")
    for number in trials(short=5, full=50):
        dice = random.Random(number)
        own, out = tmp_path / f"sources-{number}", tmp_path / f"out-{number}"
        shutil.copytree(sources, own)
        damage, source = DAMAGES[number % len(DAMAGES)], own / dice.choice(("base", *EXPERTS))
        at = dice.random()

        def meddle(done: int, total: int, source: Path = source, at: float = at) -> None:
            if done >= at * total and (source.parent / "whole").is_dir():
                (source.parent / "whole").rmdir()
                damage(source)  # noqa: B023 - called before the loop goes on

        with trials.trial(number):
            (own / "whole").mkdir()
            with pytest.raises(SourceError, match=r"was changed or removed while it was read"):
                merge(own, out, progress=meddle)
            assert not list(tmp_path.glob(f"{out.name}*"))
            shutil.rmtree(own)
            shutil.copytree(sources, own)
            merge(own, out)
            assert hash_files(out) == hash_files(tmp_path / "whole")


def on_cpu() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)  # more than any machine has


def on_gpu() -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def in_python() -> None:
    bytearray(1 << 60)


def test_memory_that_suffices_for_one_tensor_alone(
    trials: Trials, sources: Path, tmp_path: Path
) -> None:
    """Tensors that do not fit into memory together are merged one by one"""
    merge(sources, tmp_path / "whole")
    for number in trials(short=3, full=30):
        refuse = (on_cpu, on_gpu, in_python)[number % 3]
        out = tmp_path / str(number)

        def tight(stack: Stack, refuse: Callable[[], None] = refuse) -> None:
            if len(stack.dense()) > 1:
                refuse()

        with trials.trial(number), method_that(tight):
            merge(sources, out)
            for path in sorted((tmp_path / "whole").glob("*.safetensors")):
                made = load_file(out / path.name)
                for name, weight in load_file(path).items():
                    assert_close(made[name], weight, 1e-6)


def test_memory_that_does_not_suffice(trials: Trials, sources: Path, tmp_path: Path) -> None:
    """A tensor that does not fit into memory ends the merge in a sentence; the next try goes on"""
    merge(sources, tmp_path / "whole")
    for number in trials(short=3, full=30):
        refuse = (on_cpu, on_gpu, in_python)[number % 3]
        out, left = tmp_path / str(number), [random.Random(number).randrange(8)]

        def tight(stack: Stack, refuse: Any = refuse, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                refuse()

        with trials.trial(number):
            with method_that(tight):
                refused = merge_by_command(sources, out)
            assert_refused(refused, "There is no memory for model.", "set `memory`")
            assert not out.exists()
            finished(out)
            assert merge_by_command(sources, out).exit_code == 0
            assert hash_files(out) == hash_files(tmp_path / "whole")


@contextmanager
def method_that(looks: Callable[[Stack], None]) -> Iterator[None]:
    """The method looks at every stack before it merges it."""
    real = METHODS[METHOD]

    def merge(stack: Stack, settings: Any, asked: Call) -> Any:
        looks(stack)
        return real.merge(stack, settings, asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, METHOD, type(real)(**vars(real) | {"merge": merge}))
        yield
