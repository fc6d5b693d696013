"""A merge of several shards, and what kills a worker in the midst of one."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from poemerge.atomic import write_json
from poemerge.hashing import hash_files
from poemerge.layout import INDEX, RECORD
from poemerge.merge import merge_checkpoints
from poemerge.merging.head import Runner

SHARDS, SIDE = 4, 512


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


def write_models(root: Path) -> Path:
    """A base and two experts."""
    for name, seed in (("base", 1), ("a", 2), ("b", 3)):
        write_model(root / name, seed, 0.01 * (name != "base"))
    return root


def merge(models: Path, out: Path, runner: Runner | None, device: str = "cpu") -> None:
    experts = {name: models / name for name in ("a", "b")}
    merge_checkpoints(models / "base", experts, out, "cauchy_poe", device, runner=runner)


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


def with_a_hole(folder: Path) -> Path:
    """An expert with one value that is no number, where the head does not look."""
    write_model(folder, 4, 0.01)
    file = max(folder.glob("*.safetensors"))
    weights = load_file(file)
    weights[max(weights)][1, 1] = float("nan")
    save_file(weights, file)
    return folder
