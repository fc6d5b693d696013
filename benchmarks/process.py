"""Whole processes side by side: mergekit, poemerge, and a floor that only reads and writes.

python -m benchmarks.process FOLDER --mergekit PYTHON
python -m benchmarks.process FOLDER --mergekit PYTHON --only ties --repeats 1 --json ties.json
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.child import Usage, run
from benchmarks.contenders import HOW_TO_GET_MERGEKIT, METHODS, Inputs, Method
from benchmarks.tables import show_processes

HERE = Path(__file__).parents[1]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
FLOOR = "floor"
MODELS = 5  # that benchmarks.models names, on its last lines

Jobs = dict[str, Callable[[Path], list[str]]]


def main() -> None:
    """Measure what was asked for."""
    given = _arguments()
    if not given.mergekit.with_name("mergekit-yaml").exists():
        sys.exit(f"{given.mergekit} has no mergekit-yaml beside it.\n{HOW_TO_GET_MERGEKIT}")
    inputs = _inputs(given)
    methods = [method for method in METHODS if given.only in method.ours]
    usages = measure(_jobs(inputs, methods), given.folder / "merged", given.repeats)
    rows = [_row(method, inputs, usages) for method in methods]
    result = {
        "floor": _medians(usages[FLOOR]),
        "rows": rows,
        "task_arithmetic": _correctness(inputs, methods, given.folder / "merged"),
    }
    show_processes(result)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(jobs: Jobs, folder: Path, repeats: int) -> dict[str, list[Usage]]:
    """Run every job `repeats` times; they take turns, so that a busy machine meets all of them."""
    usages: dict[str, list[Usage]] = {name: [] for name in jobs}
    folder.mkdir(parents=True, exist_ok=True)
    _once(jobs[FLOOR], folder / FLOOR)  # the inputs are in the page cache from here on
    for _ in range(repeats):
        for name, command in jobs.items():
            usages[name].append(_once(command, folder / name))
            print(f"{name}: {usages[name][-1].seconds:.1f} s", flush=True)
    return usages


def _once(command: Callable[[Path], list[str]], out: Path) -> Usage:
    """Run a job into an empty place, with nothing of the last one left to be written."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    return run(command(out), HERE, OFFLINE)


def _jobs(inputs: Inputs, methods: list[Method]) -> Jobs:
    """Name → command for an output folder; what two methods share is run once."""
    jobs: Jobs = {FLOOR: inputs.floor}
    for method in methods:
        jobs[_theirs(method)] = lambda out, method=method: inputs.mergekit_yaml(method, out)
        jobs[method.ours] = lambda out, method=method: inputs.poemerge(method, out)
    return jobs


def _theirs(method: Method) -> str:
    return f"mergekit-{method.theirs}"


def _row(method: Method, inputs: Inputs, usages: Mapping[str, list[Usage]]) -> dict[str, Any]:
    ours, theirs = _medians(usages[method.ours]), _medians(usages[_theirs(method)])
    floor = _medians(usages[FLOOR])
    return {
        "method": method.ours,
        "against": method.theirs,
        "ours": ours,
        "mergekit": theirs,
        "announced": int(run(inputs.announced(method), HERE, OFFLINE).output.split()[-1]),
        "ratio": {key: theirs[key] / ours[key] for key in ours},
        "over_floor": {key: ours[key] / floor[key] for key in ours},
    }


def _medians(usages: list[Usage]) -> dict[str, float]:
    keys = ("seconds", "peak", "anonymous")
    return {key: median(getattr(usage, key) for usage in usages) for key in keys}


def _correctness(inputs: Inputs, methods: list[Method], folder: Path) -> dict[str, Any] | None:
    """Errors of both task arithmetics, ours first; None where it was not run."""
    found = [method for method in methods if method.ours == "task_arithmetic"]
    if not found:
        return None
    merged = (folder / found[0].ours, folder / _theirs(found[0]))
    return json.loads(run(inputs.compare(*merged), HERE, OFFLINE).output.splitlines()[-1])


def _inputs(given: argparse.Namespace) -> Inputs:
    """The models, made if they are not there (by a child: they take memory to make)."""
    command = [sys.executable, "-m", "benchmarks.models", str(given.folder)]
    base, *experts = run(command, HERE, OFFLINE).output.splitlines()[-MODELS:]
    return Inputs(Path(base), tuple(map(Path, experts)), given.mergekit, given.mergekit_dtype)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=HOW_TO_GET_MERGEKIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=lambda text: Path(text).resolve(), help="for the models")
    parser.add_argument(
        "--mergekit", type=lambda text: Path(text).absolute(), required=True, help="its Python"
    )
    parser.add_argument(
        "--mergekit-dtype", default="bfloat16", help="that mergekit computes in; ours is fp32"
    )
    parser.add_argument("--only", default="", help="methods of ours whose name holds this")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; medians are shown")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
