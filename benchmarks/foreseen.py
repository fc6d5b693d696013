"""What `poemerge plan` foresees against what merges take: seconds and peak memory.

python -m benchmarks.foreseen FOLDER
python -m benchmarks.foreseen FOLDER --only poe --json foreseen.json
python -m benchmarks.foreseen FOLDER --models BASE EXPERT ...
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.child import run
from benchmarks.process import HERE, OFFLINE
from benchmarks.tables import show_foreseen

METHODS = (
    "average",
    "task_arithmetic",
    "ties",
    "dare_ties",
    "model_stock",
    "knots_ties",
    "tsv_m",
    "iso_c",
    "gaussian_poe",
    "cauchy_poe",
    "student_t_poe",
)
TIMES = 3  # that each is foreseen and measured; what is shown are medians
KEYS = ("foreseen", "announced", "seconds", "peak")
MODELS = 5  # that benchmarks.models names, on its last lines


def main() -> None:
    """Foresee and measure each method some times, each time in a child: as a command does it.

    A process that has merged already has warm threads, and knows what the sources hash to.
    """
    given = _arguments()
    models, out = given.models or _made(given.folder), str(given.folder / "merged")
    rows = []
    for method in (name for name in METHODS if given.only in name):
        times = [_once([method, out, *models]) for _ in range(TIMES)]
        rows.append({"method": method, **{k: median(t[k] for t in times) for k in KEYS}})
        rows[-1]["all"] = times
        print(f"{method}: {rows[-1]['seconds']:.1f} s", flush=True)
    show_foreseen(rows)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _once(words: list[str]) -> dict[str, Any]:
    usage = run([sys.executable, "-m", "benchmarks.foreseen", "--child", *words], HERE, OFFLINE)
    return json.loads(usage.output.splitlines()[-1]) | {"peak": usage.peak}


def _made(folder: Path) -> list[str]:
    """Base and experts of benchmarks.models, in a child: torch would make this process large."""
    command = [sys.executable, "-m", "benchmarks.models", str(folder)]
    return run(command, HERE, OFFLINE).output.splitlines()[-MODELS:]


def child(method: str, folder: Path, base: Path, experts: list[Path]) -> None:
    """Print what one merge was foreseen to take at the rates of this moment, and took."""
    import torch  # noqa: PLC0415 - the parent must stay small, see child.py

    from poemerge.merge import merge_checkpoints, name_experts  # noqa: PLC0415
    from poemerge.merging.jobs import Schedule, jobs  # noqa: PLC0415
    from poemerge.merging.plan import plan_merge  # noqa: PLC0415
    from poemerge.merging.rates import Rates  # noqa: PLC0415

    out = folder / f"foreseen-{method}"
    rates = Rates.measured(torch.device("cpu"))
    with plan_merge(base, name_experts(experts), method, {}) as plan:
        todo = jobs(plan)
        foreseen = Schedule.balanced(todo, rates, workers=1).seconds
        parts = rates.seconds(sum((job.cost for job in todo[1:]), todo[0].cost))
        announced = plan.peak_bytes()
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    merge_checkpoints(base, experts, out, method)
    found = {"foreseen": foreseen, "announced": announced, "seconds": time.perf_counter() - start}
    print(json.dumps(found | {"parts": parts}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=lambda text: Path(text).resolve(), help="for the models")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="a base and experts of yours")
    parser.add_argument("--only", default="", help="methods whose name holds this")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        folder, base, *experts = map(Path, sys.argv[3:])
        child(sys.argv[2], folder, base, experts)
    else:
        main()
