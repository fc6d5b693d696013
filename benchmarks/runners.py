"""What runners gain and what they cost: speed-up, seconds a job, ten thousand jobs.

python -m benchmarks.runners
python -m benchmarks.runners --only overhead
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.parts import run_parts
from benchmarks.tables import table
from poemerge.atomic import write_json
from poemerge.errors import SettingError
from poemerge.ghosts import in_shards, write_ghost
from poemerge.layout import INDEX
from poemerge.merge import merge_checkpoints
from poemerge.merging.choices import Choices
from poemerge.merging.head import Runner
from poemerge.merging.jobs import jobs, longest_first
from poemerge.merging.plan import plan_merge
from poemerge.merging.rates import NOMINAL
from poemerge.merging.shards import Shard
from poemerge.merging.terms import HEADERS, STRICT
from poemerge.merging.work import Recipe, ShardJob
from tasks.runners import RUNNERS, open_runner

SHARDS, SIDE = 16, 1536  # of the models for the speed-up: each shard is one matrix
FEW, MANY = 500, 10_000  # empty jobs
COUNTS = (1, 2)  # of workers


def speedup(root: Path) -> None:
    """The same merge in this process and by workers; their start is counted."""
    base, *experts = [_model(root / name, seed) for seed, name in enumerate(("base", "a", "b"))]
    rows = [["threads", f"{_merge(base, experts, root / 'threads', None):.1f}", "", ""]]
    for name in _present():
        one, two = (
            _merge(base, experts, root / f"{name}-{count}", _runner(name, count))
            for count in COUNTS
        )
        rows.append([name, f"{one:.1f}", f"{two:.1f}", f"{one / two:.2f}"])
    columns = ("", "1 worker, s", "2 workers, s", "speed-up")
    table(f"cauchy_poe, 2 experts, {SHARDS} shards of {4 * SIDE**2 / 1e6:.0f} MB", columns, rows)


def overhead(_: Path) -> None:
    """Empty jobs: until the first is done, and for each after it."""
    _show(f"{FEW} empty jobs", FEW)


def many(root: Path) -> None:
    """A model of so many shards: what planning takes, and what handing out does."""
    layout = {f"layer{i}.weight": ((8, 8), torch.float32) for i in range(MANY)}
    ghost = write_ghost(root / "ghost", in_shards(layout, limit=1), {})
    start = time.perf_counter()
    with plan_merge(ghost, {"a": ghost}, "average", {}, HEADERS) as plan:
        planned = time.perf_counter()
        todo = longest_first(jobs(plan), NOMINAL)
    spread = time.perf_counter() - planned
    table(
        f"A plan of {len(todo):,} jobs",
        ("", "s"),
        [["headers and rules", f"{planned - start:.1f}"], ["costs and order", f"{spread:.1f}"]],
    )
    _show(f"{MANY:,} empty jobs", MANY)


def nothing(job: ShardJob) -> Shard:
    """What a worker does with an empty job."""
    return Shard(job.file, "", ())


def _show(title: str, count: int) -> None:
    rows = []
    for name in _present():
        for workers in COUNTS:
            first, each = _hand_out(_runner(name, workers), count)
            rows.append([f"{name}, {workers}", f"{first:.1f}", f"{each * 1e3:.2f}"])
    table(title, ("runner, workers", "first, s", "each, ms"), rows)


def _hand_out(runner: Runner, count: int) -> tuple[float, float]:
    """Seconds until the first of so many empty jobs is done, and for each after it."""
    runner = replace(runner, work=nothing)  # type: ignore[type-var]
    recipe = Recipe(
        Path("/base"), {}, "average", {}, STRICT, Choices(torch.device("cpu"), "", "full", 0)
    )
    times = []
    start = time.perf_counter()
    todo = [ShardJob(recipe, Path("/out"), str(i), 1, {}) for i in range(count)]
    runner(todo, lambda _: times.append(time.perf_counter() - start))
    return times[0], (times[-1] - times[0]) / (count - 1)


def _present() -> Iterator[str]:
    """Runners with workers that are installed."""
    for name in RUNNERS[1:]:
        try:
            open_runner(name, device="cpu")
        except SettingError as error:
            print(error)
        else:
            yield name


def _runner(name: str, workers: int) -> Runner:
    runner = open_runner(name, workers, device="cpu")
    assert runner is not None
    return runner


def _merge(base: Path, experts: Sequence[Path], out: Path, runner: Runner | None) -> float:
    start = time.perf_counter()
    merge_checkpoints(base, experts, out, "cauchy_poe", "cpu", runner=runner)
    return time.perf_counter() - start


def _model(folder: Path, seed: int) -> Path:
    """A base (seed 0) or a fine-tune of it, one matrix a shard."""
    start, moved = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    folder.mkdir()
    files = {
        f"layer{i}.weight": f"model-{i + 1:05}-of-{SHARDS:05}.safetensors" for i in range(SHARDS)
    }
    for name, file in files.items():
        weight = torch.randn(SIDE, SIDE, generator=start)
        if seed:
            weight += 1e-3 * torch.randn(SIDE, SIDE, generator=moved)
        save_file({name: weight}, folder / file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": files})
    write_json(folder / "config.json", {})
    return folder


if __name__ == "__main__":
    run_parts(__doc__, speedup, overhead, many)
