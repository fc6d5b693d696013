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
MODELS = 5  # that benchmarks.models names, on its last lines


def main() -> None:
    """Foresee and measure, in one child a method, so that each peak is its own."""
    given = _arguments()
    models, out = given.models or _made(given.folder), str(given.folder / "merged")
    rows = []
    for method in (name for name in METHODS if given.only in name):
        child = [sys.executable, "-m", "benchmarks.foreseen", "--child", method, out, *models]
        usage = run(child, HERE, OFFLINE)
        found = json.loads(usage.output.splitlines()[-1])
        rows.append({"method": method, **found, "peak": usage.peak})
        print(f"{method}: {found['seconds']:.1f} s", flush=True)
    show_foreseen(rows)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _made(folder: Path) -> list[str]:
    """Base and experts of benchmarks.models, in a child: torch would make this process large."""
    command = [sys.executable, "-m", "benchmarks.models", str(folder)]
    return run(command, HERE, OFFLINE).output.splitlines()[-MODELS:]


def child(method: str, folder: Path, base: Path, experts: list[Path]) -> None:
    """Print what one merge was foreseen to take, and took; the median of three."""
    import torch  # noqa: PLC0415 - the parent must stay small, see child.py

    from poemerge.merge import merge_checkpoints, name_experts  # noqa: PLC0415
    from poemerge.merging.jobs import Schedule, jobs  # noqa: PLC0415
    from poemerge.merging.plan import plan_merge  # noqa: PLC0415
    from poemerge.merging.rates import Rates  # noqa: PLC0415

    out = folder / f"foreseen-{method}"
    rates = Rates.measured(torch.device("cpu"))
    with plan_merge(base, name_experts(experts), method, {}) as plan:
        todo = jobs(plan)
        foreseen = Schedule.balanced(todo, rates, workers=1)
        parts = rates.seconds(sum((job.cost for job in todo[1:]), todo[0].cost))
        announced = plan.peak_bytes()
    measured = []
    for _ in range(3):
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        merge_checkpoints(base, experts, out, method)
        measured.append(time.perf_counter() - start)
    found = {"foreseen": foreseen.seconds, "parts": parts, "announced": announced}
    print(json.dumps(found | {"seconds": median(measured), "all": measured}))


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
