"""Merge after merge on one server: `python -m benchmarks.soak --merges 200`.

Server, worker, deployment, MLflow and DVC are real, the model is tiny. Every merge is a run of its
own, started by the worker; every fifth is evaluated, registered and reported as well.
"""

import argparse
import json
import signal
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.soak.accounts import expected, found, problems
from benchmarks.soak.run import Merged, soak
from benchmarks.soak.system import system
from benchmarks.soak.trend import trend
from benchmarks.tables import console, table

WARM = 10  # merges before the trend is looked at
SECONDS = "seconds of a merge"


def main() -> None:
    """Soak, print the table, and say what is not accounted for."""
    given = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to stop what was started
    done: list[Merged] = []
    with TemporaryDirectory(prefix="soak-") as folder, system(Path(folder).resolve()) as running:
        end = time.monotonic() + 60 * given.minutes
        for merged in soak(running, given.merges):
            done.append(merged)
            console.print(f"{len(done)}: {merged.run.state_name}, {merged.seconds:.0f} s")
            _keep(given.json, done)
            if time.monotonic() > end:
                break
        there = found(running, done)
    told = problems(expected(done), there)
    _show(done)
    for record, counts in there.items():
        console.print(f"{record}: {', '.join(f'{n} {what}' for what, n in counts.items())}")
    console.print("\n".join(told) or "every run is accounted for")
    _keep(given.json, done, records=there, problems=told)


def _series(done: list[Merged]) -> dict[str, list[float]]:
    names = done[0].readings
    series = {name: [merged.readings[name] for merged in done] for name in names}
    return {SECONDS: [merged.seconds for merged in done], **series}


def _show(done: list[Merged]) -> None:
    rows = []
    for name, readings in _series(done).items():
        line = trend(readings, min(WARM, len(readings) - 3))
        rows.append([name, *(f"{value:.4g}" for value in (line.start, line.end, line.slope))])
        rows[-1].append(f"{line.error:.2g}")
    columns = ("", "after the first", "after the last", "per merge", "±")
    table(f"{len(done)} merges; the trend without the first {WARM}", columns, rows)


def _keep(path: Path | None, done: list[Merged], **facts: Any) -> None:
    """All readings, as far as they are: a soak that is stopped has not been for nothing."""
    if path is None:
        return
    series = _series(done)
    trends = {n: asdict(trend(r, min(WARM, len(r) - 3))) for n, r in series.items() if len(r) > 2}
    text = json.dumps({"merges": len(done), "trends": trends, "readings": series, **facts})
    path.write_text(text + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--merges", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=600, help="after which it ends anyway")
    parser.add_argument("--json", type=Path, help="file to write all readings to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
